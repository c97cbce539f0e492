"""Statistics of the studies against hand-made cases, and the log of runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from toys import toy_run

from lowbit import UserError
from studies import bench as study
from studies.bench import (
    RunLog,
    estimate,
    gap_reduction,
    mean_interval,
    ratio,
    smallest_horizon,
    steps_ratio,
)


def test_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([1.0])[1])


def test_a_common_factor_leaves_no_uncertainty():
    """Pairing: seeds that differ wildly but by the same factor in both methods."""
    base = [1.0, 10.0, 100.0]
    found = ratio([0.5 * x for x in base], base)
    assert found["value"] == pytest.approx(0.5)
    assert found["ci95"] == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="pair"):
        ratio([1.0], base)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        x = rng.normal(size=20)
        low, high = estimate(lambda i, x=x: float(x[i].mean()), 20)["ci95"]
        hits += low <= 0 <= high
    assert 49 <= hits <= 60  # 95 % nominal, a little less for 20 seeds


def test_smallest_horizon():
    losses = {100: [3.0, 3.0], 200: [2.0, 1.0], 300: [1.0, 1.0]}
    everyone = np.arange(2)
    assert smallest_horizon(losses, 1.5, everyone) == 200
    assert smallest_horizon(losses, 1.49, everyone) == 300
    assert smallest_horizon(losses, 0.5, everyone) == math.inf
    assert smallest_horizon(losses, 1.5, np.array([0, 0])) == 300


def test_steps_ratio_is_the_strict_rule():
    found = steps_ratio({100: [1.1, 1.1], 200: [0.9, 0.9]}, [1.0, 1.0], 400)
    assert found["value"] == 0.5
    assert found["ci95"] == [0.5, 0.5]
    missed = steps_ratio({100: [1.1, 1.1]}, [1.0, 1.0], 400)
    assert missed["value"] == math.inf
    one = steps_ratio({100: [0.9]}, [1.0], 400)
    assert one["value"] == 0.25
    assert all(map(math.isnan, one["ci95"] + one["paired_t95"]))


def test_steps_ratio_by_paired_t_intervals():
    """Differences of mean -0.1 and standard deviation 0.1 in three seeds: +- 0.248."""
    spread = np.array([-0.1, 0.0, 0.1])
    losses = {h: (1 + mean + spread).tolist() for h, mean in ((100, 0.3), (200, -0.1), (300, -0.3))}
    found = steps_ratio(losses, [1.0, 1.0, 1.0], 400)
    assert found["paired_t95"] == [0.5, 0.75]
    assert steps_ratio({100: losses[100]}, [1.0, 1.0, 1.0], 400)["paired_t95"] == [math.inf] * 2


def test_gap_reduction():
    found = gap_reduction([1.3, 1.3], [1.1, 1.1], [1.0, 1.0])
    assert found["value"] == pytest.approx(2 / 3)


def test_log_tells_timed_runs_from_results(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    log.append({"method": "a", "purpose": "timing"})
    assert log.find({"method": "a"}) is None
    assert log.find({"method": "a", "purpose": "timing"}) is not None


def test_log_finds_runs_and_survives_a_killed_writer(tmp_path):
    path = tmp_path / "runs.jsonl"
    log = RunLog(path)
    key = {"method": "A", "seed": 0, "flags": ["--x", "1"]}
    assert log.find(key) is None
    log.append({**key, "loss": 1.0})
    with path.open("a") as f:
        f.write('{"method": "A", "se')
    log = RunLog(path)
    assert log.find(key) == {**key, "loss": 1.0}
    assert log.find({**key, "seed": 1}) is None
    log.append({**key, "seed": 1, "loss": 3.0})
    assert [r["loss"] for r in RunLog(path).runs] == [1.0, 3.0]


def test_runs_alternate_by_the_share_that_is_done(tmp_path, monkeypatch):
    """Two runs of 2 and 4 epochs: never both at once, and whoever has done less goes next."""
    monkeypatch.setattr(study, "START_METHOD", "fork")
    log = tmp_path / "log"

    def run(name, epochs, turn):
        for epoch in range(epochs):
            with log.open("a") as f:
                f.write(f"{name} {epoch / epochs}\n")
            assert turn((epoch + 1) / epochs) >= 0
        return name

    runs = [partial(run, "short", 2), partial(run, "long", 4)]
    assert study.alternate(runs) == ["short", "long"]
    assert log.read_text().splitlines() == [
        "short 0.0", "long 0.0", "long 0.25", "short 0.5", "long 0.5", "long 0.75",
    ]  # fmt: skip


def test_a_run_that_fails_is_heard_of(monkeypatch):
    monkeypatch.setattr(study, "START_METHOD", "fork")

    def fail(turn):
        turn(0.5)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        study.alternate([fail, lambda turn: turn(0.2)])


# --------------------------------------------------------------------------------- runs at once


@pytest.fixture
def notes(tmp_path):
    """A file to which toy runs write; it names the method, too."""
    return str(tmp_path / "notes")


def test_parts_of_a_study_share_their_runs(tmp_path, notes):
    """Two parts want overlapping runs at the same time: each run is done and logged once."""
    bench = study.Bench(tmp_path, 2, "cpu", toy_run, {notes: []})
    keys = [bench.key(notes, "", 16, seed) for seed in range(4)]
    parts = [partial(bench.run, keys[:3]), partial(bench.run, keys[:0:-1])]
    found = bench.together(parts)
    processes = list(bench._pool._processes.values())
    bench.close()
    assert [p.exitcode for p in processes] == [0, 0]  # not killed: they clean up behind them
    assert [[r["final_loss"] for r in rs] for rs in found] == [[0, 1, 2], [3, 2, 1]]
    assert len(Path(notes).read_text().splitlines()) == 4
    assert sorted(r["seed"] for r in RunLog(tmp_path / "runs.jsonl").runs) == [0, 1, 2, 3]


def test_a_part_that_fails_ends_the_study_and_finished_runs_stay(tmp_path, notes):
    bench = study.Bench(tmp_path, 2, "cpu", toy_run, {notes: []})
    good = bench.run([bench.key(notes, "", 16, 0)])
    bad = bench.key(notes, "", 16, 1, ["fail"])
    with pytest.raises(ValueError, match="no"):
        bench.together([partial(bench.run, [bad]), partial(bench.run, [bad])])
    assert RunLog(tmp_path / "runs.jsonl").runs == good


def test_a_failure_wakes_a_part_that_waits_for_more_runs_than_fit(tmp_path, notes):
    """The other part's runs would last minutes, and most of them have not begun."""
    bench = study.Bench(tmp_path, 2, "cpu", toy_run, {notes: []})
    bad = bench.key(notes, "", 16, 1, ["fail"])
    long = [bench.key(notes, "", 16, seed, ["last"]) for seed in range(9)]
    with pytest.raises(ValueError, match="no"):
        bench.together([partial(bench.run, [bad]), partial(bench.run, long)])
    assert len(Path(notes).read_text().splitlines()) <= 3


