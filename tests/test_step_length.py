"""How short a step may become: the least share of a matrix's step, and the limit of guidance."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from test_hybrid_optimizer import state_of

from hybrid_optimization import ConstrainedOptimizer, HybridOptimizer


def low_rank(rows: int, columns: int, t: int) -> torch.Tensor:
    """A gradient of rank 1 that swings."""
    a, b = torch.linspace(1, 2, rows), torch.linspace(-1, 1, columns)
    return torch.outer(a, b) * (-1) ** t


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (8, 3, 2, 2)])
def test_a_step_has_at_least_its_share_of_the_longest(shape):
    """Closed form: 2 % of the weights' root mean square at lr 1e-3, times 0.75 sqrt(aspect)."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    large, small = max(rows, columns), min(rows, columns)
    longest = 1e-3 * 20 * 0.75 * min(large / small, 4) ** 0.5
    shares = {}
    for least in (0.0, 0.3):
        p = nn.Parameter(torch.ones(shape))
        group = {"params": [p], "kind": "matrix"}
        optimizer = ConstrainedOptimizer([group], least_share=least, use_trust_region=False)
        for t in range(12):
            p.grad = low_rank(rows, columns, t).reshape(shape)
            before = p.detach().clone()
            optimizer.step()
            size = float(before.square().mean().sqrt())
            shares[least] = float((p.detach() - before).square().mean().sqrt()) / size / longest
    assert shares[0.0] < 0.15
    assert shares[0.3] == pytest.approx(0.3, rel=1e-3)


def test_matrices_that_step_together_take_the_steps_of_one_alone():
    """As on a GPU: three of one shape as one tensor; least share and average included. Two steps:
    later matrices take turns at fresh roots, in another order."""
    ends = []
    for together in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 40))
        optimizer = HybridOptimizer(model)
        optimizer.never_wait = together
        x = torch.randn(32, 12)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        ends.append(state_of(model))
    for k, v in ends[0].items():
        torch.testing.assert_close(v, ends[1][k], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_fades_takes_its_step_along():
    """Of zeros it leaves what momentum leaves without a least share; of a tenth, a tenth."""
    lengths: dict[float, list[float]] = {}
    for least in (0.0, 0.9):
        p = nn.Parameter(torch.ones(16, 16))
        group = {"params": [p], "kind": "matrix"}
        optimizer = ConstrainedOptimizer([group], least_share=least, use_trust_region=False)
        torch.manual_seed(0)
        for t in range(30):
            p.grad = torch.randn(16, 16) if t < 10 else torch.zeros(16, 16)
            before = p.detach().clone()
            optimizer.step()
            moved = float((p.detach() - before).norm() / before.norm())
            lengths.setdefault(least, []).append(moved)
    assert min(lengths[0.9][:10]) > 1.9 * max(lengths[0.0][5:10])
    assert lengths[0.9][10:] == pytest.approx(lengths[0.0][10:], rel=0.02)


def test_guidance_shortens_to_a_fifth_at_most():
    """Swings far beyond the minimum along each step, for a hundred steps: kappa is far below -1."""
    optimizer = HybridOptimizer([nn.Parameter(torch.ones(8, 8))], max_steps=2000)
    guidance = optimizer.guidance
    state = guidance.describe(1.0, 1.0, 0, 0)
    guidance.peak, guidance.share = guidance.step_length / optimizer.RELATIVE_GAIN, 1.0
    optimizer.slope = lambda: torch.tensor(5.0)
    for _ in range(100):
        guidance.promised = -1.0
        guidance.lead(optimizer, state, 1.0)
    assert guidance.kappa == pytest.approx(-5.0)
    assert 10**guidance.length == pytest.approx(guidance.step_length / 5)
