"""The main job from the command line to its files: what is printed, written and trained."""

from __future__ import annotations

import copy
import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_folder, write_gguf

import distillation
from lowbit.files.checkpoint import load_float32
from lowbit.files.packed import load_packed
from lowbit.options import parse_options, settle_by_start
from lowbit.quantization.layers import low_bit_layers
from lowbit.training.baselines import Baseline
from lowbit.training.step import make_manager

ROOT = Path(__file__).parent.parent
SMALL = [
    "--seq_len",
    "32",
    "--batch_size",
    "4",
    "--samples_per_epoch",
    "12",
    "--calibration_tokens",
    "2048",
]


@pytest.fixture
def run(tmp_path, text_file, tiny_teacher, capsys):
    """Run distillation on a small text and teacher; returns (exit code, lines, folder)."""

    def go(*flags: str, small: bool = True) -> tuple[int, list[str], Path]:
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        common = ["--data", str(text_file), "--teacher", str(tiny_teacher), "--device", "cpu"]
        code = distillation.main(
            [*common, "--output_dir", str(folder), *(SMALL if small else []), *flags]
        )
        return code, capsys.readouterr().out.splitlines(), folder

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_float32(folder / "student_fp32.pth")[0].state_dict()


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


# ------------------------------------------------------------------------------ what is printed

NUMBER = r"\d+\.\d{6}"
CONTRACT = [
    r"Initialized hybrid optimization with 8 data clusters and auxiliary NN guidance",
    r"Before training, validation loss: teacher \d\.\d{4}, student \d\.\d{4} \(calibrated\)",
    rf"Epoch 0, Loss: {NUMBER}, LR: {NUMBER}, Trust Radius: {NUMBER}",
    rf"Epoch 1, Loss: {NUMBER}, LR: {NUMBER}, Trust Radius: {NUMBER}",
    r"Validation loss of the quantized student: \d\.\d{4} before training, \d\.\d{4} after",
    r"HYBRID OPTIMIZATION SUMMARY",
    r"={60}",
    r"Total Steps: 6",
    rf"Final Loss: {NUMBER}",
    r"Avg Learning Rate Multiplier: \d+\.\d\dx",
    r"Constraint Activation Rate: \d+\.\d%",
    rf"Final Trust Radius: {NUMBER}",
    r"={60}",
    r"Validation loss, nats a byte \(\d+ windows of 32 held-out bytes\):",
    r"  teacher +\d\.\d{4}",
    r"  student, quantized +\d+\.\d{4} \+- \d\.\d{4} \(.*% against the teacher; KL .* \d\.\d{4}\)",
    r"  student, latent fp32 +\d+\.\d{4} \(.*% against the teacher\)",
    r"Size: [\d,]+ bytes packed, [\d,]+ in float32: \d+\.\dx smaller; .*",
    r"Sample: Return the .*",
]


def test_printed_contract(run):
    code, lines, folder = run("--hybrid", "--ternary", "--qat", "--epochs", "2", "--save_metrics")
    assert code == 0
    for pattern, line in zip(CONTRACT, lines, strict=False):
        assert re.fullmatch(pattern, line), (pattern, line)
    names = [
        "student_fp32.pth",
        "student_quantized_ternary_1.58bit_qat.npz",
        "student_metrics.csv",
        "student_metrics.png",
    ]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert [x for x in lines if x.startswith("Wrote")] == [f"Wrote {folder / n}" for n in names]
    assert lines[-1] == (
        f'Talk to it: python -m lowbit.generate {folder / names[1]} --prompt "Return the "'
    )


