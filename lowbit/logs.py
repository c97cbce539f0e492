"""The metrics of a run in the logs of other programs: TensorBoard, Weights & Biases, Trackio.

Each is written by its own library. A run has one name in all of them, which its checkpoints hold:
a resumed run goes on in the same log.
"""

from __future__ import annotations

import argparse
import io
import re
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lowbit import UserError, first_line
from lowbit.console import complain
from lowbit.events import LOGS
from lowbit.extras import require
from lowbit.training.resume import settings_of

PROJECT = "apl-hybrid"
#: What writes metrics of a step, and what ends a log.
Opened = tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]


def new_id(saved: Any = None) -> str:
    """The name that a saved run has in its logs; a new one where it has none, of letters, digits
    and dashes."""
    if isinstance(saved, str) and re.fullmatch(r"[\w-]{1,64}", saved, re.ASCII):
        return saved
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def require_logs(o: argparse.Namespace) -> None:
    """UserError where a library is missing."""
    for name in o.log_to:
        if name in LOGS:
            require(name, name)


def _tensorboard(o: argparse.Namespace, run: str, step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    # What was written after the checkpoint that the run goes on from is dropped.
    writer = SummaryWriter(
        str(Path(o.output_dir) / "tensorboard" / run), purge_step=step + 1 if step else None
    )

    def write(values: dict[str, float], t: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, t)
        if not all(name.startswith("step/") for name in values):
            writer.flush()

    return write, writer.close


def _wandb(o: argparse.Namespace, run: str, step: int) -> Opened:
    wandb = require("wandb", "wandb")
    opened = wandb.init(
        project=PROJECT, id=run, resume="allow", dir=o.output_dir, config=settings_of(o),
        settings=wandb.Settings(silent=o.quiet or o.json),
    )  # fmt: skip
    # Its own count of steps only grows, and a resumed run goes back to its checkpoint.
    opened.define_metric("*", step_metric="step")
    return lambda values, t: opened.log({**values, "step": t}), opened.finish


def _trackio(o: argparse.Namespace, run: str, step: int) -> Opened:
    trackio = require("trackio", "trackio")
    opened = trackio.init(project=PROJECT, name=run, resume="allow", config=settings_of(o))
    return lambda values, t: opened.log(values, step=t), opened.finish


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def metrics(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of an event, by the names that they have in a log."""
    if event == "start":  # the first points of the curves that epochs go on with
        found = {f"epoch/{values['column']}": values["student_loss"]}
        found["epoch/val_loss_teacher"] = values["teacher_loss"]
    elif event in ("step", "epoch"):
        found = {f"{event}/{k}": v for k, v in values.items() if k not in ("step", "epoch")}
    elif event == "summary":
        found = {f"final/{k}": v for k, v in values.items()}
    else:
        found = {}
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float))}


class LogOf:
    """A run's log of one kind, told events. What fails in it is told once and ends the log, not
    the run."""

    def __init__(self, name: str, o: argparse.Namespace, run: str, step: int) -> None:
        """step: the number of steps that the run has done. UserError where it cannot be opened."""
        self.name, self.t = name, step
        # What the library prints is no part of ours, and nobody's where little is to be said.
        self._prints = io.StringIO() if o.quiet or o.json else sys.stderr
        try:
            with redirect_stdout(self._prints):
                self._write, self._end = OPEN[name](o, run, step)
        except UserError:
            raise
        except Exception as e:  # the library's own errors
            hint = " (WANDB_MODE=offline needs no account)" if name == "wandb" else ""
            raise UserError(f"--log_to {name}: {first_line(e)}{hint}") from e
        self._open = True

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        self.t = values.get("step", self.t)
        found = metrics(event, values)
        if not found or (event == "start" and self.t):
            return
        self._try(lambda: self._write(found, self.t))

    def close(self) -> None:
        self._try(self._end)
        self._open = False

    def _try(self, do: Callable[[], Any]) -> None:
        if not self._open:
            return
        try:
            with redirect_stdout(self._prints):
                do()
        except Exception as e:  # the library's own errors
            self._open = False
            complain(f"warning: --log_to {self.name}: {first_line(e)}; the run goes on without it")
