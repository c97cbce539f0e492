"""Mistakes on the command line: one line on stderr, exit code 2, no file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_text

import distillation
from lowbit import UserError
from lowbit.files.checkpoint import save_float32
from lowbit.files.packed import save_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.options import HYBRID_DEFAULTS, parse_options, settle_by_start
from lowbit.text.tokenizers import ByteTokenizer

Fails = Callable[..., str]


@pytest.fixture
def fails(
    tmp_path: Path,
    tiny_teacher: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Fails:
    """Runs a command that must fail and returns what it says; later flags win over the first."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*flags: str) -> str:
        base = ["--teacher", str(tiny_teacher), "--data", str(text_file), "--output_dir", "out"]
        before = {p for p in tmp_path.rglob("*") if not p.is_dir()}
        try:
            code: object = distillation.main([*base, *flags])
        except SystemExit as e:  # argparse
            code = e.code
        said = capsys.readouterr()
        assert code == 2
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.err.endswith("\n")
        assert said.out == ""
        assert {p for p in tmp_path.rglob("*") if not p.is_dir()} == before
        return said.err

    return run


# ---------------------------------------------------------------------------------- numbers

BAD_WORDS = ["nan", "inf", "-inf", "abc", "", "1_", "0x10", "1" + "0" * 400]
BAD_NUMBERS = {
    **{f: ["0", "-1", "1.5", "1e3"] for f in
       ("seq_len", "batch_size", "epochs", "eval_every", "data_clusters", "param_clusters",
        "cache_teacher")},
    **{f: ["-1", "0.5"] for f in ("samples_per_epoch", "clustering_warmup_epochs", "seed")},
    **{f: ["0", "-1", "-1e-9", "1e300"] for f in
       ("lr", "temperature", "initial_trust_radius", "max_grad_norm")},
    **{f: ["-1", "-1e-9"] for f in ("weight_decay", "hidden_weight")},
    "alpha": ["-0.1", "1.1"],
    **{f: ["-0.1", "1", "1.1"] for f in ("momentum", "adamw_momentum")},
}  # fmt: skip
NUMBERS = [(f, v) for f, values in BAD_NUMBERS.items() for v in [*values, *BAD_WORDS]]


@pytest.mark.parametrize(("flag", "value"), NUMBERS, ids=[f"{f}={v[:9]}" for f, v in NUMBERS])
def test_numbers_out_of_range(fails: Fails, flag: str, value: str) -> None:
    """Zero, negative, fractional, huge, NaN, infinite and no number, named by flag."""
    assert f"--{flag}: expected" in fails("--hybrid", f"--{flag}={value}")


@pytest.mark.parametrize(
    ("flag", "value"), [("seed", str(2**31 + 1)), ("initial_trust_radius", "1.01")]
)
def test_upper_bounds(fails: Fails, flag: str, value: str) -> None:
    assert f"--{flag}: expected" in fails("--hybrid", f"--{flag}", value)


@pytest.mark.parametrize("value", ["-1", "-0.5", "-inf"])
def test_a_negative_number_as_a_word_of_its_own(fails: Fails, value: str) -> None:
    assert "--lr: expected" in fails("--lr", value)