def test_metrics_rows(run):
    _, _, folder = run(
        "--hybrid",
        "--ternary",
        "--qat",
        "--epochs",
        "3",
        "--save_metrics",
        "--data_clusters",
        "3",
        "--eval_every",
        "2",
    )
    rows = rows_of(folder / "student_metrics.csv")
    assert [r["epoch"] for r in rows] == ["0", "1", "2"]
    assert [r["step"] for r in rows] == ["3", "6", "9"]
    assert [bool(r["val_loss_quantized"]) for r in rows] == [False, True, True]
    for row in rows:
        assert float(row["lr"]) > 0
        assert 0.1 <= float(row["lr_multiplier"]) <= 10
        assert 0 <= float(row["activation_rate"]) <= 1
        assert 0 <= float(row["code_flips"]) <= 1
        assert "kl_cluster_2" in row
        assert "kl_cluster_3" not in row
        assert 0 < float(row["step_taken"]) <= float(row["step_asked"])
        blocks = [float(v) for k, v in row.items() if k.startswith("code_flips_block_")]
        assert min(blocks) <= float(row["code_flips"]) <= max(blocks)
    assert float(rows[0]["code_flips"]) > 0
    guide = ROOT.joinpath("HYBRID_OPTIMIZATION_GUIDE.md").read_text()
    table = guide.partition("*The CSV*")[2].partition("`student_metrics.png`")[0]
    told = {re.sub(r"\d+$", "0", name) for name in re.findall(r"`(\w+)`", table)}
    assert {re.sub(r"\d+$", "0", name) for name in rows[0]} <= told
    assert float(rows[0]["seconds"]) < float(rows[2]["seconds"])
    png = (folder / "student_metrics.png").read_bytes()
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "strengths"),
    [
        (["--hybrid"], [2 / 9.6, 5 / 9.6, 8 / 9.6, 1]),  # four epochs of three steps, 0.8 of them
        (["--hybrid", "--quant_warmup=0"], [1, 1, 1, 1]),
        (["--quant_warmup=0.5"], [2 / 6, 5 / 6, 1, 1]),
        ([], [1, 1, 1, 1]),
    ],
)
def test_quantization_warms_up_from_scratch(run, flags, strengths):
    _, _, folder = run(
        "--ternary", "--qat", "--student_init=random", "--epochs=4", "--save_metrics", *flags
    )
    rows = rows_of(folder / "student_metrics.csv")
    assert [float(r["quant_strength"]) for r in rows] == pytest.approx(strengths)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--ternary", "--qat"], "student_quantized_ternary_1.58bit_qat.npz"),
        (["--ternary"], "student_quantized_ternary_1.58bit.npz"),
        (["--qat"], "student_quantized_1bit_qat.npz"),
        ([], "student_quantized_1bit.npz"),
    ],
)
def test_files(run, flags, name):
    """The packed file holds codes x scale, and is exactly the quantised latent checkpoint."""
    code, _, folder = run(*flags, "--epochs", "1")
    assert code == 0
    assert sorted(p.name for p in folder.iterdir()) == sorted(["student_fp32.pth", name])
    model, vocabulary, notes = load_packed(folder / name)
    assert vocabulary == {"name": "bytes", "vocab_size": 256}
    assert notes["steps"] == 3
    row = model.model.layers[0].mlp.up_proj.weight[0].unique().tolist()
    assert len(row) <= (3 if "--ternary" in flags else 2)
    assert row == sorted(-x for x in row)


def test_what_is_trained_is_what_is_stored(run, monkeypatch):
    """Logits of the file, loaded again, equal the logits of the trained quantised student."""
    kept = {}
    original = distillation.save

    def save(s, *others):
        kept["student"], kept["windows"] = copy.deepcopy(s.student), s.corpus.validation[:4]
        original(s, *others)

    monkeypatch.setattr(distillation, "save", save)
    _, _, folder = run("--hybrid", "--ternary", "--qat", "--epochs", "1", "--learnable_scale")
    ids = torch.from_numpy(kept["windows"].astype(np.int64))
    loaded, _, _ = load_packed(folder / "student_quantized_ternary_1.58bit_qat.npz")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids).logits, kept["student"](ids).logits, rtol=1e-5, atol=1e-5
        )


