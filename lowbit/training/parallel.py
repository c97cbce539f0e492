"""Several processes that train one student, as torchrun starts them.

Each holds the whole student, runs its share of every batch and takes the same steps with the sum
of all gradients. Process 0 alone prints and writes files. Without torchrun's RANK, WORLD_SIZE and
LOCAL_RANK there is one process, and torch.distributed is not touched.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lowbit import RunFailed, UserError, first_line
from lowbit.console import complain
from lowbit.signals import Stop

BUCKET = 1 << 26  # bytes of tensors that are sent together
#: Seconds in which all must have come to an exchange, a checkpoint that process 0 writes among it.
TIMEOUT, TIMEOUT_VARIABLE = 600.0, "APL_HYBRID_TIMEOUT"
PATIENCE = timedelta(days=1)  # while process 0 makes what others wait for: tokens, files
LAST_WORDS = 20.0  # seconds that processes wait for each other at the end; torchrun waits for 30

T = TypeVar("T")


class Lost(RunFailed):
    """Another process has ended, or does not answer."""


@contextmanager
def reached() -> Iterator[None]:
    """Inside, other processes are asked for something."""
    try:
        yield
    except RuntimeError as e:
        why = first_line(e).split("] ", 1)[-1].split(". ")[0]  # gloo: where, what, advice
        raise Lost(f"another process has ended or does not answer ({why})") from e


@dataclass(eq=False)
class World:
    """This process among those of a run: number ``rank`` of ``count``, number ``local`` of the
    ``beside`` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1

    def __post_init__(self) -> None:
        self.stop = Stop()  # what signals came to this process
        self._store: Any = None
        self._control: Any = None  # a group on CPUs, in which one may wait for long
        self._signals: torch.Tensor | None = None  # (count,) at the newest `gather`

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> World:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, count, local = (int(environment[name]) for name in names)
            beside = int(environment.get("LOCAL_WORLD_SIZE", count))
        except (KeyError, ValueError):
            return cls()
        return cls(rank, count, local, beside) if count > 1 else cls()

    # ------------------------------------------------------------------------- start and end

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, only process 0 is heard; after it this process is no longer connected."""
        try:
            if self.rank:
                with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                    yield
            else:
                yield
        finally:
            self._disconnect()

    def join(self, stop: Stop) -> None:
        """Meet the others. stop: what signals came to this process."""
        self.stop = stop
        if self.count == 1:
            return
        if not dist.is_available():
            raise UserError("this build of torch trains in one process only: leave out torchrun")
        text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
        try:
            timeout = timedelta(seconds=float(text))
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # has left keys there
            self._store = dist.PrefixStore(f"apl-hybrid {attempt}", store)
            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.count,
                timeout=timeout,
            )
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError, OverflowError) as e:
            raise UserError(f"{self.count} processes cannot meet: {first_line(e)}") from e

    def _disconnect(self) -> None:
        """Who waits for this process then learns that it is in vain."""
        self._control = None
        if self.count > 1 and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def leave(self, code: int, line: str = "", *, lost: bool = False) -> int:
        """The last that a process does: say why it ends and return its exit code, which are process
        0's for all. lost: because of another, whose reason, if it left one, goes before."""
        if self._store is None:
            if line:
                complain(line)
            return code
        # torchrun ends the others when the first has ended: they are about to.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if self.rank:
                if code and not lost:
                    self._store.set("reason", json.dumps([code, line]))
                self._disconnect()
                self._store.wait(["code"], timedelta(seconds=LAST_WORDS))
                code, line = int(self._store.get("code")), ""
                self._store.add("read", 1)
            elif lost and self._store.check(["reason"]):
                code, line = json.loads(self._store.get("reason"))
                lost = False
        except RuntimeError:  # process 0 has gone without a word
            if self.rank and line:
                with redirect_stderr(sys.__stderr__):
                    complain(f"{line} (process {self.rank})")
                return code
        if line:
            complain(line)
        if not self.rank:
            self._disconnect()
            others = self.count - 1 - lost
            end = time.monotonic() + LAST_WORDS  # the store may be in this process
            with suppress(RuntimeError):  # or in a torchrun that was killed
                self._store.set("code", str(code))
                while self._store.add("read", 0) < others and time.monotonic() < end:
                    time.sleep(0.02)
        return code

    # ------------------------------------------------------------------------- what is shared

    def device(self, device: torch.device) -> torch.device:
        """The one of this kind that is this process's."""
        if self.count == 1 or device.type != "cuda":
            return device
        there = torch.cuda.device_count()
        if self.beside > there:
            raise UserError(
                f"{self.beside} processes on a machine with {there} GPUs; give torchrun "
                f"--nproc_per_node {there}"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def part(self, n: int) -> tuple[slice, bool]:
        """Which of n items this process has, never none, and whether they count: where there are
        fewer items than processes, some have an item that counts elsewhere."""
        start, stop = (n * r // self.count for r in (self.rank, self.rank + 1))
        return slice(start, max(stop, start + 1)), stop > start

    def gather(self, mine: torch.Tensor, n: int) -> torch.Tensor:
        """What each process found for its `part` of n items, (k, its part) -> (k, n), the same
        bits in all. What signals came is exchanged along with it."""
        if self.count == 1:
            return mine
        part, counts = self.part(n)
        sent = mine.new_zeros(len(mine) * n + self.count)
        found, signals = sent[: -self.count].view(len(mine), n), sent[-self.count :]
        if counts:
            found[:, part] = mine
        if self.stop.number:
            signals[self.rank] = self.stop.number
        with reached():
            dist.all_reduce(sent)
        self._signals = signals
        return found

    @property
    def stopping(self) -> int | None:
        """The signal that is to end the run, the same in all processes: of what `gather` last
        heard where there are several."""
        if self.count == 1:
            return self.stop.number
        return int(self._signals.max()) or None if self._signals is not None else None

    def sum_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes its sum over the processes, in place."""
        if self.count > 1:
            self._exchange(tensors, dist.all_reduce)

    def hand_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes process 0's, in place."""
        if self.count > 1:
            self._exchange(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def _exchange(
        self, tensors: Sequence[torch.Tensor], how: Callable[[torch.Tensor], Any]
    ) -> None:
        for bucket in buckets(tensors):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            with reached():
                how(flat)
            parts = flat.split([x.numel() for x in bucket])
            for x, part in zip(bucket, parts, strict=True):
                x.copy_(part.view(x.shape))

    def first(self, do: Callable[[], T]) -> T:
        """What process 0 gets by doing it, told to all; the others wait."""
        if self.count == 1:
            return do()
        box: list[Any] = [None if self.rank else do()]
        with reached():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def after_first(self, make: Callable[[], T]) -> T:
        """What ``make`` makes of files that are made by the way, once on each machine."""
        if self.count == 1:
            return make()
        found = None if self.local else make()
        with reached():
            dist.barrier(self._control)
        return found if found is not None else make()


def buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """In lists of one dtype and at most BUCKET bytes, or of one tensor."""
    found: list[list[torch.Tensor]] = []
    room = -1
    for x in sorted(tensors, key=lambda x: str(x.dtype)):
        room -= x.nbytes
        if room < 0 or x.dtype != found[-1][0].dtype:
            found.append([])
            room = BUCKET - x.nbytes
        found[-1].append(x)
    return found


ALONE = World()
