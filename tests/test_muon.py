"""Muon in the gradient's own precision, against PyTorch's in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.optim import _muon as torch_muon

from studies.muon import OwnPrecisionMuon, orthogonalize

JORDAN = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_orthogonalization_is_pytorchs(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = orthogonalize(g, JORDAN, 5, 1e-7)
    theirs = torch_muon._zeropower_via_newtonschulz(g, JORDAN, 5, 1e-7).float()
    assert ours.dtype == torch.float32
    assert ours.is_contiguous() or ours.mT.is_contiguous()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03  # bfloat16, five iterations
    exact = orthogonalize(g.double(), JORDAN, 5, 1e-7)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_step_is_pytorchs_and_leaves_pytorch_as_it_was():
    theirs = torch_muon._zeropower_via_newtonschulz
    steps = []
    for kind in (OwnPrecisionMuon, torch.optim.Muon):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(24, 16, generator=generator))
        before = p.detach().clone()
        opt = kind([p], lr=1e-2, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)
        for _ in range(3):
            p.grad = torch.randn(24, 16, generator=generator)
            opt.step()
        steps.append(p.detach() - before)
        assert torch_muon._zeropower_via_newtonschulz is theirs
    ours, reference = steps
    assert float((ours - reference).norm() / reference.norm()) < 0.03
    assert not torch.equal(ours, reference)
