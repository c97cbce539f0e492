"""Processes that torchrun starts train one student, as one process would."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import same

import distillation
from lowbit.training import parallel
from lowbit.training.parallel import World, buckets

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "tests" / "one_of_several.py")

with_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="no gloo",
)


@pytest.fixture
def flags(tiny_teacher, text_file) -> list[str]:
    """Three epochs of three batches of five windows and one of one window, 12 steps."""
    words = "--seq_len 32 --batch_size 5 --samples_per_epoch 16 --epochs 3 --device cpu"
    words += " --hybrid --ternary --qat --calibration_tokens 1024"
    return [*words.split(), "--teacher", str(tiny_teacher), "--data", str(text_file)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    threads = str(torch.get_num_threads())
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": "lo",
    }


def two(folder: Path, *flags: str, happens: list | None = None, second: list[str] | None = None):
    """Two processes without torchrun, which would end one where the other fails. Returns exit
    code, stdout and lines on stderr of each. second: further flags of the second."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = []
    for rank in range(2):
        names = {**environment(), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, SCRIPT, str(folder), json.dumps(happens or []), *flags]
        command += ["--output_dir", str(folder / "out"), *((second or []) if rank else [])]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=names, stdout=pipe, stderr=pipe, text=True))
    found = []
    for process in started:
        if found:
            process.send_signal(signal.SIGCONT)  # to one that has been stopped
        out, err = process.communicate(timeout=300)
        lines = [x for x in err.replace("\r", "\n").splitlines() if x.strip()]
        found.append((process.returncode, out, [x for x in lines if "step/s" not in x]))
    return found


def torchrun(folder: Path, *words: str, happens: list, flags: list[str]):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", *words, SCRIPT, str(folder), json.dumps(happens), *flags]
    command += ["--output_dir", str(folder / "out"), "--save_every", "1"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def states(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(2)]


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "out" / "student_metrics.csv").open(newline="") as f:
        return [
            {k: float(v) for k, v in row.items() if v and "seconds" not in k}
            for row in csv.DictReader(f)
        ]


def events(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "out" / "events.jsonl").read_text().splitlines()
    return [(x["event"], x["step"]) for x in map(json.loads, lines)]


@with_gloo
def test_torchrun_trains_what_one_process_trains(flags, tmp_path, whole_validation):
    flags = [*flags, "--save_metrics", "--micro_batch_size", "2", "--max_grad_norm", "1"]
    one = tmp_path / "one"
    assert distillation.main([*flags, "--output_dir", str(one / "out")]) == 0
    done = torchrun(tmp_path, happens=[], flags=flags)
    assert done.returncode == 0, done.stderr
    same(*states(tmp_path))
    for found, wanted in zip(rows(tmp_path), rows(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    weights = [
        torch.load(x / "out" / "student_fp32.pth", weights_only=True)["state_dict"]
        for x in (tmp_path, one)
    ]
    for name, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][name], rtol=1e-4, atol=1e-5)
    assert [done.stdout.count(x) for x in ("Epoch 0", "SUMMARY", "student_fp32")] == [1, 1, 1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (one / "out").iterdir()
    )


@with_gloo
def test_a_number_that_is_not_finite_and_a_signal_to_one_process(flags, tmp_path, whole_validation):
    found = two(tmp_path, *flags, happens=[[1, 3, "nan"], [1, 6, int(signal.SIGTERM)]])
    saved = tmp_path / "out" / "checkpoints" / "0002-step-7"  # the next step tells the others
    assert [code for code, _, _ in found] == [143, 143]
    assert found[0][2] == [
        f"stopped at step 7 of 12, saved in {saved}; go on with --resume {tmp_path / 'out'}"
    ]
    assert found[1][1:] == ("", [])
    assert events(tmp_path) == [("skip", 3), ("stop", 7)]
    first, second = states(tmp_path)
    same(first, second)
    assert second["optimizer"]["plain"]["skipped_steps"] == 1

    refused = two(tmp_path, *flags)  # what process 0 alone sees
    assert [code for code, _, _ in refused] == [2, 2]
    assert len(refused[0][2]) == 1
    assert "holds a run that is not finished" in refused[0][2][0]
    assert refused[1][1:] == ("", [])

    assert distillation.main(["--resume", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("student_quantized_*.npz"))


@with_gloo
def test_a_process_that_is_killed_ends_the_others_and_torchrun_starts_them_again(flags, tmp_path):
    killed = [[1, 6, int(signal.SIGKILL)]]
    done = torchrun(tmp_path, "--max-restarts", "1", happens=killed, flags=[*flags, "--resume"])
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert line.startswith("error: another process has ended or does not answer (")
    assert line.endswith(f"; go on from the newest checkpoint with --resume {tmp_path / 'out'}")
    assert "Resumed at step 4 of 12" in done.stdout
    same(*states(tmp_path))


@with_gloo
@pytest.mark.parametrize(
    ("words", "second", "said"),
    [
        ("--batch_size 1", "", "--batch_size 1: fewer windows than 2 processes"),
        ("", "--teacher none.npz", "none.npz"),
        ("--batch_size x", "", "--batch_size"),
    ],
)
def test_what_is_refused_ends_all_in_one_line(flags, tmp_path, words, second, said):
    found = two(tmp_path, *flags, *words.split(), second=second.split())
    assert [code for code, _, _ in found] == [2, 2]
    (line,) = found[0][2]
    assert line.startswith("error: ")
    assert said in line
    assert found[1][1:] == ("", [])
    assert not list(tmp_path.glob("out/*"))


@with_gloo
@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("APL_HYBRID_TIMEOUT", "5")
    found = two(tmp_path, *flags, happens=[[1, 6, int(signal.SIGSTOP)]])
    assert [code for code, _, _ in found] == [1, 1]
    assert len(found[0][2]) == 1
    for _, _, lines in found:
        assert "does not answer" in lines[-1]
    assert lines[-1].endswith(" (process 1)")  # woken, it finds nobody to speak for it


def test_every_item_is_one_process_s():
    for count in range(1, 6):
        for n in range(1, 12):
            parts = [World(rank, count).part(n) for rank in range(count)]
            counted = [i for part, counts in parts if counts for i in range(n)[part]]
            assert counted == list(range(n))
            sizes = [len(range(n)[part]) for part, _ in parts]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1


def test_buckets_hold_each_tensor_once(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 64)
    rng = np.random.default_rng(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int8]
    tensors = [torch.zeros(n, dtype=dtypes[n % 3]) for n in rng.integers(0, 40, 50).tolist()]
    found = buckets(tensors)
    assert sorted(id(x) for bucket in found for x in bucket) == sorted(map(id, tensors))
    for bucket in found:
        assert len({x.dtype for x in bucket}) == 1
        assert len(bucket) == 1 or sum(x.nbytes for x in bucket) <= 64


@pytest.mark.parametrize("names", [{}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_one_process_asks_for_nobody(names):
    world = World.of(names)
    assert (world.rank, world.count) == (0, 1)
    assert world.first(lambda: 3) == world.after_first(lambda: 3) == 3
    assert not torch.distributed.is_available() or not torch.distributed.is_initialized()
