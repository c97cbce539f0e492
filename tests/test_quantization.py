"""Quantisers against float64 references, their gradients, and model conversion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toys import LINEAR_NAMES

from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import (
    AT_ONCE,
    DIVISORS,
    HELD_CODES,
    QATEmbedding,
    QATLinear,
    byte_codes,
    count_flips,
    held_layers,
    hold,
    latent,
    low_bit_layers,
    nibble_codes,
    quantize_model,
    round_scale,
    sign_codes,
    snapshot_codes,
    strength,
    ternary_codes,
)

BF16_ULP = 2.0**-7  # 8 significant bits: rounding errs by at most half of this, relatively
SMALL = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def bf16(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).to(torch.bfloat16).double().item()


def groups(w: torch.Tensor, scope: str) -> list[np.ndarray]:
    """The weights that share a scale, in float64."""
    a = w.double().numpy()
    return list(a) if scope == "row" else [a.ravel()]


@st.composite
def matrices(draw, low: int = -8, high: int = 8) -> torch.Tensor:
    """Small matrices of gaussian rows of very different sizes, some of them zero."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 33))
    w = gaussian(rows, columns, draw(st.integers(0, 10_000)))
    w = w * torch.tensor([[2.0 ** draw(st.integers(low, high))] for _ in range(rows)])
    if draw(st.booleans()):
        w = w * (gaussian(rows, columns, 1) > 0)
    return w


# ------------------------------------------------------------------------- codes and scales


@pytest.mark.parametrize("scope", ["row", "tensor"])
@given(w=matrices())
def test_ternary_matches_naive(w: torch.Tensor, scope: str) -> None:
    """Threshold 0.7 mean|w|; the scale is the mean of |w| over what is kept, in bfloat16."""
    codes, scale = ternary_codes(w, scope)
    flat = codes.reshape(1, -1) if scope == "tensor" else codes
    assert scale.shape == ((len(w), 1) if scope == "row" else (1, 1))
    for row, got, s in zip(groups(w, scope), flat.numpy(), scale.ravel().tolist(), strict=True):
        threshold = 0.7 * sum(abs(x) for x in row) / len(row)
        clear = np.abs(np.abs(row) - threshold) > 1e-12 * threshold
        want = np.sign(row) * (np.abs(row) > threshold)
        assert (got == want)[clear].all()
        kept = [abs(x) for x, c in zip(row, got, strict=True) if c]
        assert s == pytest.approx(bf16(math.fsum(kept) / max(1, len(kept))), rel=1e-6)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@given(w=matrices())
def test_sign_matches_naive(w: torch.Tensor, scope: str) -> None:
    """+1 for zero; the scale is mean|w| in bfloat16."""
    codes, scale = sign_codes(w, scope)
    assert torch.equal(codes, torch.where(w >= 0, 1.0, -1.0))
    for row, s in zip(groups(w, scope), scale.ravel().tolist(), strict=True):
        assert s == pytest.approx(bf16(math.fsum(map(abs, row)) / len(row)), rel=1e-6)


@given(w=matrices())
def test_byte_matches_naive(w: torch.Tensor) -> None:
    """Scale max|w| / 127 in bfloat16, codes the nearest whole numbers, error within scale/2."""
    codes, scale = byte_codes(w)
    for row, got, s in zip(w.double().numpy(), codes.numpy(), scale.ravel().tolist(), strict=True):
        assert s == pytest.approx(bf16(np.abs(row).max() / 127), rel=BF16_ULP)
        assert np.abs(got).max() <= 127
        assert (got == np.round(got)).all()
        assert (np.abs(row - got * s) <= s * (0.5 + 1e-4)).all()


def test_ternary_by_hand() -> None:
    """Row (4, -1, 0.5, -2.5): mean 2, threshold 1.4, kept 4 and -2.5, scale 3.25."""
    codes, scale = ternary_codes(torch.tensor([[4.0, -1.0, 0.5, -2.5], [0.0, 0.0, 0.0, 8.0]]))
    assert codes.tolist() == [[1, 0, 0, -1], [0, 0, 0, 1]]
    assert scale.tolist() == [[3.25], [8.0]]


