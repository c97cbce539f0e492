"""What a teacher says of training windows, kept in a file: of each token the K largest
probabilities. A run that sees its windows often, or is repeated with other settings, asks its
teacher once for each.

Windows are added as steps first ask for them. A record carries a checksum of its bytes, so that
one that is missing, half written or damaged is made again; several processes may use one file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit import UserError
from lowbit.models.interface import LanguageModel
from lowbit.text.documents import cache_folder, process_folder
from lowbit.training.losses import LOGITS_AT_ONCE, TopK, multiplied

FORMAT = 1  # of a record; another number, other files


@dataclass(frozen=True)
class Record:
    """Of a window: a checksum, ids (T, K), and their natural log-probabilities (T, K) in float32,
    at a temperature."""

    seq_len: int
    kept: int  # K
    vocab_size: int
    temperature: float

    @property
    def id_type(self) -> str:
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    @property
    def ids_end(self) -> int:
        return 4 + self.seq_len * self.kept * np.dtype(self.id_type).itemsize

    @property
    def size(self) -> int:
        """Bytes."""
        return self.ids_end + 4 * self.seq_len * self.kept

    def packed(self, ids: np.ndarray, log_p: np.ndarray) -> bytes:
        raw = ids.astype(self.id_type).tobytes() + log_p.astype("<f4").tobytes()
        return checksum(raw) + raw

    def unpacked(self, raw: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """None for what `packed` did not make."""
        if len(raw) < self.size or checksum(raw[4:]) != raw[:4]:
            return None
        shape = (self.seq_len, self.kept)
        ids = np.frombuffer(raw[4 : self.ids_end], self.id_type).reshape(shape)
        return ids.astype(np.int64), np.frombuffer(raw[self.ids_end :], "<f4").reshape(shape)


def checksum(raw: bytes) -> bytes:
    """CRC-32, never 0: a hole in a file reads as zeros."""
    return (zlib.crc32(raw) | 1).to_bytes(4, "little")


class TeacherCache:
    """A file of records, one a training window."""

    def __init__(self, path: Path, record: Record) -> None:
        """path: a file that is there or not yet. OSError where it cannot be opened."""
        self.path, self.record = path, record
        self.asked = 0  # windows that the teacher was asked for
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)

    def of(
        self, indices: np.ndarray, inputs: torch.Tensor, ask: Callable[[torch.Tensor], TopK]
    ) -> TopK:
        """What is known of windows (B,). ``ask``: the teacher, given those of the inputs (B, T) of
        which nothing is."""
        known = {b: x for b, i in enumerate(indices) if (x := self._read(int(i)))}
        missing = [b for b in range(len(indices)) if b not in known]
        if missing:
            self.asked += len(missing)
            new = ask(inputs[missing])
            for b, ids, log_p in zip(missing, new.ids.cpu(), new.log_p.cpu(), strict=True):
                known[b] = ids.numpy(), log_p.numpy()
                self._write(int(indices[b]), *known[b])
        ids, log_p = (
            torch.from_numpy(np.stack([known[b][part] for b in range(len(indices))]))
            for part in (0, 1)
        )
        return TopK(ids.to(inputs.device), log_p.to(inputs.device))

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        size = self.record.size
        return self.record.unpacked(os.pread(self._file.fileno(), size, index * size))

    def _write(self, index: int, ids: np.ndarray, log_p: np.ndarray) -> None:
        raw = self.record.packed(ids, log_p)
        with suppress(OSError):  # a full disk costs time only
            os.pwrite(self._file.fileno(), raw, index * len(raw))


@torch.no_grad()
def most_likely(teacher: LanguageModel, final: torch.Tensor, kept: int, temperature: float) -> TopK:
    """Of what the teacher's head reads, (B, T, C), the ``kept`` largest log-probabilities of each
    token at this temperature; at most LOGITS_AT_ONCE logits exist at a time."""
    head = multiplied(*teacher.head_parameters())
    ids, log_p = [], []
    for part in final.flatten(0, 1).split(max(1, LOGITS_AT_ONCE // teacher.vocab_size)):
        logits = teacher.logits(part, *head).float() / temperature
        values, which = logits.topk(kept, -1)
        ids.append(which)
        log_p.append(values - logits.logsumexp(-1, keepdim=True))
    shape = (*final.shape[:2], kept)
    return TopK(torch.cat(ids).view(shape), torch.cat(log_p).view(shape))


def open_cache(record: Record, needed: int, about: list[Any]) -> TeacherCache:
    """The cache of a teacher and a text (``about``: all else that its records depend on), of which
    so many windows are needed. UserError where the disk is too small for those."""
    key = [FORMAT, asdict(record), about]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def opened(folder: Path) -> TeacherCache:
        folder.mkdir(parents=True, exist_ok=True)
        return TeacherCache(folder / f"teacher-{digest}.bin", record)

    try:
        cache = opened(cache_folder())
    except OSError:  # nobody is at home
        cache = opened(process_folder())
    missing = needed * record.size - 512 * os.stat(cache.path).st_blocks
    free = shutil.disk_usage(cache.path.parent).free
    if missing > free:
        raise UserError(
            f"--cache_teacher {record.kept}: needs {missing / 1e9:.1f} GB in {cache.path.parent}, "
            f"where {free / 1e9:.1f} GB are free; keep fewer, or set XDG_CACHE_HOME"
        )
    return cache
