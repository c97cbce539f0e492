"""How guidance sets the length of steps: its limits, and what it steers to in fine-tuning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hybrid_optimization import (
    SHRINK_BELOW_PRETRAINED,
    AuxiliaryNeuralNetwork,
    ConstrainedOptimizer,
    Guidance,
    HybridOptimizer,
)


class AfterStep:
    """What guidance asks an optimiser for, at a slope that makes kappa what it is given."""

    RELATIVE_GAIN = ConstrainedOptimizer.RELATIVE_GAIN

    def __init__(self, kappa: float, promised: float) -> None:
        self.after = kappa * promised

    def slope(self) -> torch.Tensor:
        return torch.tensor(self.after)


def lengthened(guidance: Guidance, kappa: float, promised: float = -1.0) -> float:
    """Decades that one observation adds to the wanted length."""
    guidance.peak, guidance.promised = 1e-3, promised
    before, state = guidance.length, guidance.describe(1.0, 1.0, 0, 1)
    guidance.lead(AfterStep(kappa, promised), state, left=1.0)  # type: ignore[arg-type]
    return guidance.length - before


@pytest.mark.parametrize(
    ("low", "kappa", "decades"),
    [(None, -0.6, 0.0), (None, -1.0, -0.08), (SHRINK_BELOW_PRETRAINED, -0.6, -0.08),
     (SHRINK_BELOW_PRETRAINED, -0.3, 0.0)],
)  # fmt: skip
def test_swings_shorten_steps_near_a_start_that_is_worth_keeping(low, kappa, decades):
    """The gain is 0.4 decades for each unit of kappa below -0.8, in conversions -0.4."""
    limit = HybridOptimizer(nn.Linear(2, 2)).guidance.shrink_below if low is None else low
    guidance = Guidance(AuxiliaryNeuralNetwork(), 0.12, limit)
    assert lengthened(guidance, kappa) == pytest.approx(decades, abs=1e-6)
    assert guidance.kappa == pytest.approx(kappa)


@pytest.mark.parametrize("promised", [-1e-4, -1.0, -1e4])
@pytest.mark.parametrize(
    ("kappa", "counted"),
    [(0.0, 0.0), (-0.03, -0.03), (-0.1, -0.1), (0.15, 0.15), (3.0, 0.2), (-40.0, -0.2)],
)
def test_fine_tuning_steers_kappa(promised, kappa, counted):
    """0.7 decades for each unit of kappa above -0.03, however small or large slopes are, and of one
    step's kappa 0.2 at most."""
    guidance = HybridOptimizer(nn.Linear(2, 2), pretrained=True).guidance
    change = lengthened(guidance, kappa, promised)
    assert change == pytest.approx(0.7 * (counted + 0.03), abs=1e-6)


def test_means_of_kappa_are_of_ratios():
    """So that steps which were a thousand times longer do not outweigh what short ones show."""
    guidance = HybridOptimizer(nn.Linear(2, 2), pretrained=True).guidance
    for kappa, promised in ((-0.1, -1000.0), (0.1, -1.0), (0.1, -1.0)):
        lengthened(guidance, kappa, promised)
    assert guidance.kappa == pytest.approx((-0.1 + 0.1 + 0.1) / 3)


@pytest.mark.parametrize("step_length", [0.001, 0.002])
def test_fine_tuning_finds_longer_steps(step_length):
    """A linear model that is nearly right and sees noisy targets ends less than half as far from
    the best weights as with the steps it begins with, which are too short."""

    def distance(guided: bool) -> float:
        torch.manual_seed(0)
        model, best = nn.Linear(256, 1, bias=False), torch.randn(1, 256)
        with torch.no_grad():
            model.weight.copy_(best + 0.05 * torch.randn(1, 256))
        optimizer = HybridOptimizer(
            [model.weight], 300, pretrained=True, step_length=step_length, guided=guided
        )
        for _ in range(300):
            x = torch.randn(16, 256)
            y = x @ best.T + 0.3 * torch.randn(16, 1)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return float((model.weight - best).norm().detach())

    assert distance(guided=True) < 0.5 * distance(guided=False)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("pretrained", [True, False])
