"""Ternary and 1-bit weights, the straight-through layers that train them, embeddings of 8 and 4
bits.

A weight matrix (out, in) becomes codes x scale: codes in {-1, 0, 1} or {-1, 1}, one scale a row
or one for the matrix (4-bit codes have one for 32). Scales are rounded to bfloat16 *in the forward
pass*, so that what is trained is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowbit.models.decoder import CausalLM
from lowbit.models.interface import LanguageModel, linear_layers

MODES = ("ternary", "1bit", "int8", "int4")
NOMINAL = {"ternary": 1.58, "1bit": 1.0, "int8": 8.0, "int4": 4.0}  # bits a weight, scales apart
SCOPES = ("row", "tensor")
BLOCK = 32  # consecutive entries of a row with one scale, of 4-bit codes
#: What a block's scale may be: its largest entry over minus one of these, which keeps that entry.
#: In many rows it is of the same channel, and to cut it cost more than was gained elsewhere.
DIVISORS = (8.0, 7.0)
SMALLEST_HALF = 2.0**-17  # the smallest scale all of whose 8 bits float16 holds
AT_ONCE = 1 << 18  # entries that are rounded at a time: memory stays small


# ---------------------------------------------------------------------- quantisers: pure tensors


def mean_magnitude(w: torch.Tensor, scope: str) -> torch.Tensor:
    """Mean of |w| a row, (out, 1), or of the matrix, (1, 1), without overflow up to 3e38."""
    dims = (1,) if scope == "row" else (0, 1)
    count = w.size(1) if scope == "row" else w.numel()
    return w.abs().sum(dims, keepdim=True, dtype=torch.float64) / max(count, 1)


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16, as float32 (exact in float16 too between SMALLEST_HALF and 65504)."""
    top = torch.finfo(torch.bfloat16).max
    return scale.clamp(-top, top).to(torch.bfloat16).float()


def ternary_codes(w: torch.Tensor, scope: str = "row") -> tuple[torch.Tensor, torch.Tensor]:
    """w (out, in) -> (codes in {-1, 0, 1} of w's dtype, scale (out, 1) or (1, 1) float32).

    Ternary weight networks (arXiv 1605.04711, eq. 5 and 6): zero where |w| <= 0.7 mean|w|, scale =
    the mean of |w| over what is kept, which is least-squares optimal for these codes.
    """
    dims = (1,) if scope == "row" else (0, 1)
    exact = 0.7 * mean_magnitude(w, scope)
    # Of w's precision, rounded down: the same comparison, without a copy of w in float64.
    threshold = exact.to(w.dtype)
    below = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
    size = w.abs()
    kept = (size > torch.where(threshold > exact, below, threshold)).to(w.dtype)
    total = size.mul_(kept).sum(dims, keepdim=True, dtype=torch.float64)
    count = kept.sum(dims, keepdim=True, dtype=torch.float64)
    return kept.mul_(torch.sign(w)), round_scale(total / count.clamp_min(1))


def sign_codes(w: torch.Tensor, scope: str = "row") -> tuple[torch.Tensor, torch.Tensor]:
    """w (out, in) -> (codes in {-1, 1}, scale): sign (0 counts as +1) and mean |w|.

    XNOR-Net (arXiv 1603.05279, eq. 6).
    """
    return torch.where(w < 0, -1.0, 1.0).to(w.dtype), round_scale(mean_magnitude(w, scope))


