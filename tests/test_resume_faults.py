"""A run whose checkpoints are damaged, whose disk is full, or whose numbers leave their range."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from resuming import HYBRID, events, kill, outcome, run, told

import distillation
from lowbit.files import saved_run
from lowbit.files.saved_run import Checkpoints, Saved
from lowbit.training import resume
from lowbit.training import step as step_module
from lowbit.training.run import Run

# ----------------------------------------------------------------------------- damage and disks


@pytest.mark.parametrize("name", ["student.pt", "state.pt", "best.bin", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, capsys, name, how):
    folder, _ = stopped
    newest = Checkpoints(folder).newest()
    path = newest.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[: len(data) // 3])
    if (name, how) == ("manifest.json", "flip") and Checkpoints(
        folder
    ).newest().folder == path.parent:
        return  # a bit of what the manifest tells only people
    lines: list[str] = []
    assert Checkpoints(folder).newest(lines.append).about["step"] == 3
    if (name, how) == ("manifest.json", "gone"):  # then it is no checkpoint
        assert lines == []
    else:
        assert len(lines) == 1
        assert str(newest.folder) in lines[0]


def test_resumed_from_the_checkpoint_before(stopped, flags, tmp_path, capsys):
    folder, flags = stopped
    (Checkpoints(folder).newest().folder / "state.pt").write_bytes(b"no")
    assert run(folder, "--resume") == 0
    printed = capsys.readouterr()
    assert "warning: " in printed.err
    assert "Resumed at step 3 of 9" in printed.out
    assert run(tmp_path / "whole", *flags) == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_no_checkpoint_is_whole(stopped, capsys):
    folder, _ = stopped
    for path in folder.glob("checkpoints/*/student.pt"):
        path.write_bytes(b"no")
    capsys.readouterr()
    assert run(folder, "--resume") == 2
    assert told(capsys)[-1] == (f"error: --resume: no checkpoint in {folder}/checkpoints is whole")


def rewrite(saved: Saved, name: str, write: Callable[[Path], None], **about) -> None:
    """Change a file of a checkpoint, or what its manifest says, and make the sums right."""
    path = saved.folder / name
    write(path)
    values = json.loads((saved.folder / "manifest.json").read_text())
    values["files"][name] = [
        path.stat().st_size,
        saved_run.hashlib.sha256(path.read_bytes()).hexdigest(),
    ]
    values["about"].update(about)
    (saved.folder / "manifest.json").write_text(json.dumps(values))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: torch.save({"t": Evil()}, path),
        lambda path: torch.save({"t": 4}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: path.write_bytes(b"PK"),
    ],
)
def test_a_hostile_state_is_refused(stopped, monkeypatch, tmp_path, capsys, change):
    folder, _ = stopped
    monkeypatch.chdir(tmp_path)
    rewrite(Checkpoints(folder).newest(), "state.pt", change)
    assert run(folder, "--resume") == 2
    assert not Path("executed").exists()
    assert told(capsys)[-1].startswith(f"error: {folder}/checkpoints/")


@pytest.mark.parametrize(
    "about",
    [
        {"command": 3},
        {"command": [1]},
        {"command": ["--epochs", "x"]},
        {"settings": 5},
        {"text": []},
    ],
)
def test_a_hostile_manifest_is_refused(stopped, capsys, about):
    folder, _ = stopped
    rewrite(Checkpoints(folder).newest(), "best.bin", lambda path: None, **about)
    try:
        code = run(folder, "--resume")
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_a_checkpoint(flags, tmp_path, at_step, monkeypatch, capsys):
    """The run goes on, says so, and the checkpoint before stays."""
    at_step(5, lambda: monkeypatch.setattr(saved_run.torch, "save", full))
    at_step(7, lambda: monkeypatch.undo())
    folder = tmp_path / "out"
    seen = []
    at_step(7, lambda: seen.append(Checkpoints(folder).newest().about["step"]))
    assert run(folder, *flags, *HYBRID, "--save_every", "1") == 0
    assert "warning: no checkpoint of step 6: No space left on device; the run goes on" in (
        capsys.readouterr().err
    )
    assert seen == [3]
    assert [e["event"] for e in events(folder)] == ["save failed"]


def test_a_full_disk_at_the_end(flags, tmp_path, monkeypatch, capsys):
    flags += HYBRID
    assert run(tmp_path / "whole", *flags) == 0
    folder = tmp_path / "out"
    original = distillation.save_packed
    monkeypatch.setattr(distillation, "save_packed", full)
    assert run(folder, *flags) == 1
    assert told(capsys)[-1] == (
        "error: cannot write : No space left on device; write the student's files with "
        f"--resume {folder}"
    )
    monkeypatch.setattr(distillation, "save_packed", original)
    assert run(folder, "--resume") == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


# -------------------------------------------------------------------------- numbers out of range


@pytest.fixture
def broken(monkeypatch) -> Callable[[Sequence[int]], None]:
    """Have the objective be no number at these calls of it, counted over the whole run."""

    def plan(calls: Sequence[int]) -> None:
        original, count = step_module.distillation_objective, [0]

        def objective(*args, **kwargs):
            found = original(*args, **kwargs)
            count[0] += 1
            return (found[0] * float("nan"), *found[1:]) if count[0] - 1 in calls else found

        monkeypatch.setattr(step_module, "distillation_objective", objective)

    return plan


def test_a_skipped_step_is_counted_and_resumed_over(flags, tmp_path, at_step, broken, capsys):
    flags += HYBRID
    broken(range(2, 4))
    assert run(tmp_path / "whole", *flags) == 0
    assert "Skipped Steps (loss or gradient not finite): 2" in capsys.readouterr().out
    assert [(e["event"], e["step"]) for e in events(tmp_path / "whole")] == [
        ("skip", 3),
        ("skip", 4),
    ]
    broken(range(2, 4))
    at_step(3, kill(signal.SIGTERM))  # between the two
    assert run(tmp_path / "parts", *flags) == 143
    broken(range(0, 1))
    assert run(tmp_path / "parts", "--resume") == 0
    assert "Skipped Steps (loss or gradient not finite): 2" in capsys.readouterr().out
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_one_pass_of_a_step_is_no_number(flags, tmp_path, broken):
    """Each step is two passes; the second of the third step spoils that step alone."""
    broken([5])
    assert run(tmp_path / "out", *flags, *HYBRID, "--micro_batch_size", "2") == 0
    assert [(e["event"], e["step"]) for e in events(tmp_path / "out")] == [("skip", 3)]


def test_rolled_back_with_shorter_steps(flags, tmp_path, at_step, broken, monkeypatch, capsys):
    """Three in a row, from the checkpoint of the first epoch; resumed afterwards to the bit."""
    monkeypatch.setattr(resume, "MAX_CONSECUTIVE_SKIPS", 3)
    flags += [*HYBRID, "--save_every", "1"]
    broken(range(4, 7))
    assert run(tmp_path / "whole", *flags) == 0
    printed = capsys.readouterr().out
    assert "Rolled back from step 7 to 3: too many numbers were not finite" in printed
    assert "Rollbacks to a Checkpoint: 1" in printed
    kinds = [(e["event"], e["step"]) for e in events(tmp_path / "whole")]
    assert kinds == [("skip", 5), ("skip", 6), ("skip", 7), ("rollback", 7)]

    broken(range(4, 7))
    original = Run.back_off

    def back_off(self, factor):
        original(self, factor)
        assert factor == 0.5
        at_step(5, kill(signal.SIGTERM))

    monkeypatch.setattr(Run, "back_off", back_off)
    assert run(tmp_path / "parts", *flags) == 143
    broken(range(0))
    assert run(tmp_path / "parts", "--resume") == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_rollbacks_are_bounded(flags, tmp_path, broken, monkeypatch, capsys):
    monkeypatch.setattr(resume, "MAX_CONSECUTIVE_SKIPS", 2)
    broken(range(1, 999))
    folder = tmp_path / "out"
    assert run(folder, *flags, *HYBRID) == 1
    error = told(capsys)[-1]
    assert error == (
        "error: 2 steps in a row had a loss or gradient that is not finite, after 3 rollbacks; "
        "check the teacher and --data"
    )
    assert [e["event"] for e in events(folder)].count("rollback") == 3
    assert not Checkpoints(folder)  # it was the start's


def test_a_run_that_took_no_step_is_in_nobodys_way(flags, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def die(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", die)
        with pytest.raises(MemoryError):
            run(folder, *flags, *HYBRID)
    assert Checkpoints(folder).newest().about["step"] == 0
    assert run(folder, *flags, *HYBRID, "--lr", "1e-3") == 0


def test_rolled_back_to_the_start_and_resumed(flags, tmp_path, at_step, broken, monkeypatch):
    """Of the optimiser that stepped nothing is left; each rollback halves once more."""
    monkeypatch.setattr(resume, "MAX_CONSECUTIVE_SKIPS", 2)
    flags += HYBRID
    lengths, original = [], Run.back_off

    def back_off(self, factor):
        original(self, factor)
        assert not self.manager.constrained_opt.state
        lengths.append(self.manager.guidance.length)

    monkeypatch.setattr(Run, "back_off", back_off)
    bad = [*range(2, 4), *range(5, 7)]
    broken(bad)
    assert run(tmp_path / "whole", *flags) == 0
    assert lengths[1] == pytest.approx(lengths[0] - 0.30103)
    assert [e["event"] for e in events(tmp_path / "whole")].count("rollback") == 2
    broken(bad)
    at_step(6, kill(signal.SIGTERM))
    assert run(tmp_path / "parts", *flags) == 143
    assert Checkpoints(tmp_path / "parts").newest().rollbacks == 2
    broken([])
    assert run(tmp_path / "parts", "--resume") == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
