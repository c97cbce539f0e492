"""A calibrated start for a conversion: round the teacher's weights with second-order information.

Rounding every weight to the nearest code ignores that inputs are correlated: the errors of a row
can cancel in its output. Layer by layer, in the order of the data flow, each linear layer is

1. refitted: ridge regression moves its float weights so that, on the inputs it really gets from
   the quantised layers before it, it gives what the teacher's layer gives (for layers that write
   to the residual stream, themselves or through a norm: what brings the stream to the teacher's,
   in errors relative to each token's size);
2. rounded column by column, each column's error pushed onto the columns still to come
   (GPTQ, arXiv 2210.17323, eq. 2 and 3, with the Cholesky factor of its section 3.3);
3. rescaled: the least-squares scale of each row for its codes in the metric of the inputs;
4. given latent weights that quantise to exactly these codes and scales, as close to the refitted
   ones as that allows, so that training can go on from there.

Shapes: N tokens, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowbit.models.interface import (
    Call,
    LanguageModel,
    Wiring,
    block_calls,
    entering_stream,
    gains_of,
    input_of,
    linear_layers,
    noted,
    wiring,
)
from lowbit.quantization.layers import HELD_MODES, QATLinear, sign_codes, ternary_codes

RIDGE = 0.1  # of the mean diagonal of the second moment, in the refit
DAMPING = 0.3  # the same, in the rounding
BLOCK = 64  # columns between two updates of the rest
NORM_RIDGE = 0.1  # of the mean square gain of a norm, where it is inverted
MARGIN = 0.1  # of the threshold, by which a moved latent weight passes it


def round_columns(
    w: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, mode: str
) -> torch.Tensor:
    """w (O, I), second moment of the inputs (I, I), scale (O, 1) -> codes (O, I).

    Columns are taken in order of falling input power.
    """
    h = moment.clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp_min(1e-12))
    order = torch.argsort(h.diagonal(), descending=True)
    h = h[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    left = w.mT[order].contiguous()  # (I, O): a column of w is a row in memory
    codes = torch.empty_like(left)
    s = scale.expand(len(w), 1).squeeze(1)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        block, errors = left[start:stop], torch.empty_like(left[start:stop])
        local = factor[start:stop, start:stop]
        for j in range(stop - start):
            column = block[j]
            if mode == "ternary":
                code = (column / s).round_().clamp_(-1, 1)
            else:
                code = torch.where(column < 0, -1.0, 1.0)
            codes[start + j] = code
            error = (column - code * s) / local[j, j]
            errors[j] = error
            block[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1)
    return codes[torch.argsort(order)].mT.contiguous()


def fit_scale(codes: torch.Tensor, w: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The scale (O, 1) of each row that minimises E ||(s codes - w) x||^2; above zero."""
    metric = codes @ moment
    power = (metric * codes).sum(1, keepdim=True)
    best = (metric * w).sum(1, keepdim=True) / power.clamp_min(1e-12)
    usual = w.abs().mean(1, keepdim=True).clamp_min(1e-8)
    return torch.where((power > 0) & (best > 0.1 * usual), best, usual)


def latent_weights(
    codes: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, mode: str
) -> torch.Tensor:
    """Weights (O, I) near w that the quantiser of this mode maps to ``codes`` (O, I) and, up to
    bfloat16's rounding, to ``scale`` (O, 1). After 50 repetitions a ternary code may still differ.

    Entries on the wrong side of the quantiser's threshold are moved just across it. The threshold
    depends on the entries, so this is repeated; codes are the same for every multiple of a row,
    so the scale comes last.
    """
    latent = w.clone()
    if mode != "ternary":
        small = MARGIN * w.abs().mean(1, keepdim=True).clamp_min(1e-8)
        latent = torch.where(torch.sign(w) == codes, w, codes * small)
        return latent * (scale / latent.abs().mean(1, keepdim=True))
    for _ in range(50):
        edge = 0.7 * latent.abs().mean(1, keepdim=True)
        wrong = ternary_codes(latent)[0] != codes
        if not bool(wrong.any()):
            break
        inside = latent.clamp(-(1 - MARGIN) * edge, (1 - MARGIN) * edge)
        outside = codes * torch.maximum(codes * latent, (1 + MARGIN) * edge)
        latent = torch.where(wrong, torch.where(codes == 0, inside, outside), latent)
    kept = (latent * codes).sum(1, keepdim=True) / codes.abs().sum(1, keepdim=True).clamp_min(1)
    return latent * (scale / kept.clamp_min(1e-12))