def test_same_seed_same_weights(run):
    flags = ["--hybrid", "--ternary", "--qat", "--epochs", "2"]
    (_, _, a), (_, _, b), (_, _, c) = run(*flags), run(*flags), run(*flags, "--seed", "1")
    assert equal(weights(a), weights(b))
    assert not equal(weights(a), weights(c))


def test_eval_and_metrics_leave_training_alone(run):
    flags = ["--hybrid", "--ternary", "--qat", "--epochs", "2"]
    (_, _, a), (_, _, b) = run(*flags), run(*flags, "--eval_every", "2", "--save_metrics")
    assert equal(weights(a), weights(b))


def test_every_parameter_moves(run, tiny_teacher):
    _, _, folder = run("--hybrid", "--ternary", "--qat", "--epochs", "1")
    start = load_packed(tiny_teacher)[0].state_dict()
    end = weights(folder)
    assert all(not torch.equal(start[k], end[k]) for k in start)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.01"],
        ["--weight_decay", "10"],
        ["--max_grad_norm", "0.001"],
        ["--data_clusters", "2"],
        ["--param_clusters", "1"],
        ["--use_clustering=false"],
        ["--use_auxiliary_nn=false"],
        ["--use_trust_region=false"],
        ["--initial_trust_radius", "0.002"],
        ["--trust_radius_adaptation=false"],
        ["--clustering_warmup_epochs", "1"],
        ["--student_init", "random"],
        ["--temperature", "3"],
        ["--alpha", "0.1"],
        ["--hidden_weight", "0"],
        ["--lr_schedule", "cosine"],
        ["--seq_len", "16"],
        ["--batch_size", "3"],
        ["--samples_per_epoch", "20"],
        ["--learnable_scale"],
        ["--calibrate=false"],
        ["--quant_warmup", "1"],
        ["--student_size", "small", "--student_init", "random"],
    ],
    ids=lambda f: " ".join(f),
)
def test_each_flag_changes_the_result(run, flags):
    base = ["--hybrid", "--ternary", "--qat", "--epochs", "2", "--lr", "0.004"]
    narrow = ["--initial_trust_radius", "0.001"]  # the region cuts from the first step
    (_, _, a) = run(*base, *narrow)
    (code, _, b) = run(*base, *([] if "--use_trust_region=false" in flags else narrow), *flags)
    assert code == 0
    before, after = weights(a), weights(b)
    assert before.keys() != after.keys() or not equal(before, after)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "schedulefree", "prodigy"])
def test_baselines_train(run, name):
    code, lines, folder = run(
        "--ternary", "--qat", "--epochs", "3", "--optimizer", name, "--save_metrics"
    )
    assert code == 0
    assert re.fullmatch(r"Before training, .*, student \d\.\d{4} \(rounded\)", lines[0])
    assert re.fullmatch(rf"Epoch 0, Loss: {NUMBER}, LR: {NUMBER}", lines[1])
    assert "TRAINING SUMMARY" in lines
    assert not any("HYBRID" in x for x in lines)
    losses = [float(r["train_loss"]) for r in rows_of(folder / "student_metrics.csv")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["hybrid", "adamw", "sgd", "muon", "schedulefree", "prodigy"])
def test_momentum_and_rate_reach_every_optimizer(text_file, tiny_teacher, name):
    words = ["--momentum", "0.5", "--lr", "0.0123", "--device", "cpu", *SMALL]
    words += ["--adamw_momentum", "0.7"] if name == "muon" else []
    words += ["--data", str(text_file), "--teacher", str(tiny_teacher)]
    words += ["--hybrid"] if name == "hybrid" else ["--optimizer", name]
    setup = distillation.set_up(parse_options(words))
    if name == "hybrid":
        config = make_manager(setup).config
        assert (config.momentum, config.base_learning_rate) == (0.5, 0.0123)
        return
    baseline = Baseline(setup.options, setup.student, setup.max_steps)
    group = baseline.optimizers[0].param_groups[0]
    assert (group["betas"][0] if "betas" in group else group["momentum"]) == 0.5
    assert group["d_coef" if name == "prodigy" else "lr"] == 0.0123
    if name == "muon":
        assert baseline.optimizers[1].param_groups[0]["betas"] == (0.7, 0.95)


