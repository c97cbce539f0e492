"""A model's loss on held-out windows, and its distance from the teacher there.

Windows are uint8 (n, T + 1); the teacher's logits on them are asked for once (`logits_of`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lowbit.models.decoder import CausalLM
from lowbit.training.losses import distillation_terms

EVAL_BATCH = {"cpu": 16, "cuda": 128}  # windows


def batch_of(windows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) -> inputs (B, T) and next-token labels (B, T)."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(device)
    return ids[:, :-1], ids[:, 1:]


def pick_windows(windows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` windows, spread evenly."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


@torch.no_grad()
def logits_of(model: CausalLM, windows: np.ndarray, device: torch.device) -> list[torch.Tensor]:
    """Logits over windows (n, T + 1), in blocks of EVAL_BATCH windows."""
    size = EVAL_BATCH[device.type]
    blocks = range(0, len(windows), size)
    return [model(batch_of(windows[i : i + size], device)[0]).logits for i in blocks]


@dataclass
class Validation:
    """loss: mean cross-entropy; error: its standard error over windows; kl: mean KL to the
    teacher. Nats a token."""

    loss: float
    error: float
    kl: float


@torch.no_grad()
def validate(
    model: CausalLM, windows: np.ndarray, reference: list[torch.Tensor], device: torch.device
) -> Validation:
    """A model on windows (n, T + 1); reference: the teacher's `logits_of` the same windows."""
    ces, kls = [], []
    ends = np.cumsum([len(block) for block in reference])
    for part, target in zip(np.split(windows, ends[:-1]), reference, strict=True):
        inputs, labels = batch_of(part, device)
        ce, kl = distillation_terms(model(inputs).logits, target, labels, 1.0)
        ces.append(ce)
        kls.append(kl)
    ce = torch.cat(ces).double()
    error = float(ce.std(unbiased=False)) / math.sqrt(len(ce))
    return Validation(float(ce.mean()), error, float(torch.cat(kls).double().mean()))


@torch.no_grad()
def teacher_loss(windows: np.ndarray, reference: list[torch.Tensor]) -> float:
    """The teacher's own mean cross-entropy on windows, from its `logits_of` them; nats a token."""
    labels = torch.from_numpy(windows[:, 1:].astype(np.int64)).to(reference[0].device)
    parts = labels.split([len(block) for block in reference])
    terms = [distillation_terms(r, r, y, 1.0)[0] for r, y in zip(reference, parts, strict=True)]
    return float(torch.cat(terms).double().mean())
