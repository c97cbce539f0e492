"""Going on where a run was stopped: when it saves itself, and how a saved one is found again."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn

import lowbit
from lowbit import NotFinite, RunFailed, UserError
from lowbit.console import complain
from lowbit.files.saved_run import FOLDER, MANIFEST, Checkpoints, Saved
from lowbit.options import parse_options
from lowbit.signals import Stopped
from lowbit.training.parallel import ALONE, World

#: Without --save_every: seconds between checkpoints, or so many times what the last one took.
USUAL_SECONDS, COST = 600.0, 100.0
MAX_CONSECUTIVE_SKIPS = 20
MAX_ROLLBACKS = 3
BACK_OFF = 0.5  # of the step's length and the regions, after a rollback
#: Flags that may be others when a run goes on: they do not touch the weights, or what they name is
#: known by its fingerprint.
FREE = {
    "output_dir", "resume", "save_every", "keep", "save_metrics", "metrics_out", "export",
    "eval_every", "device", "teacher", "data", "quiet", "json", "log_to",
}  # fmt: skip


class Finished(UserError):
    """A run that needs no resuming."""

    code = 0


class Events:
    """events.jsonl in a run's folder: a line for each thing that should not be missed. The file
    is made by the first."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "events.jsonl"

    def __call__(self, event: str, step: int, **about: Any) -> None:
        values = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in about.items()
        }
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, "event": event, "step": step, **values})
        with suppress(OSError), self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")


def print_of(model: nn.Module) -> str:
    """A fingerprint of a model's weights: some entries of each tensor, evenly spaced."""
    found = hashlib.sha256()
    for name, p in model.state_dict().items():
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        found.update(f"{name} {tuple(p.shape)}".encode() + some.tobytes())
    return found.hexdigest()[:16]


class Trained(Protocol):
    """What a run shows of itself to be saved."""

    t: int

    @property
    def skips(self) -> int:
        """Steps in a row, up to now, that were skipped."""
        ...

    def about(self) -> dict[str, Any]:
        """What must be the same when the run goes on; "settings" among it."""
        ...

    def writers(self) -> dict[str, Callable[[Any], Any]]: ...

    def load(self, saved: Saved) -> Any: ...

    def back_off(self, factor: float) -> None: ...


@dataclass
class Keeper:
    """Saves a run: at its start and its end, at intervals, and where a signal ends it; brings it
    back where its numbers are beyond repair. Of several processes each has one, and the first's
    writes.

    steps_per_epoch, max_steps: the run's. every: what --save_every says; None: every ten
    minutes, or as seldom as makes saving cost a hundredth of the time. at: told what is left from
    now on if the run ends. log_id: the run's name in the logs that it is written to.
    """

    checkpoints: Checkpoints
    steps_per_epoch: int
    max_steps: int
    command: Sequence[str]
    every: tuple[str, float] | None = None
    say: Callable[[str], None] = lambda line: None
    at: Callable[[str], None] = lambda what: None
    world: World = ALONE
    rollbacks: int = 0
    log_id: str = ""
    _last: float = field(default_factory=time.monotonic)
    _took: float = 0.0
    _tried: set[Path] = field(default_factory=set)  # checkpoints that a rollback led back to

    def __post_init__(self) -> None:
        self.events: Callable[..., None] = Events(self.checkpoints.folder.parent)
        if self.world.rank:
            self.events = lambda event, step, **about: None

    def start(self, run: Trained) -> None:
        """Before the first step of this process: a calibrated start has cost time, a rollback needs
        one, and what follows an older checkpoint must be the newest."""
        self._save_or_warn(run)

    def end(self) -> None:
        """After the last step. Raises Stopped where a signal came while it was saved."""
        number = self.world.first(lambda: self.world.stop.number)
        if number is not None:
            complain(f"stopped after the last step; write the files with --resume {self._folder}")
            raise Stopped(number, told=True)

    def after_step(self, run: Trained) -> None:
        """Save if it is due. Raises Stopped, after saving, where a signal has come."""
        number = self.world.stopping
        if number is not None:
            try:
                path = self.world.first(lambda: self.save(run))
            except OSError as e:
                raise RunFailed(
                    f"stopped at step {run.t}, which could not be saved ({e.strerror}); go on from "
                    f"the checkpoint before with --resume {self._folder}"
                ) from e
            complain(
                f"stopped at step {run.t} of {self.max_steps}, saved in {path}; go on with "
                f"--resume {self._folder}"
            )
            self.events("stop", run.t, signal=number)
            raise Stopped(number, told=True)
        # While steps are skipped the weights may be the reason: not what to return to.
        if run.t == self.max_steps or (self._due(run.t) and not run.skips):
            self._save_or_warn(run)

    @property
    def _folder(self) -> Path:
        return self.checkpoints.folder.parent

    def _due(self, t: int) -> bool:
        if self.every and self.every[0] == "epochs":
            return t % (self.every[1] * self.steps_per_epoch) == 0
        seconds = self.every[1] if self.every else max(USUAL_SECONDS, COST * self._took)
        return time.monotonic() - self._last >= seconds

    def save(self, run: Trained) -> Path:
        started = time.monotonic()
        about = {
            "step": run.t,
            "max_steps": self.max_steps,
            "command": list(self.command),
            "rollbacks": self.rollbacks,
            "skips": run.skips,
            "log": self.log_id,
            "versions": {"apl-hybrid": lowbit.__version__, "torch": torch.__version__},
            **run.about(),
        }
        path = self.checkpoints.save(run.t, about, run.writers())
        self._last = time.monotonic()
        self._took = self._last - started
        self.at(f"go on from the newest checkpoint with --resume {self._folder}")
        return path

    def _save_or_warn(self, run: Trained) -> None:
        if self.world.rank:
            return
        try:
            self.save(run)
        except OSError as e:
            self._last = time.monotonic()  # until then
            self.events("save failed", run.t, reason=str(e.strerror))
            complain(f"warning: no checkpoint of step {run.t}: {e.strerror}; the run goes on")

    def after_skip(self, run: Trained, loss: float, gradient: float) -> None:
        """A step was skipped because a number was not finite. After MAX_CONSECUTIVE_SKIPS in a
        row: back to the newest checkpoint from before them with shorter steps, next to the one
        before that, MAX_ROLLBACKS times in all, then RunFailed."""
        self.events("skip", run.t, loss=loss, gradient_norm=gradient)
        if run.skips < MAX_CONSECUTIVE_SKIPS:
            return
        saved = self.world.first(self._to_return_to)
        if saved is None:
            raise NotFinite(
                f"{run.skips} steps in a row had a loss or gradient that is not finite, after "
                f"{self.rollbacks} rollbacks; check the teacher and --data"
            )
        left = run.t
        run.load(saved)
        self.rollbacks += 1
        run.back_off(BACK_OFF**self.rollbacks)
        self._tried.add(saved.folder)
        self.events("rollback", left, to=run.t)
        self.say(f"Rolled back from step {left} to {run.t}: too many numbers were not finite")

    def _to_return_to(self) -> Saved | None:
        good = [x for x in self.checkpoints.whole() if x.about.get("skips") == 0]
        new = [x for x in good if x.folder not in self._tried]
        return (new + good[-1:])[0] if good and self.rollbacks < MAX_ROLLBACKS else None


