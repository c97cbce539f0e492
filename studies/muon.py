"""torch.optim.Muon where the processor has no bfloat16 instructions."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import _muon as torch_muon

from hybrid_optimization import native_bfloat16


def orthogonalize(
    grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    """About the nearest semi-orthogonal matrix of a gradient (m, n), in its own precision: Muon's
    quintic Newton-Schulz iteration x <- (a + b x x^T + c (x x^T)^2) x (Jordan et al., 2024)."""
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.mT if tall else grad
    x = x / x.norm().clamp_min(eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class OwnPrecisionMuon(torch.optim.Muon):
    """torch.optim.Muon with `orthogonalize` for its bfloat16 iteration, which such a processor
    emulates: a step of a small model would take seconds."""

    def step(self, closure: Any = None) -> Any:
        theirs = torch_muon._zeropower_via_newtonschulz
        torch_muon._zeropower_via_newtonschulz = orthogonalize
        try:
            return super().step(closure)
        finally:
            torch_muon._zeropower_via_newtonschulz = theirs


def muon_for(device: torch.device) -> type[torch.optim.Muon]:
    """torch's, or `OwnPrecisionMuon` where the processor would emulate it."""
    emulated = device.type == "cpu" and not native_bfloat16(device)
    return OwnPrecisionMuon if emulated else torch.optim.Muon