@pytest.mark.parametrize("scope", ["row", "tensor"])
@given(w=matrices())
def test_codes_are_allowed_and_scales_sound(w: torch.Tensor, scope: str) -> None:
    """Codes stay in their set; scales are finite, not negative and exact in bfloat16."""
    for (codes, scale), allowed in (
        (ternary_codes(w, scope), (-1, 0, 1)),
        (sign_codes(w, scope), (-1, 1)),
        (byte_codes(w), tuple(range(-127, 128))),
    ):
        assert codes.shape == w.shape
        assert set(codes.unique().tolist()) <= set(allowed)
        assert torch.isfinite(scale).all()
        assert (scale >= 0).all()
        assert scale.dtype == torch.float32
        assert torch.equal(scale, round_scale(scale))


@pytest.mark.parametrize("quantize", [ternary_codes, sign_codes, byte_codes])
@given(w=matrices(), power=st.integers(-40, 40))
def test_scaling_by_powers_of_two_is_exact(quantize, w: torch.Tensor, power: int) -> None:
    """2^k w has the codes of w and 2^k times its scales."""
    codes, scale = quantize(w)
    scaled_codes, scaled = quantize(w * 2.0**power)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale * 2.0**power, scaled)


@pytest.mark.parametrize("quantize", [ternary_codes, sign_codes, byte_codes])
@given(w=matrices(), seed=st.integers(0, 100))
def test_rows_are_independent(quantize, w: torch.Tensor, seed: int) -> None:
    """Permuting rows permutes codes and scales."""
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize(w)
    permuted_codes, permuted_scale = quantize(w[order])
    assert torch.equal(codes[order], permuted_codes)
    assert torch.equal(scale[order], permuted_scale)


@given(w=matrices())
def test_ternary_and_byte_are_odd(w: torch.Tensor) -> None:
    """-w has the negated codes and the same scales."""
    for quantize in (ternary_codes, byte_codes):
        codes, scale = quantize(w)
        negated, same = quantize(-w)
        assert torch.equal(codes, -negated)
        assert torch.equal(scale, same)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@given(w=matrices())
def test_scales_are_least_squares_optimal(w: torch.Tensor, scope: str) -> None:
    """Of ||w - s c||^2 in s, up to bfloat16: a step of more than an ulp either way is worse."""
    for quantize in (ternary_codes, sign_codes):
        codes, scale = quantize(w, scope)
        flat = codes.double().numpy().reshape(len(scale), -1)
        for row, c, s in zip(groups(w, scope), flat, scale.ravel().tolist(), strict=True):
            if not c.any() or not row.any():
                continue
            best = (row @ c) / (c @ c)
            assert abs(s - best) <= best * BF16_ULP / 2 * 1.0001
            error = ((row - s * c) ** 2).sum()
            for other in (s * (1 - 2 * BF16_ULP), s * (1 + 2 * BF16_ULP)):
                assert error <= ((row - other * c) ** 2).sum()


# -------------------------------------------------------------------------- hostile weights

HOSTILE = {
    "zero": torch.zeros(3, 7),
    "negative zero": -torch.zeros(3, 7),
    "constant": torch.full((3, 7), -0.3),
    "denormal": torch.full((3, 7), 1e-41) * torch.tensor([1.0, -1, 1, -1, 1, 1, -1]),
    "smallest": torch.full((2, 3), 1e-45),
    "huge": torch.full((3, 7), 1e38),
    "huge row": gaussian(3, 4096).clamp(-3, 3) * 1e38,
    "mixed sizes": torch.tensor([[1e38, 1e-38, 0.0, -1.0]]),
    "one column": gaussian(5, 1),
    "one row": gaussian(1, 5),
    "odd width": gaussian(3, 13),
    "one outlier": torch.cat((torch.zeros(2, 99), torch.full((2, 1), 5.0)), dim=1),
}


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("w", HOSTILE.values(), ids=HOSTILE)
def test_hostile_weights(w: torch.Tensor, scope: str) -> None:
    """Codes stay in their sets, scales and products stay finite, nothing is flipped."""
    for codes, scale, top in (
        (*ternary_codes(w, scope), 1),
        (*sign_codes(w, scope), 1),
        (*byte_codes(w), 127),
    ):
        assert torch.isfinite(codes).all()
        assert codes.abs().max() <= top
        assert torch.isfinite(scale).all()
        assert (scale >= 0).all()
        assert torch.isfinite(codes * scale).all()
        assert (codes * w >= 0).all()


def test_all_zero_rows_stay_zero() -> None:
    """Each quantiser gives back zeros, not NaN."""
    for quantize in (ternary_codes, sign_codes, byte_codes):
        codes, scale = quantize(torch.zeros(2, 5))
        assert torch.equal(codes * scale, torch.zeros(2, 5))


