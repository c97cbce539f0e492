"""Second-order rounding against closed forms, brute force and rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization import calibration
from lowbit.quantization.calibration import calibrate, fit_scale, latent_weights, round_columns
from lowbit.quantization.layers import (
    QATLinear,
    edge_layers,
    quantize_model,
    sign_codes,
    ternary_codes,
)
from lowbit.training.losses import distillation_terms

QUANTIZE = {"ternary": ternary_codes, "1bit": sign_codes}


def problem(seed: int, outputs: int = 12, inputs: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (O, I) and the second moment (I, I) of strongly correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g) + 2 * torch.randn(inputs, 1, generator=g)
    return torch.randn(outputs, inputs, generator=g), mix @ mix.T / inputs


def error(codes: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> float:
    """E ||(s codes - w) x||^2 over rows."""
    d = (codes * scale - w).double()
    return float(((d @ h.double()) * d).sum())


@pytest.mark.parametrize("mode", QUANTIZE)
def test_uncorrelated_inputs_are_rounded_to_nearest(mode):
    w, _ = problem(0)
    scale = QUANTIZE[mode](w)[1]
    codes = round_columns(w, torch.eye(16), scale, mode)
    if mode == "1bit":
        assert torch.equal(codes, sign_codes(w)[0])
    else:
        assert torch.equal(codes, (w / scale).round().clamp(-1, 1))


@pytest.mark.parametrize("mode", QUANTIZE)
@pytest.mark.parametrize("seed", range(5))
def test_correlated_inputs_gain_by_second_order(mode, seed, monkeypatch):
    monkeypatch.setattr(calibration, "DAMPING", 0.01)
    w, h = problem(seed, outputs=64)
    nearest, scale = QUANTIZE[mode](w)
    codes = round_columns(w, h, scale, mode)
    assert error(codes, scale, w, h) < 0.8 * error(nearest, scale, w, h)


def test_last_column_is_optimal_given_the_others(monkeypatch):
    """Two inputs: the first is rounded to nearest, the second to what then is best."""
    monkeypatch.setattr(calibration, "DAMPING", 0.0)
    h = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    g = torch.Generator().manual_seed(1)
    w = torch.randn(200, 2, generator=g)
    scale = torch.ones(200, 1)
    codes = round_columns(w, h, scale, "ternary")
    assert torch.equal(codes[:, 0], w[:, 0].round().clamp(-1, 1))
    for row, c in zip(w, codes, strict=True):
        costs = {}
        for last in (-1.0, 0.0, 1.0):
            d = torch.tensor([c[0], last]) - row
            costs[last] = float(d @ h @ d)
        assert costs[float(c[1])] == pytest.approx(min(costs.values()), abs=1e-5)


def test_blocks_do_not_change_the_result(monkeypatch):
    w, h = problem(3, inputs=40)
    scale = ternary_codes(w)[1]
    found = []
    for block in (1, 7, 64):
        monkeypatch.setattr(calibration, "BLOCK", block)
        found.append(round_columns(w, h, scale, "ternary"))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(found))


def test_scale_is_least_squares():
    w, h = problem(4)
    codes, _ = ternary_codes(w)
    best = fit_scale(codes, w, h)
    for factor in (0.99, 1.01):
        assert error(codes, best, w, h) < error(codes, best * factor, w, h)
    assert (fit_scale(torch.zeros_like(codes), w, h) > 0).all()


@given(st.integers(0, 10_000), st.sampled_from(sorted(QUANTIZE)))
def test_latent_weights_quantise_to_what_was_asked(seed, mode):
    """Random codes that disagree with w in many places, random scales."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 32, generator=g)
    codes = QUANTIZE[mode](w)[0]
    wrong = torch.rand(w.shape, generator=g) < 0.2
    other = torch.randint(0, 2, w.shape, generator=g).float() * 2 - 1
    codes = torch.where(wrong, other, codes)
    scale = torch.rand(6, 1, generator=g) + 0.1
    latent = latent_weights(codes, scale, w, mode)
    got, got_scale = QUANTIZE[mode](latent)
    assert torch.equal(got, codes)
    torch.testing.assert_close(got_scale, scale, rtol=2**-8, atol=0)  # bfloat16


def small_models(mode: str) -> tuple[CausalLM, CausalLM, torch.Tensor]:
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=32
    )
    teacher, student = CausalLM(config).initialise(0), CausalLM(config)
    student.load_state_dict(teacher.state_dict())
    ids = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(0))
    return teacher, quantize_model(student, mode), ids


@pytest.mark.parametrize("mode", QUANTIZE)
def test_a_calibrated_student_is_closer_to_its_teacher(mode):
    teacher, student, ids = small_models(mode)
    other = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(1))

    def kl() -> float:
        with torch.no_grad():
            a, b = student(other).logits, teacher(other).logits
        return float(distillation_terms(a, b, other, 1.0)[1].mean())

    before = kl()
    names = {n: p.shape for n, p in student.named_parameters()}
    calibrate(student, teacher, [ids])
    assert kl() < 0.85 * before  # random weights and ids: little to gain
    assert {n: p.shape for n, p in student.named_parameters()} == names
    for m in student.modules():
        if isinstance(m, QATLinear):
            assert torch.isfinite(m.weight).all()
            assert set(m.codes_and_scale()[0].unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_teacher_is_left_alone():
    teacher, student, ids = small_models("ternary")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    calibrate(student, teacher, [ids])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for m in [*teacher.modules(), *student.modules()])


def test_refusals():
    teacher, _, ids = small_models("ternary")
    with pytest.raises(ValueError, match="no low-bit layers"):
        calibrate(teacher, teacher, [ids])
    wide = CausalLM(ModelConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=2))
    with pytest.raises(ValueError, match="shape"):
        calibrate(wide, teacher, [ids])


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
def test_token_weights_make_every_token_as_heavy(scale, seed):
    """Weight times mean square is the same for all tokens; the mean weight is 1; a common factor
    changes nothing; a token of zeros does not count without bounds."""
    g = torch.Generator().manual_seed(seed)
    stream = torch.randn(2, 5, 64, generator=g) * torch.rand(2, 5, 1, generator=g).add(0.3)
    stream[0, 0] *= 1000
    weights = calibration.token_weights(stream)
    heavy = (weights * stream.square().mean(-1, keepdim=True)).flatten()
    torch.testing.assert_close(heavy, heavy[:1].expand(10), rtol=1e-4, atol=0)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    empty = stream.clone()
    empty[1, 1] = 0
    others = calibration.token_weights(empty).flatten()
    usual = empty.square().mean(-1).flatten().median(0).indices
    assert others[6].item() == pytest.approx(100 * others[usual].item(), rel=1e-5)
    torch.testing.assert_close(
        calibration.token_weights(stream * scale), weights, rtol=1e-4, atol=0
    )


def test_blocks_of_8_bits_are_refitted_and_nearly_exact():
    teacher, _, ids = small_models("ternary")
    student = CausalLM(teacher.config)
    student.load_state_dict(teacher.state_dict())
    quantize_model(student, "ternary", more=edge_layers(student, 1))
    kinds = [{m.mode for m in b.modules() if isinstance(m, QATLinear)} for b in student.blocks]
    assert kinds == [{"int8"}, {"ternary"}]
    calibrate(student, teacher, [ids])
    with torch.no_grad():
        s, t = student(ids).hidden_states[0], teacher(ids).hidden_states[0]
    assert (s - t).norm() < 0.02 * t.norm()