def test_schedule_free_has_no_schedule_unless_asked():
    def schedule(*flags: str, vocabulary: str = "transformers") -> tuple[str, float]:
        o = parse_options(flags)
        settle_by_start(o, vocabulary)
        return o.lr_schedule, o.decay_fraction

    free = ("--optimizer", "schedulefree")
    assert schedule(*free)[0] == "constant"
    assert schedule(*free, "--lr_schedule", "linear")[0] == "linear"
    assert schedule()[0] == "linear"
    assert schedule("--hybrid", "--qat") == ("wsd", 0.5)
    assert schedule("--hybrid", "--qat", vocabulary="bytes") == ("linear", 0.2)
    assert schedule("--hybrid", "--student_init", "random") == ("linear", 0.2)


def test_ternary_without_qat_trains_in_full_precision(run, monkeypatch):
    seen = []
    original = distillation.train

    def train(s, say, **kwargs):
        seen.append(len(list(low_bit_layers(s.student))))
        return original(s, say, **kwargs)

    monkeypatch.setattr(distillation, "train", train)
    run("--ternary", "--epochs", "1")
    run("--ternary", "--qat", "--epochs", "1")
    assert seen == [0, 8]  # seven linear layers and the embedding of one block


def test_an_epoch_is_sixteen_batches_by_default(run):
    _, lines, _ = run("--epochs", "2", "--batch_size", "2", "--seq_len", "32", small=False)
    assert "Total Steps: 32" in lines


def test_whole_text_epoch(run):
    _, lines, _ = run("--epochs", "1", "--samples_per_epoch", "0", "--batch_size", "100")
    steps = int(next(x for x in lines if x.startswith("Total Steps")).split()[-1])
    assert steps > 10


def test_own_checkpoints_serve_as_teachers(run, tmp_path):
    _, _, folder = run("--ternary", "--qat", "--epochs", "1")
    for name in ("student_fp32.pth", "student_quantized_ternary_1.58bit_qat.npz"):
        code, _, _ = run("--epochs", "1", "--teacher", str(folder / name))
        assert code == 0


def test_metrics_out(run, tmp_path):
    path = tmp_path / "elsewhere" / "m.csv"
    _, _, folder = run("--epochs", "1", "--metrics_out", str(path))
    assert rows_of(path)
    assert path.with_suffix(".png").exists()
    assert not (folder / "student_metrics.csv").exists()


# ----------------------------------------------------------------------------- the documentation


def documented_commands(name: str) -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)
    lines = [x for block in blocks for x in block.replace("\\\n", " ").splitlines()]
    return [
        m.group(1).split("#")[0].strip()
        for x in lines
        if (m := re.search(r"(python distillation\.py.*)", x))
    ]


@pytest.mark.parametrize("name", ["README.md", "QUICKSTART.md", "HYBRID_OPTIMIZATION_GUIDE.md"])
def test_documented_commands_run(name, run, tmp_path_factory):
    """Every distillation command of the page, on the small text and shortened."""
    base = tmp_path_factory.mktemp("teachers")
    folder, gguf = tiny_folder(base / "llama", "llama"), write_gguf(base / "tiny.gguf")
    commands = documented_commands(name)
    assert commands
    for command in commands:
        flags = shlex.split(command)[2:]
        if flags[:2] == ["--resume", "student"]:  # of a run that was stopped: test_resume.py
            continue
        shrink = ["--epochs", "2", "--seq_len", "32", "--samples_per_epoch", "40"]
        shrink += ["--calibration_tokens", "2048"]
        if "--data" in flags:  # the page's own paths stand for the reader's
            at = flags.index("--data")
            end = next((i for i in range(at + 1, len(flags)) if flags[i].startswith("--")), None)
            flags = flags[:at] + (flags[end:] if end else [])
        if "--batch_size" not in flags:
            shrink += ["--batch_size", "4"]
        if "--teacher" in flags:  # the reader's own: a tiny one of its kind
            at = flags.index("--teacher") + 1
            flags[at] = str(gguf if flags[at].endswith(".gguf") else folder)
        kept = [
            f
            for i, f in enumerate(flags)
            if f != "--output_dir" and (i == 0 or flags[i - 1] != "--output_dir")
        ]
        code, lines, _ = run(*kept, *shrink, small=False)
        assert code == 0, command
        assert any(x.startswith("Wrote") for x in lines)


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in vars(parse_options([])).keys() - {"method", "mode"}:
        assert f"--{flag}" in text
    for group in ("what is trained", "text", "training", "hybrid optimisation", "output"):
        assert f"\n{group}:" in text


