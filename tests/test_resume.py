"""A run that is stopped, killed or out of disk goes on where it was, to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_text
from families import tiny_folder
from resuming import HYBRID, PACKED, SMALL, events, kill, outcome, run, told

import distillation
from lowbit.files import saved_run
from lowbit.files.saved_run import Checkpoints, locked
from lowbit.options import make_parser
from lowbit.signals import Stop, Stopped
from lowbit.training import resume

# ----------------------------------------------------------------------- the same bits as without


CASES = [  # three epochs of three steps; between them every pair of what changes a step's state
    ("--hybrid --ternary --qat --save_metrics", 3),
    ("--hybrid --ternary --qat --save_metrics --micro_batch_size 2 --data_clusters 2", 4),
    ("--hybrid --ternary --qat --student_init random --student_size small --save_metrics", 5),
    ("--hybrid --qat --learnable_scale --use_auxiliary_nn=false --param_clusters 2", 7),
    ("--hybrid --ternary --use_clustering=false --use_matrix_geometry --momentum 0.5", 2),
    ("--hybrid --ternary --qat --clustering_warmup_epochs 1 --eval_every 2 --lr 0.01", 3),
    ("--hybrid --qat --clustering_warmup_epochs 1 --use_trust_region=false --seed 3", 4),
    ("--hybrid --ternary --qat --activation_checkpointing --max_grad_norm 1", 8),
    ("--hybrid --qat --initial_trust_radius 0.001 --trust_radius_adaptation=false", 5),
    ("--ternary --qat --optimizer adamw --save_metrics --lr_schedule wsd --weight_decay 1", 4),
    ("--ternary --qat --optimizer sgd --lr_schedule wsd --decay_fraction 0.4", 6),
    ("--qat --optimizer sgd --calibrate --temperature 2 --alpha 0.2 --hidden_weight 2", 6),
    ("--ternary --optimizer muon --quant_warmup 0.5 --qat --adamw_momentum 0.8", 5),
    ("--ternary --qat --optimizer schedulefree", 4),
    ("--ternary --qat --optimizer prodigy", 4),
    ("--hybrid --ternary --qat --cache_teacher 16 --temperature 2", 4),
    ("--hybrid --ternary --qat --target_bits 2.2", 5),
    ("--hybrid --ternary --qat --target_bits 2.2 --freeze_high_bits=false", 5),
    ("--hybrid --ternary --qat --save_metrics", 9),  # trained, but no file is written
]
#: Of a model that has layers and tokens of its own.
OF_TOKENS = (
    "--student_layers 2 --edge_blocks 1 0 --high_bits 4 --embedding_bits 4 --self_tokens 4000"
)


def test_every_flag_that_changes_training_is_tried():
    tried = {w.partition("=")[0] for words, _ in CASES for w in words.split()}
    tried |= {*OF_TOKENS.split(), *HYBRID}
    flags = {a.dest for a in make_parser()._actions} - resume.FREE - {"help"}
    assert {name for name in flags if f"--{name}" not in tried} == set()


@pytest.mark.parametrize(("words", "at"), CASES)
def test_stopped_and_resumed_is_the_same(flags, tmp_path, at_step, words, at):
    if "schedulefree" in words or "prodigy" in words:
        pytest.importorskip("schedulefree")
        pytest.importorskip("prodigyopt")
    flags += [*SMALL, *words.split(), "--calibration_tokens", "1024"]
    assert run(tmp_path / "whole", *flags) == 0
    at_step(at, kill(signal.SIGTERM))
    assert run(tmp_path / "parts", *flags) == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "parts").glob(PACKED)] == []
    assert distillation.main(["--resume", str(tmp_path / "parts")]) == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_a_model_of_transformers_in_a_fresh_process(tmp_path, at_step, whole_validation):
    pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text(make_text(40_000), encoding="utf-8")
    folder = tiny_folder(tmp_path / "model" / "llama", "llama")
    flags = [*HYBRID, "--teacher", str(folder), "--data", str(text), "self", *OF_TOKENS.split()]
    assert run(tmp_path / "whole", *flags) == 0
    at_step(5, kill(signal.SIGHUP))
    assert run(tmp_path / "parts", *flags) == 128 + signal.SIGHUP
    command = [sys.executable, str(ROOT / "distillation.py"), "--resume", str(tmp_path / "parts")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Resumed at step 5 of 9" in done.stdout
    assert "Resumed: 1" in done.stdout
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_killed_without_a_word(flags, tmp_path, at_step, monkeypatch):
    """What a process that is gone left: the checkpoint of the first epoch, and half of another."""
    flags += HYBRID
    assert run(tmp_path / "whole", *flags) == 0

    def die() -> None:
        raise MemoryError

    at_step(5, die)
    with pytest.raises(MemoryError):
        run(tmp_path / "parts", *flags, "--save_every", "1")
    part = tmp_path / "parts" / "checkpoints" / ".part-x"
    part.mkdir()
    (part / "student.pt").write_bytes(b"half")
    assert run(tmp_path / "parts", *flags, "--resume") == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_stopped_twice_and_from_an_older_checkpoint(flags, tmp_path, at_step):
    flags += HYBRID
    assert run(tmp_path / "whole", *flags) == 0
    at_step(2, kill(signal.SIGINT))
    assert run(tmp_path / "parts", *flags, "--keep", "5") == 130
    at_step(7, kill(signal.SIGINT))
    assert run(tmp_path / "parts", "--resume") == 130
    kept = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir())
    assert kept == ["0001-step-0", "0002-step-2", "0003-step-7"]
    older = tmp_path / "parts" / "checkpoints" / kept[1]
    assert distillation.main(["--resume", str(older)]) == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


# --------------------------------------------------------------------------------------- signals


def test_what_a_stopped_run_says(flags, tmp_path, at_step, capsys):
    at_step(4, kill(signal.SIGTERM))
    assert run(tmp_path / "out", *flags, *HYBRID) == 143
    folder = tmp_path / "out"
    assert told(capsys)[-1] == (
        f"stopped at step 4 of 9, saved in {folder}/checkpoints/0002-step-4; go on with "
        f"--resume {folder}"
    )
    assert [(e["event"], e["step"]) for e in events(folder)] == [("stop", 4)]


def test_a_second_signal_ends_at_once(flags, tmp_path, at_step, capsys):
    def twice() -> None:
        kill(signal.SIGTERM)()
        kill(signal.SIGINT)()

    at_step(4, twice)
    assert run(tmp_path / "out", *flags, *HYBRID) == 130
    assert told(capsys)[-1] == (
        f"interrupted; go on from the newest checkpoint with --resume {tmp_path / 'out'}"
    )
    assert Checkpoints(tmp_path / "out").newest().about["step"] == 0


def test_signals_before_training_and_what_is_ignored():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # nohup
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_while_files_are_written(flags, tmp_path, monkeypatch, capsys):
    flags += HYBRID
    assert run(tmp_path / "whole", *flags) == 0
    original = distillation.save_packed

    def interrupted(*args, **kwargs):
        kill(signal.SIGTERM)()
        return original(*args, **kwargs)

    monkeypatch.setattr(distillation, "save_packed", interrupted)
    assert run(tmp_path / "parts", *flags) == 143
    assert (
        f"write the student's files with --resume {tmp_path / 'parts'}" in capsys.readouterr().err
    )
    monkeypatch.setattr(distillation, "save_packed", original)
    assert run(tmp_path / "parts", "--resume") == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_signal_while_the_last_checkpoint_is_saved(flags, tmp_path, monkeypatch, capsys):
    flags += HYBRID
    folder = tmp_path / "out"
    original = Checkpoints.save

    def save(self, step, about, writers):
        if step == 9:
            kill(signal.SIGTERM)()
        return original(self, step, about, writers)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert run(folder, *flags) == 143
    assert told(capsys)[-1] == (
        f"stopped after the last step; write the files with --resume {folder}"
    )
    assert run(folder, "--resume") == 0


# ------------------------------------------------------------------------------- what is refused


def test_other_settings_are_listed(stopped, tmp_path, capsys):
    folder, _ = stopped
    before = outcome(folder)
    capsys.readouterr()
    assert run(folder, "--resume", "--lr", "0.01", "--alpha", "0.25") == 2
    error = told(capsys)
    assert error[-1].startswith("error: --resume: the run in ")
    assert "--alpha 0.5 (now 0.25), --lr 0.0003 (now 0.01)" in error[-1]
    other = tmp_path / "other.txt"
    other.write_text(make_text(30_000, seed=1), encoding="utf-8")
    assert run(folder, "--resume", "--data", str(other)) == 2
    assert "another text (fingerprint " in capsys.readouterr().err
    assert outcome(folder) == before


def test_an_interval_is_no_other_setting(stopped):
    folder, flags = stopped
    assert run(folder, *flags, "--resume", "--eval_every", "3", "--save_every", "1h") == 0


def test_an_unfinished_run_is_not_pushed_out(stopped, capsys):
    folder, flags = stopped
    before = outcome(folder)
    capsys.readouterr()
    assert run(folder, *flags) == 2
    assert "holds a run that is not finished; go on with --resume" in capsys.readouterr().err
    assert outcome(folder) == before


def test_nothing_to_resume(flags, tmp_path, capsys):
    flags += HYBRID
    assert run(tmp_path / "out", *flags, "--resume") == 0  # starts
    assert "Resumed" not in capsys.readouterr().out
    assert run(tmp_path / "out", *flags, "--resume") == 0
    (left,) = (tmp_path / "out").glob(PACKED)
    assert capsys.readouterr().out == (
        f"nothing to resume: the run in {tmp_path / 'out'} has finished and left {left.name}; to "
        "train again, give another --output_dir, or leave out --resume to replace it\n"
    )
    assert distillation.main(["--resume", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"error: --resume {tmp_path / 'none'}: no checkpoint is there\n"
    )


def test_a_text_that_shrinks_while_it_is_trained_on(flags, text_file, tmp_path, at_step):
    """It was read before the first step."""
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    flags += [*HYBRID, "--data", str(text)]
    assert run(tmp_path / "whole", *flags) == 0
    at_step(4, lambda: text.write_text("gone"))
    assert run(tmp_path / "shrunk", *flags) == 0
    assert text.read_text() == "gone"
    assert outcome(tmp_path / "shrunk") == outcome(tmp_path / "whole")


def test_two_runs_in_one_folder(flags, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder):
        assert run(folder, *flags, *HYBRID) == 2
    assert f"another run is writing to {folder}" in capsys.readouterr().err
    with locked(folder):
        pass


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "0m", "5d", "m", ""])
def test_intervals_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        distillation.main(["--save_every", text])
    assert "expected epochs (3) or a time (90s, 30m, 2h)" in capsys.readouterr().err


def test_a_checkpoint_is_named_from_within_its_folder(stopped, monkeypatch, capsys):
    folder, _ = stopped
    monkeypatch.chdir(folder / "checkpoints")
    assert distillation.main(["--resume", "0003-step-4"]) == 0
    assert list(folder.glob(PACKED))
    other = Path(shutil.copytree(folder, folder.parent / "elsewhere"))
    saved_run.Checkpoints(other).save(1, {}, {})
    path = other / "checkpoints" / "0001-step-1"
    moved = Path(shutil.copytree(path, folder.parent / "backup"))
    assert distillation.main(["--resume", str(moved)]) == 2
    assert "the folder around a checkpoint is checkpoints/" in told(capsys)[-1]


def test_an_older_checkpoint_becomes_the_newest(stopped, at_step):
    """What came after it is another future: not what a later --resume goes on with."""
    folder, _ = stopped
    older = next(iter((folder / "checkpoints").glob("*-step-3")))
    at_step(4, kill(signal.SIGTERM))
    assert distillation.main(["--resume", str(older), "--keep", "9"]) == 143
    found = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert found == ["0002-step-3", "0003-step-4", "0004-step-3", "0005-step-4"]
