"""Checkpoints as files: whole or not there, whatever ends the writing, and whatever is read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch

from lowbit import UserError
from lowbit.files.atomic import atomic_write
from lowbit.files.saved_run import Checkpoints, Saved


def _killed_at(folder: Path, count: int) -> None:
    """Save, and die at the count-th call that touches the disk."""
    left = [count]

    def dying(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("open", "fsync", "rename", "rmdir", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    Checkpoints(folder, keep=1).save(2, {"step": 2}, {"a": lambda f: f.write(b"x" * 99)})
    os._exit(0)


def test_killed_at_every_stage_of_saving(tmp_path):
    """The newest checkpoint that loads is the one before or the new one, whole."""
    context = multiprocessing.get_context("fork")
    steps, codes = [], []
    for count in range(1, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        Checkpoints(folder).save(1, {"step": 1}, {"a": lambda f: f.write(b"y" * 99)})
        child = context.Process(target=_killed_at, args=(folder, count))
        child.start()
        child.join()
        codes.append(child.exitcode)
        found = Checkpoints(folder).newest()
        assert found is not None
        assert (found.folder / "a").read_bytes() in (b"x" * 99, b"y" * 99)
        steps.append(found.about["step"])
        if child.exitcode == 0:
            break
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert len(steps) > 8


def test_a_renamed_file_is_flushed_with_its_folder(tmp_path, monkeypatch):
    """What the disk is told, in order: the file's content, its name, the folder's names."""
    calls = []

    def noted(name, what):
        original = getattr(os, name)

        def call(*args):
            calls.append((name, what(*args)))
            return original(*args)

        monkeypatch.setattr(os, name, call)

    noted("fsync", lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode))
    noted("replace", lambda _, target: target.name)
    noted("rename", lambda _, target: target.name)
    atomic_write(tmp_path / "x", lambda f: f.write(b"x"))
    assert calls == [("fsync", False), ("replace", "x"), ("fsync", True)]
    calls.clear()
    Checkpoints(tmp_path).save(3, {}, {"a": lambda f: f.write(b"x")})
    assert calls == [
        *[("fsync", False)] * 2,  # the file and the manifest
        ("fsync", True),
        ("rename", "0001-step-3"),
        ("fsync", True),
    ]


def test_strays_are_ignored_and_ten_comes_after_nine(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=20)
    for step in range(8, 12):
        checkpoints.save(step, {"step": step}, {"a": lambda f: f.write(b"")})
    for name in ("9999-step-x", "x", ".part-1", "99999999999999999999-step-1"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "8888-step-1").write_text("no folder")
    assert checkpoints.newest().about["step"] == 11
    shutil.rmtree(checkpoints.newest().folder)
    assert checkpoints.newest().about["step"] == 10


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"format": "lowbit-run"}', "[" * 99999, '{"files": {"../x": 1}}'],
)
def test_manifests_that_are_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged, or of another version"):
        Saved(tmp_path)


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_writer_that_hides_the_disks_error(tmp_path, monkeypatch, writer):
    from lowbit.files import atomic

    def full_disk(self, data):
        self.failed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise self.failed

    monkeypatch.setattr(atomic._Raw, "write", full_disk)

    def write(f):
        if writer == "torch":  # a RuntimeError of its own
            torch.save({"x": torch.ones(1 << 16)}, f)
        try:
            f.write(b"x" * (1 << 20))
        except OSError:
            raise RuntimeError("unexpected pos") from None

    with pytest.raises(OSError, match="No space left on device"):
        atomic.atomic_write(tmp_path / "x", write)
    with pytest.raises(OSError, match="No space left on device"):
        Checkpoints(tmp_path).save(1, {}, {"a": write})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "files",
    [{"a\0b": [1, "x"]}, {"\ud800": [1, "x"]}, {"a": [float("inf"), "x"]}, {"a": "xy"}, {"a": 1}],
)
def test_hostile_files_in_a_manifest(tmp_path, files):
    values = {"format": "lowbit-run", "version": 1, "files": files, "about": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError):
        Saved(tmp_path).check()