def test_the_script_on_the_embedded_teacher(tmp_path):
    """As a newcomer runs it, in a process of its own, but on a short text: the student improves on
    plain rounding."""

    def go(*flags):
        return subprocess.run(
            [
                sys.executable,
                str(ROOT / "distillation.py"),
                "--ternary",
                "--epochs",
                "1",
                "--batch_size",
                "4",
                "--seq_len",
                "64",
                "--lr",
                "1e-3",
                "--data",
                str(ROOT / "QUICKSTART.md"),
                "--output_dir",
                str(tmp_path / "student"),
                *flags,
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )

    rounded = go("--samples_per_epoch", "4", "--weight_decay", "0")
    trained = go("--hybrid", "--qat", "--samples_per_epoch", "160")

    def loss(result):
        assert result.returncode == 0, result.stderr
        return float(re.search(r"student, quantized +(\S+)", result.stdout)[1])

    assert loss(trained) < loss(rounded) - 0.2
    assert "Traceback" not in trained.stderr


# ------------------------------------------------------------------------------------ calibration


def quantized_loss(lines: list[str]) -> float:
    line = next(x for x in lines if "student, quantized" in x)
    return float(line.split()[2])


@pytest.mark.parametrize("bits", [["--ternary"], []])
def test_rounding_at_the_end_is_better_calibrated(run, bits):
    flags = ["--hybrid", *bits, "--epochs", "2"]
    (_, a, calibrated), (_, b, nearest) = run(*flags), run(*flags, "--calibrate=false")
    assert equal(weights(calibrated), weights(nearest))  # training is the same
    assert quantized_loss(a) < quantized_loss(b)


def test_other_optimisers_can_start_calibrated(run):
    flags = ["--ternary", "--qat", "--epochs", "1", "--lr", "1e-6"]
    (_, a, _), (_, b, _) = run(*flags, "--calibrate"), run(*flags)
    kl = [float(re.search(r"teacher (\d\.\d+)\)", "".join(x))[1]) for x in (a, b)]
    assert kl[0] < kl[1]


@pytest.mark.parametrize("how", ["ascii", "closed"])
def test_what_cannot_be_printed_loses_no_file(tmp_path, text_file, tiny_teacher, how):
    """A terminal that knows only ASCII, and a reader that has gone after the first line."""
    words = ["--data", str(text_file), "--teacher", str(tiny_teacher), *SMALL, "--epochs", "2"]
    command = [sys.executable, "distillation.py", *words, "--hybrid", "--ternary", "--qat"]
    command += ["--save_metrics", "--output_dir", str(tmp_path / "o")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    ran = subprocess.Popen(
        command, cwd=ROOT, env=environment if how == "ascii" else None,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if how == "closed":
        ran.stdout.readline()
        ran.stdout.close()
        err = ran.stderr.read()
        ran.stderr.close()
    else:
        out, err = ran.communicate()
        assert "Wrote" in out
    assert ran.wait() == 0
    assert "Error" not in err
    assert {p.suffix for p in (tmp_path / "o").iterdir()} >= {".npz", ".pth", ".csv"}