def test_adapters_are_made(pretrained, trained):
    """Under peft's names they are noticed, where they are trained."""
    model = nn.Linear(4, 4)
    model.lora_A = nn.Parameter(torch.randn(2, 4), requires_grad=trained)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        HybridOptimizer(model, pretrained=pretrained)
    assert len(found) == (pretrained and trained)
    assert all("adapters" in str(w.message) for w in found)


@pytest.mark.parametrize(
    ("kappa", "swing"), [(0.9, 0), (0.0, 0), (-0.4, 0), (-0.55, 0.5), (-0.7, 1), (-3.0, 1)]
)
@pytest.mark.parametrize(
    ("options", "eases"),
    [({}, "both"), ({"momentum": 0.8}, "decay"), ({"weight_decay": 0.5}, "momentum"),
     ({"momentum": 0.8, "weight_decay": 0.5}, ""), ({"pretrained": True}, "")],
)  # fmt: skip
def test_swings_raise_momentum_and_lower_decay(kappa, swing, options, eases):
    """Up to 0.95, down to a fifth; what was given stays, and so does what is not decayed."""
    optimizer = HybridOptimizer(nn.Linear(2, 2), **options)
    optimizer.guidance.usual.mean = kappa
    for group in optimizer.param_groups:
        momentum, decay = group["momentum"], group["weight_decay"]
        assert decay == (optimizer.defaults["weight_decay"] if group["kind"] == "matrix" else 0)
        if eases in ("both", "momentum"):
            momentum += (0.95 - momentum) * swing
        if eases in ("both", "decay"):
            decay *= 1 - 0.8 * swing
        assert optimizer._mixture(group) == pytest.approx((momentum, decay))


def steps_on_a_valley(optimizer: HybridOptimizer, model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(model(x), x.square()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_steps_that_swing_are_those_of_more_momentum_and_less_decay(monkeypatch):
    monkeypatch.setattr(Guidance, "swing", 1.0)
    found = []
    for options in ({}, {"momentum": 0.95, "weight_decay": 0.1}, {"momentum": 0.8}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        found.append(steps_on_a_valley(HybridOptimizer(model, 20, **options), model))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0][0], found[2][0], rtol=1e-3)


def test_groups_with_numbers_of_their_own_keep_them():
    layer = nn.Linear(2, 2)
    groups = [
        {"params": [layer.weight], "momentum": 0.7, "weight_decay": 0.2},
        {"params": [layer.bias]},
    ]
    optimizer = HybridOptimizer(groups)
    optimizer.guidance.usual.mean = -1.0
    assert optimizer._mixture(optimizer.param_groups[0]) == (0.7, 0.2)
    assert optimizer._mixture(optimizer.param_groups[1]) == pytest.approx((0.95, 0))


def test_a_copy_and_a_resumed_run_swing_alike():
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    optimizer = HybridOptimizer(model, 40)
    steps_on_a_valley(optimizer, model)
    optimizer.guidance.usual.mean = -0.5
    again = HybridOptimizer(nn.Linear(6, 6), 40)
    again.load_state_dict(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), again):
        for a, b in zip(other.param_groups, optimizer.param_groups, strict=True):
            assert other._mixture(a) == optimizer._mixture(b)


def test_a_few_wild_steps_are_no_swings():
    """Kappa is counted as -1 at most, in a mean of about twenty observations."""
    guidance = Guidance(AuxiliaryNeuralNetwork(), 0.12)
    for _ in range(40):
        lengthened(guidance, -0.2)
    for _ in range(4):  # kappa itself is a running mean, of slopes
        lengthened(guidance, -50.0)
    assert guidance.kappa < -10
    assert guidance.swing == 0
    for _ in range(60):
        lengthened(guidance, -0.9)
    assert guidance.swing > 0.9
