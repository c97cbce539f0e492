"""Damaged files: every reader refuses them in one line, in seconds and bounded memory."""

from __future__ import annotations

import sys
from pathlib import Path

import fuzz_readers
import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
MODELS = ("folder", "gguf", "packed_tokens")  # of which one takes a third of a second
KINDS = ("packed", "float32", "txt", "jsonl", "gz", "parquet", *MODELS)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    return fuzz_readers.make_sound(tmp_path_factory.mktemp("sound"))


def check(sound: dict[str, Path], kind: str, seed: int, count: int) -> None:
    if kind not in sound:
        pytest.skip("its package is not installed")
    found = fuzz_readers.attack(kind, sound[kind], seed, 0, count)
    assert found["escapes"] == []
    assert found["inputs"] == found["refused"] + found["read"] == count
    assert found["refused"] > count / 5


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(sound, kind) -> None:
    check(sound, kind, 1, 8 if kind in MODELS else 60)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(sound, kind) -> None:
    check(sound, kind, 2, 300 if kind in MODELS else 5000)


def test_what_escapes_is_told(sound, monkeypatch, tmp_path) -> None:
    """An exception of another kind, and an endless loop."""
    script = Path(fuzz_readers.__file__).read_text()
    here = "ROOT = Path(__file__).resolve().parent.parent"
    script = script.replace(here, f"ROOT = Path({str(fuzz_readers.ROOT)!r})")
    script = script.replace("SECONDS = 5 ", "SECONDS = 1 ")
    for body, told in (("1 / 0", "ZeroDivisionError"), ("while len(a) > 1: pass", "TooLong")):
        lines = f"    a = [1, 2]\n    def read(path):\n        {body}\n"
        broken = tmp_path / "broken.py"
        broken.write_text(script.replace("    read(sound)  #", f"{lines}    #", 1))
        monkeypatch.setattr(fuzz_readers, "__file__", str(broken))
        found = fuzz_readers.attack("txt", sound["txt"], 0, 0, 2)
        assert [e[1].split(":")[0] for e in found["escapes"]] == [told] * 2
