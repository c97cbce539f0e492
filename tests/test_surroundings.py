"""What a run finds around it: names of any bytes, streams that are closed, no home, a notebook."""

from __future__ import annotations

import io
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_text

import distillation
from lowbit import UserError, chat, console, export, generate
from lowbit.console import Printer, complain, progress_bar
from lowbit.files.packed import load_packed
from lowbit.models.teacher import load_teacher
from lowbit.text import documents, self_written
from lowbit.text.corpus import load_corpus
from lowbit.text.self_written import written_by

QUICK = "--seq_len 16 --batch_size 2 --samples_per_epoch 4 --epochs 1"
ODD = os.fsdecode(b"caf\xe9")


@pytest.fixture
def words(tiny_teacher: Path, text_file: Path) -> list[str]:
    """Of a short run; later flags win."""
    return [*QUICK.split(), "--teacher", str(tiny_teacher), "--data", str(text_file)]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def process(argv: list[str], where: Path, redirect: str = "", **env: str):
    """A run of a program in a shell, which redirects it."""
    line = f'exec "$0" "$@" {redirect}' if "|" not in redirect else f'"$0" "$@" {redirect}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, sys.executable, *argv], cwd=where, timeout=300,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_sleep_unless_they_are_told_otherwise(given, expected) -> None:
    """Set before PyTorch is loaded."""
    code = """if True:
        import os, sys
        class Torch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))
                    sys.exit()
        sys.meta_path.insert(0, Torch())
        import distillation"""
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**kept, **given}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected


# ------------------------------------------------------------------------------------------ names


def test_names_that_are_not_utf8(words, tmp_path, tiny_teacher, capsys) -> None:
    """Text, its folder, teacher and metrics may have such names; what is told has escapes."""
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / f"{ODD}.txt").write_text(make_text(20_000))
    (folder / f"{ODD}.npz").write_bytes(tiny_teacher.read_bytes())
    student, text = str(folder / f"{ODD}.npz"), str(folder / f"{ODD}.txt")
    names = ["--teacher", student, "--data", str(folder), text]
    assert distillation.main([*words, *names, "--output_dir", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("*.npz"))
    capsys.readouterr()
    assert generate.main([student, "--tokens", "2"]) == 0
    assert chat.main([student, "--max_tokens", "2", "--prompt", "a", "--engine", "torch"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flag", "name"), [("data", f"{ODD}.txt"), ("teacher", f"{ODD}.npz"), ("output_dir", ODD)]
)
def test_an_error_names_them(words, tmp_path, monkeypatch, capsys, flag, name) -> None:
    """In one line; no file is made."""
    monkeypatch.chdir(tmp_path)
    assert distillation.main([*words, f"--{flag}", str(tmp_path / name)]) == 2
    assert "caf\\udce9" in one_line(capsys)
    assert not any(p.is_file() or p.name == ODD for p in tmp_path.rglob("*"))


def test_a_folder_of_transformers_is_not_called_damaged(tmp_path) -> None:
    (tmp_path / ODD).mkdir()
    with pytest.raises(UserError, match="the name is not UTF-8; rename it"):
        load_teacher(str(tmp_path / ODD))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_every_stream_says_them(monkeypatch, encoding) -> None:
    raw = [io.BytesIO(), io.BytesIO()]
    for stream, name in zip(raw, ("stdout", "stderr"), strict=True):
        errors = "strict" if name == "stdout" else "backslashreplace"
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, errors))
    Printer()(f"Wrote {ODD} \u2014")
    complain(f"error: {ODD} \u2014")
    assert b"caf\\udce9" in raw[0].getvalue()
    assert b"caf\\udce9" in raw[1].getvalue()


# ------------------------------------------------------------------------------ flags of programs


@pytest.mark.parametrize("name", ["teacher", "output_dir", "metrics_out", "data"])
def test_an_empty_path(words, tmp_path, monkeypatch, capsys, name) -> None:
    """Is not the current folder."""
    monkeypatch.chdir(tmp_path)
    assert distillation.main([*words, f"--{name}="]) == 2
    assert f"--{name}: " in (said := one_line(capsys))
    assert "empty path" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (generate, [""]), (chat, ["", "--prompt", "a"]),
        (export, ["", "--to", "gguf"]), (export, ["x.npz", "--to", "hf", "--output", ""]),
    ],
)  # fmt: skip
def test_an_empty_path_elsewhere(tmp_path, monkeypatch, capsys, program, flags) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"")
    assert program.main(flags) == 2
    assert "an empty path" in one_line(capsys) or flags[0]


BAD = {"seed": ["-1", str(2**64), "1.5", "x"], "temperature": ["-1", "nan", "inf", "1e400", "x"]}
OF_GENERATE = {**BAD, "tokens": ["0", "-1", "1e3", str(2**63), "9" * 5000], "prompt": ["\udce9"]}
OF_CHAT = {
    **BAD, "max_tokens": ["0", str(2**40)], "top_p": ["-1", "1.1", "nan"], "threads": ["0", "1e9"],
    "prompt": ["a\udce9"], "system": ["\udce9"], "stop": ["\udce9"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "flag", "value"),
    [(p, f, v) for p, all_ in ((generate, OF_GENERATE), (chat, OF_CHAT))
     for f, values in all_.items() for v in values],
)  # fmt: skip
def test_bad_values(tiny_teacher, capsys, program, flag, value) -> None:
    """One line that names the flag, before a model is loaded."""
    with pytest.raises(SystemExit) as e:
        program.main([str(tiny_teacher), f"--{flag}={value}"])
    assert e.value.code == 2
    assert f"--{flag}: expected" in one_line(capsys)