def test_constant_and_single_weights_are_reproduced() -> None:
    """Rows of one magnitude come back up to the scale's rounding."""
    for w in (HOSTILE["constant"], HOSTILE["one column"], HOSTILE["huge"]):
        for quantize in (ternary_codes, sign_codes):
            codes, scale = quantize(w)
            torch.testing.assert_close(codes * scale, w, rtol=BF16_ULP / 2, atol=0)


# ----------------------------------------------------------------------------- held in 4 bits


def restored(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (codes.view(scale.numel(), -1) * scale.view(-1, 1)).view(codes.shape)


@given(w=matrices(-4, 8))
def test_nibbles_are_the_best_of_the_scales(w: torch.Tensor) -> None:
    """No scale that may be chosen has a smaller squared error, in float64, and codes are the
    nearest."""
    blocks = torch.nn.functional.pad(w, (0, 64 - w.size(1))).view(-1, 32)
    codes, scale = nibble_codes(blocks)
    assert codes.shape == blocks.shape
    assert codes.dtype == torch.int8
    for row, c, s in zip(blocks.double().numpy(), codes.numpy(), scale[:, 0].tolist(), strict=True):
        largest = row[np.abs(row).argmax()]
        errors = []
        for divisor in DIVISORS:
            d = bf16(torch.tensor(-largest / divisor).float().item())
            nearest = np.clip(np.round(row / d), -8, 7) if d else 0 * row
            errors.append(((row - nearest * d) ** 2).sum())
        assert ((row - c * s) ** 2).sum() <= min(errors) * (1 + 1e-4) + 1e-12 * (row**2).sum()
        assert (np.abs(c) <= 8).all()
        assert c.max() <= 7
        free = np.abs(row) <= 7 * abs(s)
        assert (np.abs(row - c * s)[free] <= abs(s) * (0.5 + 1e-4)).all()


AWKWARD = st.sampled_from(
    [
        *(0.0, -0.0, 1e-45, -1e-41, 2.0**-24, -6e-5, 7e-5, 2.0**-14, -1e-3, 1.0, -1.0, 0.875),
        *(
            7.0,
            8.0,
            -8.0,
            65504.0,
            -1e6,
            1e38,
            -1e38,
            3.4028234663852886e38,
            -3.4028234663852886e38,
        ),
    ]
)


@given(
    w=hnp.arrays(np.float32, (4, 64), elements=AWKWARD)
    | hnp.arrays(np.float32, (4, 64), elements=st.floats(-1, 1, width=32))
    | hnp.arrays(np.float32, (4, 64), elements=st.integers(-9, 9), fill=st.just(0))
)
def test_nibbles_rounded_again_are_the_same(w: np.ndarray) -> None:
    """The file derives codes from what a layer holds: codes and scales must be found again."""
    codes, scale = nibble_codes(torch.from_numpy(w))
    held = restored(codes, scale)
    assert torch.isfinite(held).all()
    again, same = nibble_codes(held)
    assert torch.equal(again, codes)
    assert torch.equal(same, scale)
    small = scale[scale.abs() <= 65504]
    assert torch.equal(small, small.half().float())
    assert torch.equal(scale, round_scale(scale))


@pytest.mark.parametrize("power", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_nibbles_err_less_than_ggmls(power: float, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    w = gaussian(64, 576, seed) * power
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))
    ours = restored(*nibble_codes(w))
    assert (ours - w).square().sum() < 0.99 * (theirs - w).square().sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_held_layers(bits: int) -> None:
    """Frozen, rounded in parts as in the whole, known by name, and not moved by a second time."""
    layer = nn.Embedding(2 * AT_ONCE // 64 + 3, 64)
    before = layer.weight.detach().clone()
    hold(layer, bits)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, restored(*HELD_CODES[bits](before)))
    assert list(held_layers(nn.Sequential(nn.Linear(2, 2), layer))) == [("1", bits)]
    held = layer.weight.clone()
    hold(layer, bits)
    assert torch.equal(layer.weight, held)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nibbles_hide_no_broken_weight(value: float) -> None:
    """The writer refuses what is not finite, and so must see it."""
    layer = nn.Linear(32, 2)
    with torch.no_grad():
        layer.weight[1, 3] = value
    hold(layer, 4)
    assert torch.isfinite(layer.weight).all(dim=1).tolist() == [True, False]


# -------------------------------------------------------------------------------- gradients


def quantized_layer(mode: str, scope: str, learnable: bool, seed: int = 0) -> QATLinear:
    linear = nn.Linear(9, 5, bias=False)
    with torch.no_grad():
        linear.weight.copy_(gaussian(5, 9, seed))
    layer = QATLinear.from_linear(linear, mode, scope, learnable)
    if learnable:
        with torch.no_grad():
            layer.weight_scale.mul_(1 + 0.3 * gaussian(*layer.weight_scale.shape, seed + 1).tanh())
    return layer


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
def test_straight_through_gradient_is_identity(mode: str, scope: str) -> None:
    """The latent gets exactly the gradient of the quantised weight."""
    layer = quantized_layer(mode, scope, False)
    upstream = gaussian(5, 9, 7)
    layer.quantized_weight().backward(upstream)
    assert torch.equal(layer.weight.grad, upstream)


def test_layer_gradients_are_a_linear_layers() -> None:
    """dL/dx uses the quantised weights, dL/dw is the outer product as in a plain layer."""
    layer = quantized_layer("ternary", "row", False)
    x = gaussian(4, 9, 2).requires_grad_(True)
    upstream = gaussian(4, 5, 3)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.quantized_weight().detach())
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x.detach())


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
@pytest.mark.parametrize("seed", range(5))
def test_learned_scale_gradient(mode: str, scope: str, seed: int) -> None:
    """LSQ (arXiv 1902.08153, eq. 3) in float64: round(u) - u inside, sign outside."""
    layer = quantized_layer(mode, scope, True, seed)
    upstream = gaussian(5, 9, seed + 50)
    layer.quantized_weight().backward(upstream)

    w, g = layer.weight.detach().double().numpy(), upstream.double().numpy()
    base = layer.base_scale.double().numpy()
    scale = layer.codes_and_scale()[1].double().numpy()
    u = w / scale
    inside = np.abs(u) < 1
    if mode == "ternary":
        slope = np.where(inside, np.round(u) - u, np.sign(u))
        want_w = g * inside
    else:
        slope = np.where(u < 0, -1.0, 1.0)
        want_w = g
    axes = 1 if scope == "row" else (0, 1)
    count = w.size / scale.size
    want_s = (g * slope).sum(axes, keepdims=True) / math.sqrt(count) * base
    np.testing.assert_allclose(layer.weight.grad.numpy(), want_w, rtol=1e-6)
    np.testing.assert_allclose(layer.weight_scale.grad.numpy(), want_s, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["ternary", "1bit"])
