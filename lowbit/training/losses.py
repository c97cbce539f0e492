"""Distillation losses. Shapes: B windows, T positions, V vocabulary, C hidden size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def distillation_terms(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) twice and labels (B, T) -> (cross-entropy, KL), each (B,), nats a token.

    KL = tau^2 sum_v p_tau log(p_tau / q_tau), p the teacher (Hinton et al., arXiv 1503.02531,
    section 2; tau^2 keeps the gradient's size). Means over positions, so neither depends on T.
    """
    log_q = F.log_softmax(student.float(), dim=-1)
    ce = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(dim=1)
    if temperature != 1.0:
        log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(dim=1)
    return ce, kl * temperature**2


def hidden_state_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over blocks of ||h_s - h_t||^2 / ||h_t||^2, hidden states (B, T, C) -> (B,).

    FitNets' hint loss (arXiv 1412.6550) after every block, made dimensionless.
    """
    terms = [
        (s.float() - t.float()).square().mean(dim=(1, 2)) / t.float().square().mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean(dim=0)