@pytest.mark.parametrize("value", ["1e-7", "1e-38", "1e-45", "1e-320", "0"])
def test_a_temperature_of_almost_nothing_is_the_most_likely_token(
    tiny_teacher, capsys, value
) -> None:
    flags = [str(tiny_teacher), "--tokens", "8", "--prompt", "ab"]
    assert generate.main([*flags, "--temperature", "0"]) == 0
    wanted = capsys.readouterr().out
    assert generate.main([*flags, "--temperature", value, "--seed", "7"]) == 0
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("value", ["1e-38", "1e30"])
def test_a_temperature_of_distillation_that_overflows(words, capsys, value) -> None:
    with pytest.raises(SystemExit):
        distillation.main([*words, "--temperature", value])
    assert "--temperature: expected" in one_line(capsys)


# ------------------------------------------------------------------------------------- notebooks


def flushes() -> bool:
    return not float(torch.tensor(1e-30) * torch.tensor(1e-10))


def test_a_run_leaves_the_process_as_it_was(words, tmp_path) -> None:
    """Denormals and matplotlib's backend; also after an error."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    assert distillation.main([*words, "--save_metrics", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "student_metrics.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend() == "svg"
    for before in (False, True):
        torch.set_flush_denormal(before)
        assert distillation.main([*words, "--seq_len", "100000"]) == 2
        assert flushes() is before


# --------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    "redirect", ["1>&- 2>&-", "1>&-", "2>/dev/full", "1>/dev/full", "2>&1 | head -1"]
)
def test_streams_that_are_closed_full_or_left(words, tmp_path, redirect) -> None:
    """The run ends as ever, with its files, and without a traceback."""
    done = process(
        [str(ROOT / "distillation.py"), *words, "--output_dir", "out"], tmp_path, redirect
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr + done.stdout
    assert load_packed(next((tmp_path / "out").glob("*.npz")))


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&1 | true"])
def test_an_error_that_nobody_reads(words, tmp_path, redirect) -> None:
    """Still ends with 2, and does not move to stdout."""
    done = process([str(ROOT / "distillation.py"), *words, "--data", "absent"], tmp_path, redirect)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize(
    "argv", [["-m", "lowbit.generate"], ["-m", "lowbit.chat", "--prompt", "a", "--engine", "torch"]]
)
def test_other_programs_whose_reader_has_gone(tiny_teacher, tmp_path, argv) -> None:
    done = process([*argv, str(tiny_teacher)], tmp_path, "| true")
    assert (done.returncode, done.stderr) == (0, b"")


class Stream(io.StringIO):
    def __init__(self, terminal: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.terminal, self.broken = terminal, broken

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.broken:
            raise BrokenPipeError
        return super().write(text)


def test_a_bar_in_a_file_is_a_line_now_and_then(monkeypatch) -> None:
    """None of a short run, and no carriage return."""
    monkeypatch.setattr(sys, "stderr", Stream())
    for _ in progress_bar(range(3000), mininterval=0):
        pass
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(console, "LINE_EVERY", 0.05)
    for _ in progress_bar(range(30), "Some", mininterval=0):
        time.sleep(0.01)
    lines = sys.stderr.getvalue().splitlines()
    assert 1 <= len(lines) <= 8
    assert all(line.startswith("Some: ") for line in lines)
    assert "\r" not in sys.stderr.getvalue()


def test_a_bar_on_a_terminal_is_drawn_over(monkeypatch) -> None:
    """And drawn again under a line that is written."""
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    monkeypatch.setattr(sys, "stdout", Stream(terminal=True))
    with progress_bar(total=2) as bar:
        drawn = sys.stderr.getvalue().count("0/2")
        Printer()("line")
        assert sys.stderr.getvalue().count("0/2") == drawn + 1
        bar.update(2)
    assert sys.stdout.getvalue() == "line\n"
    assert sys.stderr.getvalue().endswith("\r")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_whose_reader_has_gone(monkeypatch, terminal) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", Stream(terminal, broken=True))
    assert list(progress_bar(range(5), mininterval=0)) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------- home


@pytest.mark.parametrize("home", ["nobody", "unwritable"])
def test_without_a_home(tiny_teacher, tmp_path, monkeypatch, home) -> None:
    """Caches only cost time."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "nobody":
        monkeypatch.delenv("HOME", raising=False)

        def unknown(*_: object) -> None:
            raise KeyError

        monkeypatch.setattr(pwd, "getpwuid", unknown)
        with pytest.raises(RuntimeError):
            Path.home()
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(documents, "stdlib_documents", lambda: [("a", make_text(30_000))])
    monkeypatch.setattr(self_written, "LENGTH", 16)
    model, tokenizer = load_teacher(str(tiny_teacher))
    assert len(load_corpus([], 16, tokenizer).train)
    assert written_by(model, tokenizer, 10, seed=0).is_file()


# ---------------------------------------------------------------------------------------- teachers


def test_an_empty_name_of_a_teacher(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--teacher: an empty path"):
        load_teacher("")