# ---------------------------------------------------------------------------- a saved run, found


def resume_options(
    o: argparse.Namespace, argv: Sequence[str]
) -> tuple[argparse.Namespace, Saved | None]:
    """Options of a run with --resume: those it was started with, then those of argv. None instead
    of a checkpoint where there is nothing to go on with and --resume is "auto"."""
    folder = Path(o.output_dir if o.resume == "auto" else o.resume)
    if (folder / MANIFEST).is_file():
        folder = folder.resolve()
        if folder.parent.name != FOLDER:
            raise UserError(f"--resume {o.resume}: the folder around a checkpoint is {FOLDER}/")
        saved = Saved(folder)
        saved.check()
        folder = folder.parent.parent
    else:
        found = find(folder)
        if found is None and o.resume != "auto":
            raise UserError(f"--resume {o.resume}: no checkpoint is there")
        if found is None:
            return o, None
        saved = found
    command = saved.about.get("command")
    if not isinstance(command, list) or not all(isinstance(x, str) for x in command):
        raise UserError(f"{saved.folder}: its manifest names no command")
    o = parse_options([*command, *argv, "--output_dir", str(folder)])
    settings = saved.about.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    # What memory decides when it is not given stays as it was.
    size, again = settings.get("micro_batch_size"), settings.get("activation_checkpointing")
    if o.micro_batch_size is None and isinstance(size, int) and size > 0:
        o.micro_batch_size = size
    if o.activation_checkpointing is None and isinstance(again, bool):
        o.activation_checkpointing = again
    return o, saved


def find(folder: Path) -> Saved | None:
    """The newest checkpoint of the run in a folder; None where no run is there. Finished where
    its files are written, UserError where every checkpoint is damaged."""
    checkpoints = Checkpoints(folder)
    saved = checkpoints.newest(lambda line: complain(f"warning: {line}"))
    if saved is None and checkpoints:
        raise UserError(f"--resume: no checkpoint in {checkpoints.folder} is whole")
    done = sorted(folder.glob("student_quantized_*.npz"))
    if saved is None and done:
        raise Finished(
            f"nothing to resume: the run in {folder} has finished and left {done[0].name}; to "
            "train again, give another --output_dir, or leave out --resume to replace it"
        )
    return saved


def settings_of(o: argparse.Namespace) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    return {k: v for k, v in vars(o).items() if k not in FREE}


def refuse_others(saved: Saved, now: dict[str, Any]) -> None:
    """UserError where what must be the same (`Trained.about`) is not that of the saved run."""
    before = saved.about.get("settings")
    before = before if isinstance(before, dict) else {}
    settings = json.loads(json.dumps(now["settings"]))
    odd = [
        f"--{k} {before.get(k)} (now {settings.get(k)})"
        for k in sorted(settings.keys() | before.keys())
        if settings.get(k) != before.get(k)
    ]
    odd += [
        f"another {k} (fingerprint {saved.about.get(k)}, now {v})"
        for k, v in now.items()
        if k != "settings" and saved.about.get(k) != v
    ]
    if odd:
        raise UserError(
            f"--resume: the run in {saved.folder} had {', '.join(odd)}; give the same, or start "
            "anew in another --output_dir"
        )


def refuse_unfinished(output_dir: str) -> None:
    """UserError where a folder holds a run that a new one would push out; of one that took no step
    what is left goes."""
    checkpoints = Checkpoints(output_dir)
    if checkpoints.begun:
        raise UserError(
            f"{output_dir} holds a run that is not finished; go on with --resume, give another "
            f"--output_dir, or remove {checkpoints.folder}"
        )
    checkpoints.remove()


def as_tensors(value: Any) -> Any:
    """Nested plain values with arrays as tensors, which is what ``weights_only`` reads."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, dict):
        return {k: as_tensors(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_tensors(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
