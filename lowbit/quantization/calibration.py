"""A calibrated start for a conversion: round the teacher's weights with second-order information.

Rounding every weight to the nearest code ignores that inputs are correlated: the errors of a row
can cancel in its output. Layer by layer, in the order of the data flow, each linear layer is

1. refitted: ridge regression moves its float weights so that, on the inputs it really gets from
   the quantised layers before it, it gives what the teacher's layer gives (for layers that write
   to the residual stream: what brings the stream to the teacher's, in errors relative to each
   token's size);
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
    input_of,
    linear_layers,
    outputs_of,
    wiring,
)
from lowbit.quantization.layers import QATLinear, sign_codes, ternary_codes

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the mean diagonal of the second moment: the refit's
HELD_OUT = 8  # every eighth part of the text chooses among them
DAMPING = 0.3  # the same, in the rounding
BLOCK = 64  # columns between two updates of the rest
FIRST_WEIGHT = 1.0
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
    """Weights (O, I) near w that the quantiser of this mode maps to ``codes`` and ``scale``.

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


@dataclass
class Moments:
    """What a refit needs of a share of the text: square (I, I), the sum of x x^T over tokens, and
    missing (I, O), the sum of x (y - W x)^T, what the layer's output lacks."""

    square: torch.Tensor
    missing: torch.Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.square + other.square, self.missing + other.missing)


def refit(train: Moments, held: Moments | None) -> torch.Tensor:
    """The change of the weights (O, I) that ridge regression finds.

    How strong the ridge is, up to no change at all, is chosen by what the fit to one part of the
    text does on the other: block after block corrects what the blocks before it left, and what is
    fitted to the noise of these tokens adds up.
    """

    def solve(moments: Moments, ridge: float) -> torch.Tensor:
        square = moments.square.clone()
        square.diagonal().add_(ridge * square.diagonal().mean().clamp_min(1e-12))
        return torch.cholesky_solve(moments.missing, torch.linalg.cholesky(square))  # (I, O)

    if held is None:
        return solve(train, RIDGES[1]).mT
    best, choice = 0.0, None
    for ridge in RIDGES:
        change = solve(train, ridge)
        error = float(((held.square @ change - 2 * held.missing) * change).sum())
        if error < best:
            best, choice = error, ridge
    if choice is None:
        return torch.zeros_like(train.missing).mT
    return solve(train + held, choice).mT


@torch.no_grad()
def calibrate_layer(layer: QATLinear, train: Moments, held: Moments | None) -> None:
    """New latent weights, in place, from the moments of two parts of the text."""
    w = layer.weight.data
    fitted = w + refit(train, held)
    moment = train.square if held is None else train.square + held.square
    quantize = ternary_codes if layer.mode == "ternary" else sign_codes
    codes = round_columns(fitted, moment, quantize(fitted, "row")[1], layer.mode)
    latent = latent_weights(codes, fit_scale(codes, fitted, moment), fitted, layer.mode)
    if bool(torch.isfinite(latent).all()):  # else: keep what rounding to nearest gives
        w.copy_(latent)


def position_weights(stream: torch.Tensor) -> torch.Tensor:
    """(B, T, C) -> (B, T, 1): FIRST_WEIGHT for the first token of a window, 1 for the others. The
    first token is what attention falls back on (an *attention sink*, arXiv 2309.17453); what is
    wrong with it is wrong with all that follows."""
    weights = torch.ones_like(stream[..., :1], dtype=torch.float32)
    weights[:, 0] = FIRST_WEIGHT
    return weights


def token_weights(stream: torch.Tensor) -> torch.Tensor:
    """1 / mean square of the residual stream (..., C) at each token, over its mean: (..., 1).

    What later layers read is normalised token by token, so an error counts relative to its token.
    The first tokens of a text hold *massive activations* (arXiv 2402.17762), a thousand times
    the others; in a plain mean nothing else would count.
    """
    weights = 1 / stream.float().square().mean(-1, keepdim=True).clamp_min(1e-12)
    return weights / weights.mean()


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
    noted: list[dict[str, torch.Tensor]] = []
    after = []
    for part in parts:
        with outputs_of(originals) as found:
            after.append(part.calls[number](teacher, part.theirs))
        noted.append(found)

    for group in wired.groups:
        device = parts[0].theirs.device
        size = layers[group[0]].in_features
        shares = 2 if len(parts) >= HELD_OUT else 1
        square = torch.zeros(shares, size, size, device=device)
        missing = {
            n: torch.zeros(shares, size, layers[n].out_features, device=device) for n in group
        }
        writes = group[0] in wired.writers
        before = wired.writers[: wired.writers.index(group[0])] if writes else []
        for i, (part, target) in enumerate(zip(parts, noted, strict=True)):
            share = int(shares == 2 and i % HELD_OUT == HELD_OUT - 1)
            with outputs_of({n: layers[n] for n in before}) as given:
                x = input_of(student, layers[group[0]], part.calls[number], part.ours)
            weights = position_weights(part.theirs)
            lag: torch.Tensor | float = 0.0  # of the stream, before this layer writes to it
            if writes:
                lag = (
                    part.theirs.float()
                    - part.ours
                    + sum(target[n].float() - given[n] for n in before)
                )
                stream = part.theirs + sum(target[n] for n in [*before, group[0]])
                weights = weights * token_weights(stream)
            x = x.flatten(0, 1).float()
            weighted = x * weights.flatten(0, 1)
            square[share].addmm_(weighted.mT, x)
            for n in group:
                y = (target[n].float() + lag).flatten(0, 1)
                layer = layers[n]
                now = F.linear(x, layer.weight.float(), layer.bias)
                missing[n][share].addmm_(weighted.mT, y - now)
        for n in group:
            layer = layers[n]
            assert isinstance(layer, QATLinear)
            both = [Moments(square[k], missing[n][k]) for k in range(shares)]
            calibrate_layer(layer, both[0], both[1] if shares == 2 else None)
    return after


@torch.no_grad()
def calibrate(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Sequence[torch.Tensor],
    *,
    refine: Callable[[nn.Module, int, Sequence[Part], Sequence[torch.Tensor]], None] | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> LanguageModel:
    """Calibrate, in place, the ternary or 1-bit layers of a student that holds the teacher's
    weights, on batches of token ids, (B, T) each. Scales a row, in closed form, only.

    refine(block, number, parts, wanted), if given, then trains each block on its own; wanted is
    what should leave it, for each part. progress wraps the loop over blocks. Raises ValueError
    where the shapes differ or the student has no such layers.
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
        if refine:
            refine(block, number, parts, after)
        for part, wanted in zip(parts, after, strict=True):
            part.ours, part.theirs = part.calls[number](block, part.ours), wanted
    return student