# ------------------------------------------------------------------------------ other flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--unknown-flag=3"], "--unknown_flag=3"),
        (["--tern"], "--tern"),  # no abbreviations
        (["stray"], "no such file or folder: stray"),  # goes to --data
        (["--lr"], "--lr: expected one argument"),
        (["--data"], "--data: expected at least one argument"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--lr_schedule", "step"], "invalid choice: 'step'"),
        (["--student_size", "huge"], "invalid choice: 'huge'"),
        (["--student_init", "zeros"], "invalid choice: 'zeros'"),
        (["--hybrid", "--use_clustering=maybe"], "expected true or false, not 'maybe'"),
        (["--hybrid=true"], "--hybrid"),
    ],
)
def test_unknown_flags_and_choices(fails: Fails, flags: list[str], message: str) -> None:
    said = fails("--output_dir", "out", *flags) if flags != ["stray"] else fails("--data", *flags)
    assert message in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((["--" + n], f"--{n} needs --hybrid") for n, v in HYBRID_DEFAULTS.items() if v is True),
        *(([f"--{n}=1"], f"--{n} needs --hybrid") for n in HYBRID_DEFAULTS
          if n.endswith(("clusters", "radius"))),
        (["--use_clustering=false"], "--use_clustering needs --hybrid"),
        (["--hybrid", "--optimizer", "muon"], "--optimizer muon contradicts --hybrid"),
        (["--adamw_momentum=0.9"], "--adamw_momentum needs --optimizer muon"),
        (["--learnable_scale"], "--learnable_scale needs --qat"),
        (["--quant_warmup=0.5"], "--quant_warmup needs --qat"),
        (["--hybrid", "--use_clustering=0", "--data_clusters=4"],
         "--data_clusters contradicts --use_clustering=false"),
        (["--hybrid", "--use_clustering=no", "--clustering_warmup_epochs=1"],
         "--clustering_warmup_epochs contradicts --use_clustering=false"),
        (["--hybrid", "--use_trust_region=off", "--initial_trust_radius=0.1"],
         "--initial_trust_radius contradicts --use_trust_region=false"),
        (["--hybrid", "--use_trust_region=off", "--trust_radius_adaptation"],
         "--trust_radius_adaptation contradicts --use_trust_region=false"),
        (["--hybrid", "--clustering_warmup_epochs=3", "--epochs=3"],
         "--clustering_warmup_epochs 3 leaves none of --epochs 3"),
        (["--student_size", "small", "--student_init", "teacher"],
         "--student_init teacher needs the teacher's shape"),
    ],
)  # fmt: skip
def test_contradictions(fails: Fails, flags: list[str], message: str) -> None:
    """Flags that cannot both be meant are refused, not resolved."""
    assert message in fails(*flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(fails: Fails) -> None:
    assert "--device cuda: this machine" in fails("--device", "cuda")


# ------------------------------------------------------------------------------------- text


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text in"),
        ("a.txt", b"\n \n", "no text in"),
        ("a.txt", b"\x7fELF\0\0\0", "a.txt is a binary file, not text"),
        ("a.txt", b"caf\xe9 " * 100, "a.txt is not UTF-8 (byte 3)"),
        ("a.txt", b"too short", "too few for windows of 128"),
        ("a.jsonl", b'{"text": "a"}\n{\n', "a.jsonl line 2"),
        ("a.jsonl", b'{"text": "\\udfff"}\n', "a.jsonl line 1"),
        ("a.pdf", b"text", "a.pdf: expected one of"),
    ],
)
def test_bad_text(fails: Fails, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Every unreadable text is named, with what is wrong with it."""
    assert message in fails("--data", write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["absent.txt", "absent", "x" * 300, ""])
def test_unknown_path(fails: Fails, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "none" / name)
    assert f"no such file or folder: {path}" in fails("--data", path)


def test_folder_without_text(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "files under" in fails("--data", str(tmp_path / "empty"))


def test_one_bad_path_among_good_ones(fails: Fails, text_file: Path) -> None:
    assert "absent.txt" in fails("--data", str(text_file), "absent.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "100000"], "--batch_size 100000: the text has only"),
        (["--hybrid", "--data_clusters", "5000"], "--data_clusters 5000: the text has only"),
        (["--samples_per_epoch", "100000"], "--samples_per_epoch 100000: the text has"),
        (["--seq_len", "513"], "--seq_len 513: the teacher reads at most 512"),
    ],
)
def test_more_than_the_text_or_teacher_has(fails: Fails, flags: list[str], message: str) -> None:
    assert message in fails(*flags)


def test_fewer_windows_than_default_clusters(fails: Fails, tmp_path: Path) -> None:
    """Also where the number of clusters is the default."""
    path = write(tmp_path, "a.txt", make_text(12_000).encode())
    said = fails("--data", path, "--hybrid", "--seq_len", "512", "--batch_size", "1",
                 "--samples_per_epoch", "0", "--data_clusters", "30")  # fmt: skip
    assert "--data_clusters 30" in said


# ---------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("name", ["absent.npz", "absent.pth", "x" * 300])
def test_missing_teacher(fails: Fails, name: str) -> None:
    assert f"--teacher: no such file or folder: {name}" in fails("--teacher", name)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_damaged_teacher(
    fails: Fails, tmp_path: Path, tiny_teacher: Path, suffix: str, damage: str
) -> None:
    """Both formats, named by file."""
    config = ModelConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        state = CausalLM(config).initialise(0).state_dict()
        save_float32(path, config, state, ByteTokenizer().describe())
    else:
        path.write_bytes(tiny_teacher.read_bytes())
    raw = path.read_bytes()
    middle = len(raw) // 2
    path.write_bytes(
        {
            "truncated": raw[:middle],
            "empty": b"",
            "text": b"hello\n" * 99,
            "flipped": raw[:100] + bytes(b ^ 255 for b in raw[100:]),
        }[damage]
    )
    assert f"teacher{suffix}" in fails("--teacher", str(path))


def test_teacher_of_another_kind(fails: Fails, text_file: Path) -> None:
    said = fails("--teacher", str(text_file))
    assert "expected embedded, smollm2, a Hugging Face folder, or a .gguf, .pth or .npz" in said


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize(("name", "size"), [("other", 300), ("other", 256), ("bytes", 300)])
def test_teacher_with_another_vocabulary(
    fails: Fails, tmp_path: Path, suffix: str, name: str, size: int
) -> None:
    """Refused by name and size before any text is read."""
    config = ModelConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = CausalLM(config).initialise(0)
    tokenizer = {"name": name, "vocab_size": size}
    path = tmp_path / f"foreign{suffix}"
    if suffix == ".npz":
        save_packed(path, model, tokenizer)
    else:
        save_float32(path, config, model.state_dict(), tokenizer)
    said = fails("--teacher", str(path), "--data", "absent.txt")
    assert f"vocabulary '{name}' of {size} is not one that can be read here" in said


# ----------------------------------------------------------------------------------- output


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_place_of_the_folder(fails: Fails, tmp_path: Path, below: str) -> None:
    """The file is named and left as it was."""
    file = tmp_path / "taken"
    file.write_text("mine")
    assert f"cannot write to {file}{below}" in fails("--output_dir", f"{file}{below}")
    assert file.read_text() == "mine"


def test_metrics_into_a_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()
    assert "is a folder" in fails("--metrics_out", str(tmp_path / "table.csv"))
    assert "must end in .csv" in fails("--metrics_out", str(tmp_path / "table.png"))


def test_a_loss_that_is_not_finite(
    tmp_path: Path, tiny_teacher: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that diverges ends with one error line and without files."""
    out = tmp_path / "out"
    code = distillation.main(
        ["--teacher", str(tiny_teacher), "--data", str(text_file), "--output_dir", str(out),
         "--seq_len", "16", "--batch_size", "2", "--samples_per_epoch", "20", "--epochs", "1",
         "--optimizer", "sgd", "--lr", "1e15", "--lr_schedule", "constant"]
    )  # fmt: skip
    errors = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
    assert code == 1  # a run that failed, not a mistake in the command
    assert errors == ["error: the loss is not finite; use a smaller --lr, or --hybrid"]
    assert list(out.iterdir()) == []


# ---------------------------------------------------------------------------------- process


@pytest.mark.parametrize(
    "flags", [["--lr", "zero"], ["--data", "absent.txt", "--teacher", "absent.npz"]]
)
def test_exit_code_without_traceback(tmp_path: Path, flags: list[str]) -> None:
    """As a program: exit code 2, one line, no traceback, nothing on stdout."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "distillation.py"), *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- spelling, defaults


def test_dashes_are_underscores() -> None:
    """Every spelling of a flag is the same option; values keep their dashes."""
    end = ["4", "--output_dir=my-out_dir", "--use_trust_region=false"]
    underscores = ["--hybrid", "--qat", "--learnable_scale", "--batch_size", *end]
    end = ["4", "--output-dir=my-out_dir", "--use-trust-region=false"]
    dashes = ["--hybrid", "--qat", "--learnable-scale", "--batch-size", *end]
    mixed = ["--save-metrics", "--initial-trust_radius", "0.5", "--hybrid"]
    assert parse_options(dashes) == parse_options(underscores)
    assert parse_options(dashes).output_dir == "my-out_dir"
    assert parse_options(mixed).initial_trust_radius == 0.5


@pytest.mark.parametrize("value", ["my-file.txt", "-", "a--b"])
def test_values_are_left_alone(value: str) -> None:
    assert parse_options(["--output-dir", value, "--data", value]).data == [value]
    assert parse_options([f"--output-dir={value}"]).output_dir == value


SPELLINGS = {"true": True, "1": True, "yes": True, "on": True, "TRUE": True,
             "false": False, "0": False, "no": False, "off": False, "False": False}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SPELLINGS.items())
@pytest.mark.parametrize("name", [n for n, v in HYBRID_DEFAULTS.items() if v is True])
def test_boolean_spellings(name: str, text: str, value: bool) -> None:
    """true, 1, yes, on and their opposites, in either case, with = or as the next word."""
    for words in ([f"--{name}={text}"], [f"--{name}", text]):
        assert getattr(parse_options(["--hybrid", *words]), name) is value


@pytest.mark.parametrize("name", [n for n, v in HYBRID_DEFAULTS.items() if v is True])
def test_a_bare_boolean_is_true(name: str) -> None:
    o = parse_options(["--hybrid", f"--{name}", "--ternary"])
    assert getattr(o, name) is True
    assert o.ternary


def test_defaults() -> None:
    """What is not given is filled in, by method where it depends on it."""
    plain, hybrid = parse_options([]), parse_options(["--hybrid", "--ternary", "--batch_size=4"])
    assert (plain.method, plain.mode) == ("adamw", "1bit")
    assert (hybrid.method, hybrid.mode) == ("hybrid", "ternary")
    assert {n: getattr(hybrid, n) for n in HYBRID_DEFAULTS} == HYBRID_DEFAULTS
    assert hybrid.samples_per_epoch is None  # until the text is known
    assert parse_options(["--samples_per_epoch=0"]).samples_per_epoch == 0
    assert parse_options(["--optimizer=muon"]).method == "muon"
    assert not plain.save_metrics
    assert parse_options(["--metrics_out=m.csv"]).save_metrics


@pytest.mark.parametrize(
    ("flags", "start", "expected"),
    [
        (["--hybrid", "--qat"], "teacher", (3e-4, 1e-5, 0.6, 0.0, False)),
        (["--hybrid", "--qat"], "random", (6e-3, 0.5, 0.8, 0.8, True)),
        (["--hybrid"], "random", (6e-3, 0.5, 0.8, 0.0, True)),
        (["--qat"], "random", (4e-3, 0.01, 0.9, 0.0, True)),
        (["--qat", "--quant_warmup=1"], "teacher", (1e-3, 0.01, 0.9, 1.0, False)),
        (["--hybrid", "--lr=1", "--momentum=0"], "random", (1, 0.5, 0, 0.0, True)),
        (["--hybrid", "--weight_decay=0"], "random", (6e-3, 0, 0.8, 0.0, True)),
        (["--optimizer=muon"], "random", (1e-2, 0.01, 0.95, 0.0, True)),
        (["--hybrid", "--use_matrix_geometry"], "teacher", (3e-4, 1e-5, 0.6, 0.0, True)),
    ],
)
def test_defaults_that_depend_on_the_start(flags, start, expected) -> None:
    o = parse_options(flags)
    o.student_init = start
    settle_by_start(o)
    found = (o.lr, o.weight_decay, o.momentum, o.quant_warmup, o.use_matrix_geometry)
    assert found == expected


def test_switching_off_what_is_off_is_no_contradiction() -> None:
    """Adaptation may be named false beside a trust region that is false."""
    o = parse_options(
        ["--hybrid", "--use_trust_region=false", "--trust_radius_adaptation=false",
         "--use_clustering=false", "--clustering_warmup_epochs=0"]
    )  # fmt: skip
    assert (o.use_trust_region, o.trust_radius_adaptation, o.use_clustering) == (False,) * 3


def test_contradictions_are_user_errors() -> None:
    """parse_options raises them for callers that are programs."""
    with pytest.raises(UserError, match="needs --qat"):
        parse_options(["--learnable_scale"])


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists every flag, says which defaults depend on what, and exits with 0."""
    with pytest.raises(SystemExit) as e:
        parse_options(["--help"])
    assert e.value.code == 0
    said = capsys.readouterr().out
    for name in vars(parse_options([])):
        if name not in ("method", "mode"):
            assert f"--{name}" in said
    said = " ".join(said.split())
    assert "(default: hybrid 0.6 / 0.8, muon 0.95, others 0.9; the second from random" in said
    assert "(default: false / true; the second from random weights)" in said


# ------------------------------------------------------------------ calibration, extra optimisers


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calibrate", "--qat", "--student_init", "random"], "--student_init teacher"),
        (["--calibrate", "--qat", "--learnable_scale"], "--learnable_scale"),
    ],
)
def test_calibration_that_cannot_be(fails, flags, words):
    assert words in fails("--ternary", *flags)


@pytest.mark.parametrize(
    ("name", "package"), [("schedulefree", "schedulefree"), ("prodigy", "prodigyopt")]
)
def test_missing_optimizer_package(fails, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in fails("--optimizer", name)


def test_a_path_with_line_breaks_gives_one_line(fails):
    assert "no\nsuch" not in fails("--teacher", "no\nsuch\nfile.npz")