@torch.no_grad()
def calibrate_layer(layer: QATLinear, moment: torch.Tensor, missing: torch.Tensor) -> None:
    """Give a layer new latent weights, in place, or leave them where they would not be finite.

    moment: E[x x^T] (I, I) of its inputs; missing: E[x (y - W x)^T] (I, O), what its output lacks
    of the wanted one y. Both means give tokens the same weights.
    """
    w = layer.weight.data
    ridge = moment.clone()
    ridge.diagonal().add_(RIDGE * ridge.diagonal().mean().clamp_min(1e-12))
    fitted = w + torch.linalg.solve(ridge, missing).mT
    if layer.mode in HELD_MODES:  # the nearest of 255, or of 16 in blocks, is near enough
        w.copy_(torch.where(torch.isfinite(fitted).all(), fitted, w))
        return
    quantize = ternary_codes if layer.mode == "ternary" else sign_codes
    codes = round_columns(fitted, moment, quantize(fitted, "row")[1], layer.mode)
    latent = latent_weights(codes, fit_scale(codes, fitted, moment), fitted, layer.mode)
    if bool(torch.isfinite(latent).all()):  # else: keep what rounding to nearest gives
        w.copy_(latent)


def token_weights(stream: torch.Tensor) -> torch.Tensor:
    """1 / mean square of the residual stream (..., C), or of what a norm reads, at each token, over
    its mean: (..., 1). Tokens smaller than a tenth of the usual size count as if they were a tenth.

    What later layers read is normalised token by token, so an error counts relative to its token.
    The first tokens of a text hold *massive activations* (arXiv 2402.17762), a thousand times
    the others; in a plain mean nothing else would count.
    """
    power = stream.float().square().mean(-1, keepdim=True)
    least = (0.01 * power.median()).clamp_min(torch.finfo(power.dtype).tiny)
    weights = 1 / torch.maximum(power, least)
    return weights / weights.mean()