def test_a_summary_from_the_log_alone(tmp_path, notes):
    bench = study.Bench(tmp_path, 1, "cpu", toy_run, {notes: []})
    key, other = (bench.key(notes, "", 16, seed) for seed in range(2))
    bench.run([key])
    bench = study.Bench(tmp_path, 1, "cpu", toy_run, {notes: []}, from_log=True)
    assert bench.run([key])[0]["final_loss"] == 0
    assert bench.missing([key]) == []
    assert bench.missing([key, other]) == [other]
    with pytest.raises(UserError, match=r"no run of .*seed 1.*--from_log"):
        bench.run([other])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_no_run_outlives_a_study_that_was_killed(tmp_path, notes):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from toys import toy_run
from studies.bench import Bench
if __name__ == "__main__":
    bench = Bench(Path({str(tmp_path)!r}), 2, "cpu", toy_run, {{{notes!r}: []}})
    bench.run([bench.key({notes!r}, "", 16, seed, ["last"]) for seed in range(2)])
"""
    (tmp_path / "script.py").write_text(script)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    study_process = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment)

    def eventually(found):
        until = time.monotonic() + 60
        while not found() and time.monotonic() < until:
            time.sleep(0.1)
        return found()

    def begun():
        return Path(notes).read_text().split() if Path(notes).exists() else []

    assert eventually(lambda: len(begun()) == 2)
    study_process.kill()
    study_process.wait()
    # What is gone, or a zombie that nobody waits for, runs no more.
    assert eventually(lambda: not any(alive(pid) for pid in begun()))


def test_a_copy_in_another_repository_has_no_commit(tmp_path, monkeypatch):
    """The package installed under somebody's project: the project's commit is not its own."""
    module = tmp_path / "lib" / "studies" / "bench.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(study, "__file__", str(module))
    assert study.machine()["commit"] == "unknown"
    subprocess.run([*git, "add", str(module)], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert head.stdout.startswith(study.machine()["commit"])


def alive(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
