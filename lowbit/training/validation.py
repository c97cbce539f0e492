"""A model's loss on held-out windows, and its distance from the teacher there.

Windows are (n, T + 1) ids. Of the teacher only what its head reads is kept (`Reference`): its
logits on 64 windows of 256 tokens would be gigabytes where the vocabulary is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from lowbit.models.interface import LanguageModel
from lowbit.training.losses import distillation_objective

EVAL_TOKENS = {"cpu": 2048, "cuda": 16384}  # at a time


def batch_of(windows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) -> inputs (B, T) and next-token labels (B, T)."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(device)
    return ids[:, :-1], ids[:, 1:]


def pick_windows(windows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` windows, spread evenly."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """The context in which models compute; None: float32."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


@dataclass
class Validation:
    """loss: mean cross-entropy; error: its standard error over windows; kl: mean KL to the
    teacher. Nats a token."""

    loss: float
    error: float
    kl: float


class Best:
    """The trained weights of a model as they were when it validated best."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loss = model, math.inf
        self._weights: list[torch.Tensor] = []

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def see(self, loss: float) -> None:
        """Told the validation loss that the model has now."""
        if loss < self.loss:
            self.loss, self._weights = loss, [p.detach().cpu().clone() for p in self._trained()]

    @torch.no_grad()
    def restore(self) -> None:
        for p, best in zip(self._trained(), self._weights, strict=bool(self._weights)):
            p.copy_(best)


class Reference:
    """A teacher on held-out windows (n, T + 1): its loss there, and what students are compared
    with."""

    def __init__(
        self,
        teacher: LanguageModel,
        windows: np.ndarray,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: what models compute in, None for float32."""
        self.teacher, self.windows, self.device, self.dtype = teacher, windows, device, dtype
        self.finals = [self._final(teacher, part) for part in self._parts()]
        self.teacher_loss = self.validate(teacher).loss

    def _parts(self) -> Iterator[np.ndarray]:
        size = max(1, EVAL_TOKENS[self.device.type] // (self.windows.shape[1] - 1))
        for i in range(0, len(self.windows), size):
            yield self.windows[i : i + size]

    @torch.no_grad()
    def _final(self, model: LanguageModel, windows: np.ndarray) -> torch.Tensor:
        with autocast(self.device, self.dtype):
            return model.features(batch_of(windows, self.device)[0]).final

    @torch.no_grad()
    def validate(self, model: LanguageModel) -> Validation:
        ces, kls = [], []
        for part, target in zip(self._parts(), self.finals, strict=True):
            labels = batch_of(part, self.device)[1]
            final = target if model is self.teacher else self._final(model, part)
            with autocast(self.device, self.dtype):
                _, ce, kl = distillation_objective(
                    model, self.teacher, final, target, labels, None, 0.5, 1.0
                )
            ces.append(ce)
            kls.append(kl)
        ce = torch.cat(ces).double()
        error = float(ce.std(unbiased=False)) / math.sqrt(len(ce))
        return Validation(float(ce.mean()), error, float(torch.cat(kls).double().mean()))