def byte_codes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (rows, n) -> (codes in -127..127, scale (rows, 1)): symmetric, one scale a row."""
    scale = round_scale(w.abs().amax(dim=1, keepdim=True) / 127)
    return (w / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127), scale


def nibble_codes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (rows, n) -> (codes in -8..7 (rows, n) int8, scale (rows, n / 32) float32): ggml's Q4_0.

    Of each block's scales, its largest entry over -DIVISORS, the one of the least squared error
    (ggml takes the first). It may be negative: the sign says on which side -8 lies. Scales that
    float16 has not exactly, below 2^-17, become 0. What is rounded already stays as it is.
    """
    rows = max(1, AT_ONCE // w.size(1))
    codes, scales = zip(*(_nibbles(part) for part in w.split(rows)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _nibbles(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _least_error(w.float().reshape(-1, BLOCK))
    # The same values, as they would be found: {7, 0} may be {-8, 0} with another scale.
    codes, scale = _least_error(codes.mul_(scale))
    return codes.to(torch.int8).view(w.shape), scale.view(len(w), -1)


def _least_error(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (m, 32) -> (codes (m, 32), scale (m, 1)); of equal errors the first."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    unit = largest.abs().clamp_min(SMALLEST_HALF)  # squares of 1e38 overflow

    def rounded(divisor: float) -> tuple[torch.Tensor, ...]:
        scale = round_scale(largest / -divisor)
        scale = torch.where(scale.abs() < SMALLEST_HALF, 0, scale)
        codes = (blocks / torch.where(scale != 0, scale, 1)).round_().clamp_(-8, 7)
        error = ((codes * scale - blocks) / unit).square_().sum(1, keepdim=True)
        return error, codes, scale

    best = rounded(DIVISORS[0])
    for divisor in DIVISORS[1:]:
        new = rounded(divisor)
        less = new[0] < best[0]
        best = tuple(torch.where(less, x, y) for x, y in zip(new, best, strict=True))
    return best[1], best[2]


Codes = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Of what is held in so many bits.
HELD_CODES: dict[int, Codes] = {8: byte_codes, 4: nibble_codes}
#: Modes of a few layers that need more than a low bit.
HELD_MODES = {f"int{bits}": codes_of for bits, codes_of in HELD_CODES.items()}


def from_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes x scale, of the codes' shape. Each of the scales, in any shape, is for the same number
    of consecutive codes. Codes that are floats are overwritten by the result."""
    values, scale = codes.view(scale.numel(), -1), scale.view(-1, 1)
    return (values.mul_(scale) if codes.is_floating_point() else values * scale).view_as(codes)


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantised weights. Backward: identity (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, w, quantized):
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _LearnedScale(torch.autograd.Function):
    """Learned step size (LSQ, arXiv 1902.08153, eq. 3) for ternary and 1-bit codes.

    dL/dw is zero outside the clipping range (ternary) and straight-through inside; dL/ds is
    scaled by 1/sqrt(weights a scale).
    """

    @staticmethod
    def forward(ctx, w, scale, mode):
        u = w / scale
        codes = u.clamp(-1, 1).round() if mode == "ternary" else torch.where(w < 0, -1.0, 1.0)
        ctx.save_for_backward(u, codes, scale)
        ctx.mode = mode
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        u, codes, scale = ctx.saved_tensors
        inside = u.abs() <= 1
        slope = codes - u * inside if ctx.mode == "ternary" else codes
        dims = [d for d in range(2) if scale.size(d) == 1]
        count = u.numel() / scale.numel()
        d_scale = (grad * slope).sum(dims, keepdim=True) / count**0.5
        return (grad * inside if ctx.mode == "ternary" else grad), d_scale, None


# ---------------------------------------------------------------------------------------- layers


class QATLinear(nn.Linear):
    """A linear layer whose forward pass uses ternary, 1-bit, 8-bit or 4-bit weights (modes int8 and
    int4, for the few layers that need more); `weight` is the latent.

    mode: one of MODES; scope: what one scale is for, a "row" or the whole "tensor". ValueError for
    others, and for int8 and int4 with a scope or scales of another kind than theirs.

    Below strength 1 (see `strength`) it uses weight + strength (rounded weight - weight).
    With learnable_scale the scale is ``base_scale * weight_scale``: base_scale (a buffer) is the
    closed-form scale at conversion, weight_scale a parameter that starts at 1. Ternary codes are
    then round(w / scale), clipped, as LSQ has them, where the closed form has a threshold of 0.7
    mean |w|.
    """

    base_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mode: str = "ternary",
        scope: str = "row",
        learnable_scale: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if mode not in MODES or scope not in SCOPES:
            raise ValueError(f"mode is one of {MODES} and scope one of {SCOPES}")
        if mode in HELD_MODES and (scope != "row" or learnable_scale):
            raise ValueError(f"{mode} has scales of its own, in closed form")
        self.mode, self.scope, self.enabled, self.strength = mode, scope, True, 1.0
        self.fixed = False  # the weight is rounded, and stays (see `fix_high_bits`)
        self.kept: dict[str, torch.Tensor] | None = None  # of `rounded_once`
        if learnable_scale:
            shape = (out_features, 1) if scope == "row" else (1, 1)
            self.weight_scale = nn.Parameter(torch.ones(shape))
            self.register_buffer("base_scale", torch.ones(shape))
        else:
            self.register_parameter("weight_scale", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mode: str, scope: str, learnable: bool) -> QATLinear:
        """A layer with the weight and bias of this one, not copies of them."""
        new = cls(
            linear.in_features,
            linear.out_features,
            mode=mode,
            scope=scope,
            learnable_scale=learnable,
            bias=linear.bias is not None,
        )
        new.weight = linear.weight
        new.bias = linear.bias
        new.to(linear.weight.device)
        if learnable:
            with torch.no_grad():
                new.base_scale.copy_(new._closed_form()[1].clamp_min(1e-8))
        return new

    def _closed_form(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mode in HELD_MODES:
            return HELD_MODES[self.mode](self.weight.detach())
        quantize = ternary_codes if self.mode == "ternary" else sign_codes
        return quantize(self.weight, self.scope)

    def _learned(self) -> torch.Tensor:
        scale = (self.base_scale * self.weight_scale).abs().clamp_min(1e-8)
        return scale + (round_scale(scale) - scale).detach()

    @torch.no_grad()
    def codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (out, in), scale (out, 1) or (1, 1), of int4 (out, in / 32)): what the file
        stores."""
        if self.weight_scale is None:
            return self._closed_form()
        scale = self._learned()
        if self.mode == "ternary":
            return (self.weight / scale).clamp(-1, 1).round(), scale
        return torch.where(self.weight < 0, -1.0, 1.0), scale

    def quantized_weight(self) -> torch.Tensor:
        """codes x scale (out, in), differentiable in the latent (and the learned scale)."""
        if not self.enabled or self.strength == 0:
            return self.weight
        if self.weight_scale is not None:
            rounded = _LearnedScale.apply(self.weight, self._learned(), self.mode)
            return rounded if self.strength == 1 else self.weight.lerp(rounded, self.strength)
        return _StraightThrough.apply(self.weight, self._rounded())

    @torch.no_grad()
    def _rounded(self) -> torch.Tensor:
        if self.kept and "weight" in self.kept:
            return self.kept["weight"]
        quantized = self.weight if self.fixed else from_codes(*self._closed_form())
        if self.strength < 1:
            quantized = torch.lerp(self.weight, quantized, self.strength)
        if self.kept is not None:
            # What autocast would make of it, at every use.
            kind = quantized.device.type
            if torch.is_autocast_enabled(kind):
                quantized = quantized.to(torch.get_autocast_dtype(kind))
            self.kept["weight"] = quantized
        return quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.quantized_weight(), self.bias)


class QATEmbedding(nn.Embedding):
    """An embedding held in 8 bits a weight, one scale a row, straight-through."""

    enabled = True

    def codes_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        return byte_codes(self.weight.detach())

    def quantized_weight(self) -> torch.Tensor:
        if not self.enabled:
            return self.weight
        return _StraightThrough.apply(self.weight, from_codes(*self.codes_and_scale()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.quantized_weight())


# ------------------------------------------------------------------------------------- conversion


def block_layers(model: LanguageModel) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by the number of their block and their name in it, such as
    "0.mlp.up_proj"."""
    return {
        f"{i}.{name}": layer
        for i, block in enumerate(model.blocks)
        for name, layer in linear_layers(block).items()
    }


def edge_layers(model: LanguageModel, first: int, last: int = 0) -> list[str]:
    """Names of the layers in the first and the last so many blocks."""
    start = len(model.blocks) - last
    numbers = {n: int(n.partition(".")[0]) for n in block_layers(model)}
    return [n for n, i in numbers.items() if i < first or i >= start]


def quantize_model(
    model: LanguageModel,
    mode: str,
    *,
    scope: str = "row",
    learnable_scale: bool = False,
    more: Collection[str] = (),
    high_bits: int = 8,
    embedding_bits: int = 8,
) -> LanguageModel:
    """Replace, in place, every linear layer of the blocks by `QATLinear`, and the embedding of the
    plain decoder by `QATEmbedding`, whose untied head stays float. Latent parameters keep their
    names and identity. Returns the model.

    mode, scope, learnable_scale: as of `QATLinear`. Layers named in ``more``, as `block_layers`
    names them, have ``high_bits`` instead, 8 or 4. Embedding and head of other decoders than the
    plain one are held in ``embedding_bits``, 8 or 4, frozen. ValueError for what `QATLinear`
    refuses.
    """
    low, high = (mode, scope, learnable_scale), (f"int{high_bits}", "row", False)
    for name, layer in block_layers(model).items():
        block, _, path = name.partition(".")
        rounds = QATLinear.from_linear(layer, *(high if name in more else low))
        model.blocks[int(block)].set_submodule(path, rounds)
    if isinstance(model, CausalLM):
        old = model.embedding
        new = QATEmbedding(old.num_embeddings, old.embedding_dim, _weight=old.weight)
        new.weight = old.weight
        model.model.embed_tokens = new
    else:
        for held in (model.embedding, model.output):
            if held is not None:
                hold(held, embedding_bits)
    return model


@torch.no_grad()
def hold(layer: nn.Embedding | nn.Linear, bits: int) -> None:
    """Round a layer's weight to 8 bits, one scale a row, or to 4, one for 32 entries, and freeze
    it: of a large vocabulary a short run sees too little to train the embedding, and so rounding
    costs nothing a step."""
    _round(layer.weight, HELD_CODES[bits])
    layer.held_bits = bits  # type: ignore[assignment]


@torch.no_grad()
def fix_high_bits(model: nn.Module) -> None:
    """Round what `QATLinear` layers hold in 8 or 4 bits, and freeze it. They are the matrices whose
    changes the loss feels most, and steps of the others' length only shake them."""
    for _, layer in low_bit_layers(model):
        if isinstance(layer, QATLinear) and layer.mode in HELD_MODES:
            _round(layer.weight, HELD_MODES[layer.mode])
            layer.fixed = True


def _round(weight: torch.Tensor, codes_of: Codes) -> None:
    """In place, some rows at a time, and frozen."""
    for rows in weight.split(max(1, AT_ONCE // weight.size(1))):
        rows.copy_(from_codes(*codes_of(rows)))
    weight.requires_grad_(False)


def low_bit_layers(model: nn.Module) -> Iterator[tuple[str, QATLinear | QATEmbedding]]:
    for name, module in model.named_modules():
        if isinstance(module, (QATLinear, QATEmbedding)):
            yield name, module


def held_layers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and bits of what `hold` froze."""
    for name, module in model.named_modules():
        bits = getattr(module, "held_bits", None)
        if isinstance(bits, int):
            yield name, bits


@contextmanager
def latent(model: nn.Module) -> Iterator[None]:
    """Inside, quantised layers use their full-precision latent weights."""
    layers = [m for _, m in low_bit_layers(model)]
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m in layers:
            m.enabled = True


@contextmanager
def strength(model: nn.Module, value: float) -> Iterator[None]:
    """Inside, weights of linear layers are rounded by this share of the way, 0 to 1: a warm-up of
    quantisation. Codes, files and embeddings are not concerned."""
    layers = [m for _, m in low_bit_layers(model) if isinstance(m, QATLinear)]
    for m in layers:
        m.strength = value
    try:
        yield
    finally:
        for m in layers:
            m.strength = 1.0


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Inside, each linear layer rounds its weights at the first forward pass and keeps them for
    the next ones, so the weights must not change: the passes of one training step."""
    layers = [m for _, m in low_bit_layers(model) if isinstance(m, QATLinear)]
    for m in layers:
        m.kept = {}
    try:
        yield
    finally:
        for m in layers:
            m.kept = None


@torch.no_grad()
def snapshot_codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """int8 codes of every ternary or 1-bit layer, to count flips with `count_flips`."""
    return {
        n: m.codes_and_scale()[0].to(torch.int8)
        for n, m in low_bit_layers(model)
        if isinstance(m, QATLinear) and m.mode not in HELD_MODES
    }


@torch.no_grad()
def count_flips(model: LanguageModel, codes: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Of each block: how many of its codes differ from a snapshot, which then becomes today's, and
    how many there are."""
    names: dict[nn.Module, str] = {layer: name for name, layer in low_bit_layers(model)}
    found = []
    for block in model.blocks:
        changed, count = torch.zeros((), dtype=torch.int64), 0
        for layer in block.modules():
            name = names.get(layer)
            if name in codes and isinstance(layer, QATLinear):
                now = layer.codes_and_scale()[0].to(torch.int8)
                changed += (now != codes[name]).sum().cpu()
                count += now.numel()
                codes[name] = now
        found.append((int(changed), count))
    return found


def bits_of_blocks(model: LanguageModel) -> list[float]:
    """Bits a weight of each block's low-bit layers in the mean, scales apart."""
    found = []
    for block in model.blocks:
        layers = [m for m in block.modules() if isinstance(m, QATLinear)]
        total = sum(m.weight.numel() for m in layers)
        found.append(sum(NOMINAL[m.mode] * m.weight.numel() for m in layers) / max(1, total))
    return found
