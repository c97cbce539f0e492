"""Runs that are stopped on the way, for the tests of what becomes of them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import distillation
from lowbit.training.run import Run

SMALL = [
    *("--seq_len", "32", "--batch_size", "4", "--samples_per_epoch", "12", "--epochs", "3"),
    *("--device", "cpu"),
]
HYBRID = [*SMALL, "--hybrid", "--ternary", "--qat", "--calibration_tokens", "1024"]
PACKED = "student_quantized_*.npz"


@pytest.fixture
def flags(tiny_teacher, text_file) -> list[str]:
    return ["--teacher", str(tiny_teacher), "--data", str(text_file)]


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen after the step of this number, once."""

    def plan(number: int, happen: Callable[[], None]) -> None:
        original, done = Run.step, []

        def step(self):
            result = original(self)
            if self.t == number and not done:
                done.append(True)
                happen()
            return result

        monkeypatch.setattr(Run, "step", step)

    return plan


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run(folder: Path, *flags: str) -> int:
    return distillation.main([*flags, "--output_dir", str(folder)])


def outcome(folder: Path) -> dict[str, object]:
    """Everything of a finished run but times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".csv":
            with path.open(newline="") as f:
                rows = list(csv.DictReader(f))
            found[name] = [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]
        elif path.suffix == ".pth":
            state = torch.load(path, weights_only=True)["state_dict"]
            found[name] = {k: v.tolist() for k, v in state.items()}
        elif path.is_file() and name != "events.jsonl" and path.suffix != ".png":
            found[name] = path.read_bytes()
    return found


def told(capsys) -> list[str]:
    """Lines on stderr, progress bars aside."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [x for x in lines if x.strip() and "step/s" not in x]


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped_once(tiny_teacher, text_file, tmp_path_factory) -> Path:
    """A run that was stopped in its second epoch, with a checkpoint of the first."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    flags = ["--teacher", str(tiny_teacher), "--data", str(text_file), *HYBRID]
    original = Run.step

    def step(self):
        if self.t == 3:
            kill(signal.SIGTERM)()
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        assert run(folder, *flags, "--save_every", "1") == 143
    return folder


@pytest.fixture
def stopped(stopped_once, flags, tmp_path) -> tuple[Path, list[str]]:
    """Its folder, to be changed, and its flags."""
    return Path(shutil.copytree(stopped_once, tmp_path / "out")), flags + HYBRID