def test_learned_scale_descends(mode: str) -> None:
    """A small step along the gradient of ||x - w_q||^2 lowers it."""
    layer = quantized_layer(mode, "row", True)
    target = layer.quantized_weight().detach() * 1.2

    def loss() -> torch.Tensor:
        return (layer.quantized_weight() - target).square().sum()

    before = loss()
    before.backward()
    with torch.no_grad():
        layer.weight_scale -= 0.05 * layer.weight_scale.grad
    assert loss() < before


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
@pytest.mark.parametrize("learnable", [False, True])
def test_codes_and_scale_are_the_forward_pass(mode: str, scope: str, learnable: bool) -> None:
    """What the file stores multiplies to exactly the weights that the forward pass uses."""
    for seed in range(5):
        layer = quantized_layer(mode, scope, learnable, seed)
        codes, scale = layer.codes_and_scale()
        assert torch.equal(codes * scale, layer.quantized_weight().detach())
        assert torch.equal(scale, round_scale(scale))


def test_learned_scale_starts_at_the_closed_form() -> None:
    """Conversion sets the closed-form scale; the parameter is a factor of 1 on it."""
    w = gaussian(5, 9)
    linear = nn.Linear(9, 5, bias=False)
    linear.weight = nn.Parameter(w)
    layer = QATLinear.from_linear(linear, "ternary", "row", True)
    assert torch.equal(layer.codes_and_scale()[1], ternary_codes(w)[1])
    assert torch.equal(layer.weight_scale, torch.ones(5, 1))


@pytest.mark.parametrize("learnable", [False, True])
def test_bias_survives_conversion(learnable: bool) -> None:
    """The bias is the same parameter, added after the quantised product."""
    linear = nn.Linear(9, 5)
    layer = QATLinear.from_linear(linear, "ternary", "row", learnable)
    assert layer.bias is linear.bias
    x = gaussian(2, 9)
    torch.testing.assert_close(layer(x), x @ layer.quantized_weight().T + linear.bias)


@pytest.mark.parametrize("bad", [dict(mode="2bit"), dict(scope="column")])
def test_unknown_mode_or_scope(bad: dict) -> None:
    with pytest.raises(ValueError, match="mode is one of"):
        QATLinear(4, 4, **bad)


