"""What is told of a run: on stdout as flags want it, in bars and lines on stderr, in other
programs' logs."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import pty
import struct
import sys
import termios
from contextlib import redirect_stderr, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import distillation
from lowbit import UserError, console, logs
from lowbit.console import Waiting, hushed, progress_bar
from lowbit.events import plain
from lowbit.extras import EXTRAS
from lowbit.files.saved_run import Checkpoints
from lowbit.options import parse_options
from lowbit.report import talk_command, worse_line
from lowbit.signals import Stopped
from lowbit.training.resume import FREE
from lowbit.training.run import Run

SMALL = ["--seq_len", "32", "--batch_size", "4", "--samples_per_epoch", "12", "--epochs", "2"]
SMALL += ["--device", "cpu"]


@pytest.fixture
def flags(tiny_teacher, text_file) -> list[str]:
    return [*SMALL, "--teacher", str(tiny_teacher), "--data", str(text_file)]


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


def objects(text: str) -> list[dict[str, Any]]:
    """Each line as strict JSON."""
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ------------------------------------------------------------------------------------ on stdout


def test_json_is_all_that_is_said(flags, tmp_path, capsys) -> None:
    """And the start is on the scale of the epochs: weights that stay validate as they did."""
    still = ["--lr", "1e-12", "--weight_decay", "0", "--ternary", "--qat", "--save_metrics"]
    assert distillation.main([*flags, *still, "--json", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = objects(said.out)
    assert [x["event"] for x in found] == ["start", "epoch", "epoch", "summary", "files"]
    start, epoch, _, summary, files = found
    assert epoch["val_loss_quantized"] == pytest.approx(start["student_loss"], abs=1e-6)
    assert epoch["val_loss_teacher"] == start["teacher_loss"]
    assert start["student"] == "rounded"
    assert summary["total_steps"] == start["steps"] == 6
    assert summary["student_loss"] > summary["teacher_loss"]
    assert all(Path(path).is_file() for path in files["files"].values())
    assert {p.name for p in tmp_path.iterdir()} == {Path(x).name for x in files["files"].values()}


def test_a_number_that_is_none_is_null() -> None:
    values = {"a": math.nan, "b": [math.inf, 1.5, ""], "c": {"d": -math.inf}}
    assert plain(values) == {"a": None, "b": [None, 1.5, None], "c": {"d": None}}


def summary(before: float, after: float, keeps_best: bool) -> dict[str, Any]:
    return {"val_loss_before": before, "val_loss_after": after, "keeps_best": keeps_best}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (summary(1.5, 1.4, True), ""),
        (summary(1.5, 1.4, False), ""),
        (summary(1.5, 1.5, False), ""),
        (summary(math.nan, 1.4, False), ""),  # of a checkpoint that does not hold it
        (summary(1.5, 1.5, True), "the student is the start"),
        (summary(1.5, 1.6, False), "1.5000 before, 1.6000 after"),
        (summary(1.5, math.nan, False), "1.5000 before, nan after"),
    ],
)
def test_a_student_that_is_worse_than_its_start(values, said) -> None:
    line = worse_line(values)
    assert said in line
    assert bool(line) == bool(said) == line.startswith("WARNING: ")


def test_quiet_says_the_losses_the_files_and_what_is_wrong(flags, tmp_path, capsys) -> None:
    worse = ["--qat", "--lr", "3", "--quiet", "--output_dir", str(tmp_path)]
    assert distillation.main([*flags, *worse]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    beginnings = ["WARNING: THE STUDENT IS WORSE THAN BEFORE TRAINING. Validation loss "]
    beginnings += ["Validation loss, ", "  teacher ", "  student, quantized", "  student, latent"]
    beginnings += ["Wrote ", "Wrote "]
    assert [line[: len(b)] for line, b in zip(lines, beginnings, strict=True)] == beginnings
    assert distillation.main([*flags, "--quiet", "--seq_len", "100000"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.startswith("error: ")) == ("", True)


def killed(flags: list[str], monkeypatch, at: int) -> None:
    """A run that is killed after this step; the newest checkpoint is of epoch 0."""
    original = Run.step

    def step(self):
        result = original(self)
        if self.t == at:
            raise Stopped(9, told=True)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", step)
        assert distillation.main([*flags, "--save_every", "1"]) == 137


def test_what_is_said_is_free_to_change() -> None:
    assert {"quiet", "json", "log_to"} <= FREE


@pytest.mark.parametrize(
    ("chats", "others", "expected"),
    [
        (True, [], "python -m lowbit.chat '{0}/'"),
        (True, ["b.npz"], "python -m lowbit.chat '{0}/a.npz'"),
        (False, [], "python -m lowbit.generate '{0}/a.npz' --prompt \"Return the\""),
    ],
)
def test_how_to_talk_to_it(tmp_path, chats, others, expected) -> None:
    folder = tmp_path / "my student"
    folder.mkdir()
    for name in ["a.npz", *others]:
        (folder / name).write_bytes(b"")
    said = talk_command(folder / "a.npz", chats=chats, prompt="Return the")
    assert said == expected.format(folder)


# ------------------------------------------------------------------------------------ on stderr


def test_a_bar_fits_into_80_columns(monkeypatch) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar(total=320, desc="Training", unit="step", mininterval=0) as bar:
            bar.set_postfix_str("validation 1.2846", refresh=False)
            bar.update(137)
    drawn = b""
    with suppress(OSError):  # at the end
        while part := os.read(reader, 4096):
            drawn += part
    os.close(reader)
    parts = drawn.decode().split("\r")
    assert max(map(len, parts)) <= 80
    (full,) = (x for x in parts if "validation 1.2846" in x)
    assert full.startswith("Training:  43%|")
    assert "137/320" in full


class Text(SimpleNamespace):
    """A file, in memory."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__(said="")

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        self.said += text

    def flush(self) -> None: ...


