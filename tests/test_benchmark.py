"""The benchmark's arithmetic, its cache and what it prints."""

from __future__ import annotations

import json
import math

import pytest

import benchmark_hybrid_optimization as benchmark


def run(method: str, seed: int, final: float, curve: list[tuple[int, float]]) -> dict:
    return {
        "method": method, "seed": seed, "final_loss": final, "final_kl": 0.1, "curve": curve,
        "seconds": 10.0 + seed, "step_seconds": 0.1,
    }  # fmt: skip


def test_summary_of_known_runs():
    runs = [run("Baseline SGD", s, 2.0 + s, [(10, 3.0), (20, 2.0)]) for s in range(2)]
    runs += [run("AdamW", s, 1.0, [(10, 2.5), (20, 1.0)]) for s in range(2)]
    summary = benchmark.summarise(runs, None)
    assert summary["target"] == 2.0
    sgd, adamw = summary["table"]
    assert (sgd["final_loss"], adamw["final_loss"]) == (2.5, 1.0)
    assert sgd["final_loss_ci95"] == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert (sgd["steps_to_target"], adamw["steps_to_target"]) == (20, 20)
    lines = benchmark.format_table(summary)
    assert lines[0].split(" | ")[0].strip() == "Method"
    assert [x.strip() for x in lines[0].split("|")] == [
        "Method", "Final Loss", "Steps to Converge", "Time (s)",
    ]  # fmt: skip


def test_a_method_that_misses_the_target_says_so():
    runs = [run("Baseline SGD", 0, 1.0, [(10, 1.0)]), run("AdamW", 0, 3.0, [(10, 3.0)])]
    summary = benchmark.summarise(runs, None)
    assert summary["table"][1]["steps_to_target"] is None
    assert "0 of 1 runs" in benchmark.format_table(summary)[3]


def test_interval():
    mean, half = benchmark.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(benchmark.mean_interval([1.0])[1])


def test_runs_are_cached_and_grow(tmp_path, text_file, tiny_teacher, capsys, monkeypatch):
    task = (
        f"--ternary --qat --data {text_file} --teacher {tiny_teacher} --seq_len 32 "
        "--batch_size 4 --samples_per_epoch 8 --device cpu"
    )
    done = []
    original = benchmark.run_once

    def count(method, flags, common, seed):
        done.append((method, seed))
        return original(method, flags, common, seed)

    monkeypatch.setattr(benchmark, "run_once", count)
    command = ["--epochs", "2", "--task", task, "--output_dir", str(tmp_path)]
    assert benchmark.main([*command, "--seeds", "1"]) == 0
    assert done == [(m, 0) for m in benchmark.METHODS]
    with (tmp_path / "runs.jsonl").open("a") as f:
        f.write('{"cut off')  # a killed writer
    assert benchmark.main([*command, "--seeds", "1"]) == 0
    assert len(done) == len(benchmark.METHODS)
    out = capsys.readouterr().out
    assert all(m in out for m in benchmark.METHODS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["method"] for r in summary["table"]] == list(benchmark.METHODS)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags", [["--seeds", "0"], ["--task", "--nonsense"], ["--methods", "Magic"]]
)
def test_bad_input(flags, tmp_path, capsys):
    try:
        code = benchmark.main(["--output_dir", str(tmp_path), *flags])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert capsys.readouterr().err.startswith("error:")
