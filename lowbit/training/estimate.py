"""What a run will take: memory by counting, time by what the teacher takes for one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from lowbit.models.interface import LanguageModel
from lowbit.training.losses import LOGITS_AT_ONCE, multiplied

GIB = 2**30
#: Floats of 4 bytes that a block keeps for the backward pass, a token: so many times its width and
#: so many times the widths of what its linear layers give.
KEPT_OF_WIDTH, KEPT_OF_OUTPUTS = 6, 1.5
KEPT_IN_FLOAT32 = 1.5  # times as much where models compute in float32, not in bfloat16
#: A training step takes as long as so many passes of the teacher's blocks, and so many of its head.
STEP_PASSES, HEAD_PASSES = 6, 4
BACKWARD_PASSES = 4  # of the blocks: gradients of a token's loss by all weights
CALIBRATION_PASSES = 10  # of the blocks, on each of calibration's tokens
HEAD_TOKENS = 128  # on which a pass of the head is timed
PROCESS = 0.4 * GIB  # Python and its libraries


@dataclass
class Estimate:
    memory: float  # bytes, at the peak of a training step
    available: float  # bytes
    seconds: float

    def line(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return (
            f"About {self.memory / GIB:.1f} GiB of memory and {minutes} minutes on this machine "
            "(validation aside)"
        )


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained_weights(teacher: LanguageModel, share: float = 1.0) -> int:
    """Of a student: embedding and head are frozen, of the blocks this share is trained."""
    inside = weights(teacher.blocks)
    frozen = sum(weights(m) for m in (teacher.embedding, teacher.output) if m is not None)
    return int(weights(teacher) - frozen - (1 - share) * inside)


def memory_needed(
    teacher: LanguageModel, tokens: int, *, trained: int, recomputes: bool = False, held: int = 4
) -> float:
    """Bytes for teacher, student, gradients, two moments, rounded weights, codes, activations of a
    pass of so many tokens (with ``recomputes`` of one block), and the logits of a chunk.

    trained: how many of the student's weights are trained; held: bytes of a weight of the teacher's
    blocks, and of the copies that heads multiply by. A tenth is added for what an allocator leaves
    unused.
    """
    blocks = len(teacher.blocks)
    outputs = sum(
        m.out_features for b in teacher.blocks for m in b.modules() if isinstance(m, nn.Linear)
    )
    kept = KEPT_OF_WIDTH * blocks * teacher.hidden_size + KEPT_OF_OUTPUTS * outputs
    kept *= KEPT_IN_FLOAT32 if held == 4 else 1
    if recomputes:
        kept = kept / blocks + 2 * blocks * teacher.hidden_size
    heads = 2.0 * held * teacher.vocab_size * teacher.hidden_size if held < 4 else 0.0
    logits = 6 * min(LOGITS_AT_ONCE, tokens * teacher.vocab_size)
    inside = weights(teacher.blocks)
    models = 4.0 * (2 * weights(teacher) - inside) + held * inside + heads
    return 1.1 * (models + 4.0 * (3 * trained + tokens * kept + logits) + 5.0 * trained + PROCESS)


def choose_passes(
    sizes: Sequence[int], few: int, again: bool | None, fits: Callable[[int, bool], bool]
) -> tuple[int, bool]:
    """Windows a forward pass, and whether blocks are computed again in the backward pass.

    sizes: of a pass, in falling order; few: the least that is not slow; again: True or False where
    that is settled. Passes shrink while memory is too short, down to ``few``; then blocks are
    computed again, and then passes shrink further. What ``fits`` refuses to the end is answered by
    the least.
    """
    plain = [m for m in sizes if m >= few] or list(sizes[:1])
    if again is None:
        choices = [(m, False) for m in plain] + [(m, True) for m in sizes[len(plain) - 1 :]]
    else:
        choices = [(m, again) for m in sizes]
    return next((c for c in choices if fits(*c)), choices[-1])


def halved(most: int) -> list[int]:
    """most, half of it, and so on, to 1."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def memory_available(device: torch.device) -> float:
    """Bytes that are free, beyond what this process holds; infinite where it cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            values = dict(line.split(":", 1) for line in f)
        return 1024.0 * int(values["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")


@torch.no_grad()
def seconds_a_token(teacher: LanguageModel, ids: torch.Tensor) -> tuple[float, float]:
    """Of a pass of the teacher's blocks over ids (B, T), and of one of its head over some of them;
    the shortest of three after one that prepares kernels: other work on the machine comes and goes.
    """

    def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            found = run()
            if ids.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return found, min(taken[1:])

    final, of_blocks = timed(lambda: teacher.features(ids).final)
    some = final.flatten(0, 1)[:HEAD_TOKENS]
    head = multiplied(*teacher.head_parameters())
    _, of_head = timed(lambda: teacher.logits(some, *head))
    return of_blocks / ids.numel(), of_head / len(some)
