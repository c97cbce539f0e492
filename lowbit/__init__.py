"""What a distillation run is made of: text, models, quantisers, losses and files."""

import os

from lowbit.console import complain

# Threads of PyTorch that wait for each other spin before they sleep. With OpenMP's default a step
# takes many times as long beside other work (benchmarks/busy). Without effect where PyTorch is
# loaded already.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what, where and what to do.

    Command-line entry points `tell` it and exit with ``code``.
    """

    code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a path may hold line breaks

    def tell(self) -> int:
        """Say it on stderr. Returns the exit code."""
        complain(f"error: {self}")
        return self.code


class RunFailed(UserError):
    """A run that started properly and could not go on."""

    code = 1


class NotFinite(RunFailed):
    """Losses or gradients that no step could be taken with."""


def first_line(e: BaseException) -> str:
    """What another package's error says, for a line of ours; its type where it says nothing."""
    lines = str(e).strip().splitlines()
    return lines[0][:200] if lines else type(e).__name__