# ------------------------------------------------------------------------------- conversion


def small_model(tied: bool = True) -> CausalLM:
    config = ModelConfig(**{**SMALL.to_dict(), "tie_word_embeddings": tied})
    return CausalLM(config).initialise(0)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
@pytest.mark.parametrize("tied", [True, False])
def test_conversion_keeps_parameters(mode: str, learnable: bool, tied: bool) -> None:
    """Every parameter keeps its name and is the same object; only scales are new."""
    model = small_model(tied)
    before = dict(model.named_parameters())
    quantize_model(model, mode, learnable_scale=learnable)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    new = after.keys() - before.keys()
    layers = dict(low_bit_layers(model))
    linears = {n for n, m in layers.items() if isinstance(m, QATLinear)}
    assert new == ({f"{n}.weight_scale" for n in linears} if learnable else set())
    assert {n.split(".")[-1] for n in linears} == set(LINEAR_NAMES)
    assert len(linears) == 7 * SMALL.num_hidden_layers
    assert layers.keys() - linears == {"model.embed_tokens"}
    assert tied or type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("learnable", [False, True])
@torch.no_grad()
def test_latent_restores_the_float_forward(learnable: bool) -> None:
    """Inside `latent` logits are exactly the float model's; outside they are not."""
    model = small_model()
    ids = torch.arange(20).reshape(2, 10)
    plain = model(ids).logits
    quantize_model(model, "ternary", learnable_scale=learnable)
    quantized = model(ids).logits
    with latent(model):
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, quantized)
    assert not torch.allclose(quantized, plain)
    with pytest.raises(RuntimeError, match="inside"), latent(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, quantized)


@pytest.mark.parametrize("mode", ["ternary", "1bit"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_strength_rounds_a_share_of_the_way(mode: str, learnable: bool, share: float) -> None:
    """The weight that the layer uses lies between latent and rounded; gradients go straight
    through where scales are closed forms; codes and what comes after are not concerned."""
    layer = QATLinear.from_linear(nn.Linear(16, 8, bias=False), mode, "row", learnable)
    model = nn.Sequential(layer)
    rounded = layer.quantized_weight().detach()
    codes = layer.codes_and_scale()[0]
    with strength(model, share):
        used = layer.quantized_weight()
        assert torch.equal(layer.codes_and_scale()[0], codes)
    w = layer.weight.detach()
    torch.testing.assert_close(used.detach(), w + share * (rounded - w))
    (used * gaussian(8, 16)).sum().backward()
    if not learnable:
        torch.testing.assert_close(layer.weight.grad, gaussian(8, 16))
    assert torch.equal(layer.quantized_weight(), rounded)
    with pytest.raises(RuntimeError, match="inside"), strength(model, share):
        raise RuntimeError("inside")
    assert layer.strength == 1


@given(rows=matrices())
def test_embedding_is_within_half_a_scale(rows: torch.Tensor) -> None:
    """8-bit rows differ from the latent by at most scale/2; lookups and gradients agree."""
    embedding = QATEmbedding(*rows.shape, _weight=rows.clone())
    value = embedding(torch.arange(len(rows)))
    _, scale = embedding.codes_and_scale()
    assert ((value - rows).abs() <= scale * (0.5 + 1e-4)).all()
    value.sum().backward()
    assert torch.equal(embedding.weight.grad, torch.ones_like(rows))


@torch.no_grad()
def test_tied_head_uses_the_quantized_embedding() -> None:
    """The logits are products with the 8-bit rows, not with the latent ones."""
    model = quantize_model(small_model(), "ternary")
    x = gaussian(3, 16)
    rows = model.model.embed_tokens.quantized_weight()
    assert torch.equal(model.head(x), x @ rows.T)
    assert not torch.equal(rows, model.model.embed_tokens.weight)


def test_flips_are_counted() -> None:
    """Negating one of 14 equal layers flips its nonzero codes and no other."""
    model = quantize_model(small_model(), "1bit")
    codes = snapshot_codes(model)
    totals = [sum(c.numel() for n, c in codes.items() if f".{i}." in n) for i in range(2)]
    assert count_flips(model, codes) == [(0, totals[0]), (0, totals[1])]
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight.neg_()
    assert count_flips(model, codes) == [(0, totals[0]), (layer.weight.numel(), totals[1])]
    assert count_flips(model, codes) == [(0, totals[0]), (0, totals[1])]  # since the last count