def before_norm(change: torch.Tensor, y: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """What to add to y, which an RMS norm of these gains (C,) reads, so that the norm gives about
    ``change`` more; both (..., C).

    To first order, and as if y kept its size. Channels whose gains are small would need long
    changes, so these are held short, as in ridge regression.
    """
    root = y.square().mean(-1, keepdim=True).sqrt()
    square = gains.square()
    least = torch.finfo(square.dtype).tiny
    return change * root * gains / (square + NORM_RIDGE * square.mean()).clamp_min(least)


@dataclass
class Part:
    """Windows that are calibrated on at once, as the residual streams (B, T, C) that enter the
    present block in teacher and student, and how each block is called on them."""

    calls: list[Call]
    theirs: torch.Tensor
    ours: torch.Tensor


@torch.no_grad()
def calibrate_block(
    student: nn.Module, teacher: nn.Module, number: int, parts: Sequence[Part], wired: Wiring
) -> list[torch.Tensor]:
    """Calibrate the layers of block ``number``, in place. Returns the teacher's stream after the
    block, of each part."""
    layers, originals = linear_layers(student), linear_layers(teacher)
    watched = {n: teacher.get_submodule(n) for n in [*originals, *wired.writers.values()]}
    targets: list[dict[str, torch.Tensor]] = []
    after = []
    for part in parts:
        with noted(watched) as found:
            after.append(part.calls[number](teacher, part.theirs))
        targets.append(found)

    for group in wired.groups:
        moment, missing = moments_of(group, student, number, parts, targets, wired)
        with exact(moment.device):
            for name, lacks in missing.items():
                layer = layers[name]
                assert isinstance(layer, QATLinear)
                calibrate_layer(layer, moment, lacks)
    return after


def exact(device: torch.device) -> torch.autocast:
    """Sums over tokens and what is made of them are float32, whatever models compute in."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def moments_of(
    group: Sequence[str],
    block: nn.Module,
    number: int,
    parts: Sequence[Part],
    targets: Sequence[dict[str, torch.Tensor]],
    wired: Wiring,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a group of layers that read one input: its second moment (I, I), and for each layer
    E[x (y - W x)^T] (I, O). targets: what each layer of the teacher's block gives, and each norm
    that writes to the stream, of each part."""
    layers = linear_layers(block)
    device, size = parts[0].theirs.device, layers[group[0]].in_features
    moment = torch.zeros(size, size, device=device)
    missing = {n: torch.zeros(size, layers[n].out_features, device=device) for n in group}
    own = wired.writers.get(group[0])  # the module by which it writes to the stream
    order = [*wired.writers.values()]
    earlier = {n: block.get_submodule(n) for n in order[: order.index(own) if own else 0]}
    gains = None  # of the norm, where it writes through one
    if own and own != group[0]:
        with exact(device):
            gains = gains_of(block.get_submodule(own), layers[group[0]].out_features, device)
    count = sum(part.theirs[..., 0].numel() for part in parts)
    for part, target in zip(parts, targets, strict=True):
        with noted(earlier) as given:
            x = input_of(block, layers[group[0]], part.calls[number], part.ours)
        with exact(device):
            x = x.flatten(0, 1).float()
            weighted = x
            lag = torch.zeros((), device=device)  # of the stream, before this layer writes to it
            if own:
                lag = part.theirs.float() - part.ours
                stream = part.theirs.float()
                for n in earlier:
                    lag = lag + (target[n].float() - given[n])
                    stream = stream + target[n]
                each = token_weights(stream + target[own])
                if gains is not None:
                    y = target[group[0]].float()
                    lag = before_norm(lag, y, gains)
                    each = each * token_weights(y)  # the norm divides errors by y's size, too
                weighted = x * each.flatten(0, 1)
            moment.addmm_(weighted.mT, x, alpha=1 / count)
            for n in group:
                wanted = (target[n].float() + lag).flatten(0, 1)
                now = F.linear(x, layers[n].weight.float(), layers[n].bias)
                missing[n].addmm_(weighted.mT, wanted - now, alpha=1 / count)
    return moment, missing


@torch.no_grad()
def calibrate(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Sequence[torch.Tensor],
    *,
    progress: Callable[[Sequence], Iterable] = iter,
) -> LanguageModel:
    """Calibrate, in place, a student that holds the teacher's weights, on batches of token ids,
    (B, T) each; returns it. Ternary and 1-bit layers are refitted and rounded, those of 8 and 4
    bits only refitted. For scales a row, in closed form, which is not checked.

    progress wraps the loop over blocks. Raises ValueError where the shapes differ or the student
    has no `QATLinear`.
    """
    if student.describe() != teacher.describe():
        raise ValueError("calibrate: the student's shape is not the teacher's")
    if not any(isinstance(m, QATLinear) for m in student.modules()):
        raise ValueError("calibrate: the student has no low-bit layers")
    calls = {ids.size(1): block_calls(teacher, ids[:1])[1] for ids in batches}
    parts = [
        Part(calls[ids.size(1)], entering_stream(teacher, ids), entering_stream(student, ids))
        for ids in batches
    ]
    pairs = list(zip(student.blocks, teacher.blocks, strict=True))
    for number, (block, original) in enumerate(progress(pairs)):
        first = parts[0]
        wired = wiring(original, first.calls[number], first.theirs[:1])
        after = calibrate_block(block, original, number, parts, wired)
        for part, wanted in zip(parts, after, strict=True):
            part.ours, part.theirs = part.calls[number](block, part.ours), wanted
    return student