def test_a_log_file_is_not_filled(monkeypatch) -> None:
    """A line a minute at first; in ten hours no more than a tenth of the time gone by allows."""
    clock = SimpleNamespace(monotonic=lambda: now)
    now = 0.0
    monkeypatch.setattr(console, "time", clock)
    out = Text()
    drawing = console._Drawing(out, False)
    told = []
    for now in np.arange(0.0, 36_000.0, 1.0):
        before = len(out.said)
        drawing.write("\r 1%, 3 of 320")
        if len(out.said) > before:
            told.append(now)
    assert told[:3] == [60, 120, 180]
    assert np.diff(told).min() >= 60
    assert len(told) <= 10 + math.ceil(math.log(60) / math.log(1.1))
    assert set(out.said.splitlines()) == {"1%, 3 of 320"}


def test_a_line_of_a_bar(monkeypatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(sys, "stderr", Text())
    with progress_bar(total=4, desc="Training", unit="step", mininterval=0) as bar:
        bar.set_postfix_str("validation 1.2846", refresh=False)
        bar.update(3)
        said = sys.stderr.said.splitlines()
    assert said[0].startswith("Training: 0%, 0 of 4, ")
    assert said[-1].startswith("Training: 75%, 3 of 4, 00:00 left, ")
    assert said[-1].endswith("step/s, validation 1.2846")


@pytest.mark.parametrize("widgets", [False, True])
def test_a_bar_in_a_notebook(monkeypatch, widgets) -> None:
    """Is tqdm's own widget where there are widgets; else it is drawn as text, over itself."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (widgets and name == "ipywidgets") or None
    )
    made = []
    package = ModuleType("tqdm.auto")
    package.tqdm = lambda *args, **kwargs: made.append(kwargs)
    monkeypatch.setitem(sys.modules, "tqdm.auto", package)
    monkeypatch.setattr(sys, "stderr", Text())
    bar = progress_bar(total=4, desc="Training")
    if widgets:
        assert made == [{"total": 4, "desc": "Training", "leave": False}]
    else:
        bar.close()
        assert sys.stderr.said.startswith("\rTraining:   0%|")


def test_what_takes_long_is_told(monkeypatch, capsys) -> None:
    """Unless the run is hushed, which ends with the context; also where another library's bars are
    kept from stderr meanwhile."""

    class Timer:
        """All waiting is too long."""

        def __init__(self, seconds, do, args) -> None:
            self.start, self.cancel = lambda: do(*args), lambda: None

    monkeypatch.setattr(console, "threading", SimpleNamespace(Timer=Timer))
    with hushed(), Waiting("Nothing"):
        pass
    waiting = Waiting("Reading")
    with hushed(False), redirect_stderr(io.StringIO()), waiting:
        pass
    assert capsys.readouterr().err == "Reading ...\n"


# ------------------------------------------------------------------------------------- in logs


class Recorder(ModuleType):
    """Stands for wandb or trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened: list[dict] = []
        self.rows: list[dict] = []
        self.closed = 0

    def init(self, **about: Any) -> Recorder:
        print("hello from the library")
        self.opened.append(about)
        return self

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, values: dict, step: int | None = None) -> None:
        self.rows.append({**values, "step": values.get("step", step)})

    def finish(self) -> None:
        self.closed += 1


