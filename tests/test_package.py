"""What is installed: a wheel, built from the sdist, of every module and nothing else."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser as Headers
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT

from lowbit import __main__ as versions
from lowbit import __version__
from lowbit.extras import EXTRAS

COMMANDS = ["apl-benchmark", "apl-chat", "apl-distill", "apl-export"]
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "site", "runs.jsonl", "*.png")


def test_modules_can_be_read_at_a_sitting():
    """All but the one file that drops into any project."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lowbit/**/*.py"), *ROOT.glob("studies/*.py")]
    assert len(sources) > 40
    lengths = {p.name: len(p.read_text("utf-8").splitlines()) for p in sources}
    assert {n for n, lines in lengths.items() if lines > 500} == {"hybrid_optimization.py"}


def build(what: str, source: Path) -> Path:
    """The file that pip's back end makes of a folder."""
    code = f"from setuptools import build_meta as b; print(b.build_{what}('made'))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=source, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return source / "made" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the repository, tests and benchmarks included."""
    copy = tmp_path_factory.mktemp("copy") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return build("sdist", copy)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as f:
        f.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return build("wheel", next(folder.iterdir()))


def test_the_wheel_holds_every_module_and_nothing_else(sdist, wheel):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lowbit/**/*.py"), *ROOT.glob("studies/**/*.py")]
    data = [ROOT / "lowbit/py.typed", *ROOT.glob("lowbit/data/*")]
    expected = {str(p.relative_to(ROOT)) for p in [*sources, *data]}
    assert "lowbit/data/teacher.npz" in expected
    with zipfile.ZipFile(wheel) as f:
        info = f"apl_hybrid-{__version__}.dist-info"
        assert {x for x in f.namelist() if not x.startswith(info)} == expected
        assert f"{info}/licenses/LICENSE" in f.namelist()
        about = Headers().parsestr(f.read(f"{info}/METADATA").decode())
        entries = f.read(f"{info}/entry_points.txt").decode()
    assert about["Version"] == __version__
    assert about.get_payload() == (ROOT / "README.md").read_text("utf-8")
    assert sorted(re.findall(r"^([\w-]+) = ", entries, re.M)) == COMMANDS
    with tarfile.open(sdist) as f:
        tops = {x.split("/")[1] for x in f.getnames() if "/" in x}
    assert not tops & {"tests", "benchmarks", "docs", "examples"}


def test_versions_are_printed(capsys):
    assert versions.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"apl-hybrid {__version__}, Python {platform.python_version()}, ")
    assert f"\ntorch {torch.__version__}, numpy {numpy.__version__}, " in said
    assert re.findall(r"^extra (\w+): ", said, re.M) == list(EXTRAS)
    assert versions.versions(["no-such-package"]) == "no-such-package missing"


@pytest.mark.slow
def test_an_installed_wheel_trains(wheel, tmp_path, text_file):
    """In a folder of its own, away from the repository: commands, package data, a student."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}

    def run(command: str, *flags: str) -> str:
        return subprocess.run(
            [site / "bin" / command, *flags],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    for command in COMMANDS:
        assert run(command, "--help").startswith(f"usage: {command} ")
    short = "--epochs 1 --samples_per_epoch 8 --batch_size 2 --seq_len 32"
    said = run("apl-distill", *short.split(), "--ternary", "--qat", "--data", str(text_file))
    assert "Wrote student/student_quantized_ternary_1.58bit_qat.npz" in said
    assert run("apl-chat", "student", "--prompt", "Return", "--max_tokens", "4").strip()
    code = "import lowbit, hybrid_optimization as h; print(lowbit.__file__, h.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert where == [str(site / "lowbit/__init__.py"), str(site / "hybrid_optimization.py")]
