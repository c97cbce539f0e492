"""Does any run of HybridOptimizer on the small tasks diverge? Its defaults, many seeds, batches of
a quarter of the usual size, of that and of four times as much:

    python benchmarks/portfolio/divergence.py [--seeds 20] [--tasks "digits, MLP" ...]

A run has diverged if its held-out loss is not finite, or above what the task's fresh weights have.
Appends a line to divergence.jsonl for each run of this code that is not there yet, and rewrites
divergence.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from benchmarks.portfolio.measure import CODE, hybrid, recorded  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.portfolio import TASKS, run  # noqa: E402

BATCHES = (0.25, 1.0, 4.0)


def one(log: RunLog, task: str, batch: float, seed: int) -> dict[str, Any]:
    """Of a run in the log, or of one that is made now."""

    def fill(found: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        problem = TASKS[task](seed)
        found["start"] = problem.held_out()
        make = hybrid(max_steps=problem.steps)
        found["loss"] = run(task, seed, make, linear=False, batch=batch)

    return recorded(log, {"task": task, "batch": batch, "seed": seed, "code": CODE}, fill)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    o = parser.parse_args()
    torch.set_num_threads(1)
    log = RunLog(HERE / "divergence.jsonl")
    for task in o.tasks:
        for batch in BATCHES:
            losses = [one(log, task, batch, seed)["loss"] for seed in range(o.seeds)]
            print(task, batch, median(losses), max(losses), flush=True)
    write(RunLog(log.path))  # another process may have written to it


def write(log: RunLog) -> None:
    """divergence.json, of all runs of this code in the log."""
    table: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        for batch in BATCHES:
            key = {"task": task, "batch": batch, "code": CODE}
            runs = [r for r in log.runs if all(r[k] == v for k, v in key.items())]
            if runs:
                table.setdefault(task, {})[f"batch x {batch:g}"] = {
                    "runs": len(runs),
                    "diverged": sum(not r["loss"] <= r["start"] for r in runs),
                    "start": median(r["start"] for r in runs),
                    "median": median(r["loss"] for r in runs),
                    "worst": max(r["loss"] for r in runs),
                }
    cells = [cell for row in table.values() for cell in row.values()]
    summary = {
        "command": "python benchmarks/portfolio/divergence.py",
        "runs": sum(c["runs"] for c in cells),
        "diverged": sum(c["diverged"] for c in cells),
        "tasks": table,
        **machine(),
    }
    (HERE / "divergence.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