def test_a_resumed_run_goes_on_in_its_logs(flags, tmp_path, monkeypatch, capsys) -> None:
    """They know it by one name, and stdout is left to the run. Its start is not measured again;
    flags of what is said may be others."""
    packages = {name: Recorder(name) for name in ("wandb", "trackio")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    flags += ["--ternary", "--qat", "--output_dir", str(tmp_path)]
    killed([*flags, "--json", "--log_to", *packages], monkeypatch, 5)
    start, _ = objects(capsys.readouterr().out)
    saved = Checkpoints(tmp_path).newest()
    validated = []
    original = distillation.Reference.validate

    def validate(self, model):
        validated.append(model is self.teacher)
        return original(self, model)

    monkeypatch.setattr(distillation.Reference, "validate", validate)
    assert distillation.main(["--resume", str(tmp_path), "--json=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Resumed at step 3 of 6"
    assert lines[1].endswith(f"student {start['student_loss']:.4f} (rounded)")
    assert f"{start['student_loss']:.4f} before training, " in lines[3]
    assert validated[:2] == [True, False]  # the teacher, and the student after the next epoch
    for name, key in {"wandb": "id", "trackio": "name"}.items():
        first, again = packages[name].opened
        assert first[key] == again[key] == saved.about["log"]
        assert first["config"]["batch_size"] == 4
        assert first["resume"] == "allow"
        assert packages[name].closed == 2
        rows = packages[name].rows
        # Killed in step 5; the checkpoint is of step 3.
        assert [r["step"] for r in rows if "step/loss" in r] == [1, 2, 3, 4, 4, 5, 6]
        assert [r["step"] for r in rows if "epoch/val_loss_quantized" in r] == [0, 3, 6]
        assert [r["step"] for r in rows if "final/student_loss" in r] == [6]


def test_tensorboard_reads_what_was_written(flags, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags += ["--ternary", "--qat", "--output_dir", str(tmp_path), "--log_to", "tensorboard"]
    killed(flags, monkeypatch, 5)
    assert distillation.main(["--resume", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "tensorboard").iterdir()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [x.step for x in found.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    assert [x.step for x in found.Scalars("epoch/val_loss_quantized")] == [0, 3, 6]
    assert math.isfinite(found.Scalars("final/student_loss")[0].value)


def test_a_log_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys) -> None:
    package = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    log = logs.LogOf("wandb", parse_options(["--output_dir", str(tmp_path)]), "name", 0)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    package.log = fail
    log("step", {"step": 1, "loss": 1.0})
    log("step", {"step": 2, "loss": 1.0})
    log.close()
    said = capsys.readouterr().err.splitlines()[1:]  # the library's own line before
    assert said == ["warning: --log_to wandb: disk full; the run goes on without it"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing(flags, tmp_path, monkeypatch, capsys, name) -> None:
    """Is told before anything is loaded."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(distillation, "load_teacher", None)
    assert distillation.main([*flags, "--output_dir", str(tmp_path), "--log_to", name]) == 2
    assert capsys.readouterr().err == (
        f"error: this needs the package {name}, of the extra {name}: pip install {EXTRAS[name]}\n"
    )


def test_a_log_that_cannot_be_opened(tmp_path, monkeypatch) -> None:
    package = Recorder("trackio")
    package.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "trackio", package)
    with pytest.raises(UserError, match="--log_to trackio: division by zero"):
        logs.LogOf("trackio", parse_options(["--output_dir", str(tmp_path)]), "name", 0)


@pytest.mark.parametrize("saved", [None, 3, "", "../../up", "a b", "x" * 65])
def test_a_name_is_no_path(saved) -> None:
    made = logs.new_id(saved)
    assert made == logs.new_id(made) != saved
