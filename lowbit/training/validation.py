"""A model's loss on held-out windows, and its distance from the teacher there.

Windows are (n, T + 1) ids. Of the teacher only what its head reads is kept (`Reference`): its
logits on 64 windows of 256 tokens would be gigabytes where the vocabulary is large.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn as nn

from lowbit import UserError
from lowbit.models.interface import LanguageModel
from lowbit.text.tokenizers import UNCOUNTED
from lowbit.training.losses import IGNORED, distillation_objective
from lowbit.training.parallel import ALONE, World

EVAL_TOKENS = {"cpu": 2048, "cuda": 16384}  # at a time


def batch_of(windows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) -> inputs (B, T) and next-token labels (B, T), IGNORED where no loss
    counts them."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(device)
    mark = int(UNCOUNTED)
    labels = torch.where(ids < mark, ids, IGNORED)[:, 1:]
    return ids[:, :-1] % mark, labels


def counted_tokens(windows: np.ndarray) -> np.ndarray:
    """How many labels of each window (B, T + 1) losses count: (B,)."""
    return (windows[:, 1:] < UNCOUNTED).sum(1)


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """The context in which models compute; None: float32."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


@dataclass
class Validation:
    """loss: mean cross-entropy over tokens; error: its standard error, windows being independent
    (of a ratio, where windows count different numbers of tokens); kl: mean KL to the teacher. Nats
    a token."""

    loss: float
    error: float
    kl: float


class Best:
    """The trained weights of a model as they were when it validated best.

    They are kept in a file without a name in ``folder``, which the system removes with the
    process: as many bytes as the student's weights, which memory should not hold once more. Where
    ``folder`` is None another process keeps them, and only the loss is kept.
    """

    def __init__(self, model: nn.Module, folder: str | Path | None) -> None:
        self.model, self.loss = model, math.inf
        self._file: IO[bytes] | None = None
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def see(self, loss: float) -> None:
        """Told the validation loss that the model has now. OSError where the disk is full."""
        if loss < self.loss:
            if self._file:
                self._file.seek(0)
                for p in self._trained():
                    self._file.write(p.detach().cpu().contiguous().numpy().data)
            self.loss = loss

    def write_to(self, file: Any) -> None:
        """Copy the best weights as they are kept."""
        assert self._file
        self._file.seek(0)
        while part := self._file.read(1 << 24):
            file.write(part)

    def read_from(self, path: Path, loss: float) -> None:
        """Take best weights that `write_to` wrote, and their loss. UserError where they are those
        of another model."""
        size = sum(p.numel() * p.element_size() for p in self._trained())
        if path.stat().st_size != size:
            raise UserError(f"{path} holds the weights of another model")
        if self._file:
            self._file.seek(0)
            with path.open("rb") as source:
                shutil.copyfileobj(source, self._file, 1 << 24)
        self.loss = loss

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the best weights that were seen."""
        assert self._file
        self._file.seek(0)
        for p in self._trained():
            raw = self._file.read(p.numel() * p.element_size())
            p.copy_(torch.frombuffer(bytearray(raw), dtype=p.dtype).view(p.shape))


class Reference:
    """A teacher on held-out windows (n, T + 1): its loss there, and what students are compared
    with."""

    def __init__(
        self,
        teacher: LanguageModel,
        windows: np.ndarray,
        device: torch.device,
        dtype: torch.dtype | None = None,
        world: World = ALONE,
    ) -> None:
        """dtype: what models compute in, None for float32; world: the processes that share the
        windows, all of which must validate."""
        self.teacher, self.windows, self.device, self.dtype = teacher, windows, device, dtype
        self.world = world
        self.finals = [self._final(teacher, part) for part in self._parts()]
        self.teacher_loss = self.validate(teacher).loss

    def _parts(self) -> Iterator[np.ndarray]:
        size = max(1, EVAL_TOKENS[self.device.type] // (self.windows.shape[1] - 1))
        mine = self.windows[self.world.part(len(self.windows))[0]]
        for i in range(0, len(mine), size):
            yield mine[i : i + size]

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
        counts = torch.from_numpy(counted_tokens(self.windows)).double()
        share = counts / counts.sum().clamp_min(1)
        mine = torch.stack([torch.cat(x).double().cpu() for x in (ces, kls)])
        ce, kl = self.world.gather(mine, len(self.windows))
        loss = float((ce * share).sum())
        error = float((share * (ce - loss)).square().sum().sqrt())
        return Validation(loss, error, float((kl * share).sum()))
