"""A calibrated start for a conversion: round the teacher's weights with second-order information.

Rounding every weight to the nearest code ignores that inputs are correlated: the errors of a row
can cancel in its output. Layer by layer, in the order of the data flow, each linear layer is

1. refitted: ridge regression moves its float weights so that, on the inputs it really gets from
   the quantised layers before it, it gives what the teacher's layer gives (for the two
   projections that write to the residual stream: what brings the stream to the teacher's);
2. rounded column by column, each column's error pushed onto the columns still to come
   (GPTQ, arXiv 2210.17323, eq. 2 and 3, with the Cholesky factor of its section 3.3);
3. rescaled: the least-squares scale of each row for its codes in the metric of the inputs;
4. given latent weights that quantise to exactly these codes and scales, as close to the refitted
   ones as that allows, so that training can go on from there.

Shapes: N tokens, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn as nn

from lowbit.models.decoder import Block, CausalLM
from lowbit.quantization.layers import QATLinear, sign_codes, ternary_codes

RIDGE = 0.1  # of the mean diagonal of the second moment, in the refit
DAMPING = 0.3  # the same, in the rounding
BLOCK = 64  # columns between two updates of the rest
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
    w, h = w[:, order].clone(), h[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    s = scale.expand(len(w), 1).squeeze(1)
    for start in range(0, w.size(1), BLOCK):
        stop = min(start + BLOCK, w.size(1))
        block, errors = w[:, start:stop].clone(), torch.empty_like(w[:, start:stop])
        local = factor[start:stop, start:stop]
        for j in range(stop - start):
            column = block[:, j]
            if mode == "ternary":
                code = (column / s).round().clamp(-1, 1)
            else:
                code = torch.where(column < 0, -1.0, 1.0)
            codes[:, start + j] = code
            error = (column - code * s) / local[j, j]
            errors[:, j] = error
            block[:, j + 1 :] -= error[:, None] * local[j, j + 1 :]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes[:, torch.argsort(order)]


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


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, what the linear layers among these modules give is noted."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found[name] = output

        return note

    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_hook(hook(n)) for n, m in linear.items()]
    yield found
    for handle in handles:
        handle.remove()


def _calibrate_layer(
    layer: QATLinear, x: torch.Tensor, moment: torch.Tensor, y: torch.Tensor
) -> None:
    """Inputs x (N, I), their second moment (I, I) and wanted outputs y (N, O) -> new latent
    weights, in place."""
    w = layer.weight.data
    ridge = moment.clone()
    ridge.diagonal().add_(RIDGE * ridge.diagonal().mean().clamp_min(1e-12))
    fitted = w + torch.linalg.solve(ridge, x.mT @ (y - x @ w.mT) / len(x)).mT
    quantize = ternary_codes if layer.mode == "ternary" else sign_codes
    codes = round_columns(fitted, moment, quantize(fitted, "row")[1], layer.mode)
    latent = latent_weights(codes, fit_scale(codes, fitted, moment), fitted, layer.mode)
    if bool(torch.isfinite(latent).all()):  # else: keep what rounding to nearest gives
        w.copy_(latent)


def _calibrate_layers(
    layers: Iterable[nn.Module], read: torch.Tensor, wanted: Iterable[torch.Tensor]
) -> None:
    """Layers that read the same, (B, T, I), and what each should give, (B, T, O)."""
    x = read.flatten(0, 1)
    moment = x.mT @ x / len(x)
    for layer, y in zip(layers, wanted, strict=True):
        assert isinstance(layer, QATLinear)
        _calibrate_layer(layer, x, moment, y.flatten(0, 1))


@torch.no_grad()
def calibrate(student: CausalLM, teacher: CausalLM, ids: torch.Tensor) -> CausalLM:
    """Calibrate, in place, the ternary or 1-bit layers of a student that holds the teacher's
    weights, on token ids (B, T). Scales a row, in closed form, only.

    Raises ValueError where the shapes differ or the student has no such layers.
    """
    if student.config != teacher.config:
        raise ValueError("calibrate: the student's shape is not the teacher's")
    if not any(isinstance(m, QATLinear) for m in student.modules()):
        raise ValueError("calibrate: the student has no low-bit layers")
    cos, sin = student.cos[: ids.size(1), None], student.sin[: ids.size(1), None]
    theirs = teacher.model.embed_tokens(ids)  # the teacher's residual stream
    x = student.model.embed_tokens(ids)
    for model, block in zip(teacher.model.layers, student.model.layers, strict=True):
        assert isinstance(model, Block)
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        with _outputs(dict(model.named_modules())) as target:
            after = model(theirs, cos, sin, None)[0]

        read = block.input_layernorm(x)
        _calibrate_layers(
            [attention.q_proj, attention.k_proj, attention.v_proj],
            read,
            [target[f"self_attn.{n}"] for n in ("q_proj", "k_proj", "v_proj")],
        )
        read = attention.mix(read, cos, sin, None)[0]
        _calibrate_layers([attention.o_proj], read, [theirs + target["self_attn.o_proj"] - x])
        x = x + attention.o_proj(read)

        read = block.post_attention_layernorm(x)
        wanted = [target["mlp.gate_proj"], target["mlp.up_proj"]]
        _calibrate_layers([mlp.gate_proj, mlp.up_proj], read, wanted)
        read = mlp.gate(read)
        _calibrate_layers([mlp.down_proj], read, [after - x])
        x = x + mlp.down_proj(read)
        theirs = after
    return student
