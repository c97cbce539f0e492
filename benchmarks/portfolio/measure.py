"""One configuration of HybridOptimizer on small tasks of many kinds, against AdamW and Muon tuned
for each of them:

    python benchmarks/portfolio/measure.py [--seeds 5] [--tasks "digits, MLP" ...]
    python benchmarks/portfolio/measure.py --fine_tuning [--seeds 5]

Appends a line to runs.jsonl for each run that is not there yet (of the hybrid: of this code), and
rewrites summary.json and table.md; with --fine_tuning those in the folder fine_tuning.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

import torch
import torch.nn as nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import hybrid_optimization  # noqa: E402
from hybrid_optimization import HybridOptimizer, named_kinds  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.muon import muon_for  # noqa: E402
from studies.portfolio import FINE_TUNING, TASKS, UNSEEN, run  # noqa: E402

TUNING_SEED = 1000
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]
#: (rate, first beta, decay) of AdamW; (rate and decay of matrices, rate of AdamW for the rest) of
#: Muon: a run each.
ADAMW = list(itertools.product((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.9, 0.7), (0.01, 0.3)))
MUON = list(itertools.product((5e-3, 2e-2, 5e-2, 1.5e-1, 4e-1), (3e-3, 1e-2), (0.1, 0.01)))
CHANGED = "all weights"  # the task whose weights are changed, not made: a tenth of these rates


def adamw(lr: float, beta: float, decay: float) -> Make:
    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr, betas=(beta, 0.95), weight_decay=decay)]

    return make


def muon(lr: float, rest: float, decay: float) -> Make:
    """torch's Muon for matrices of two dimensions, AdamW for all else."""

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        kinds = named_kinds(model)
        matrices = [p for _, p, kind in kinds if kind == "matrix" and p.ndim == 2]
        known = {id(p) for p in matrices}
        others = [p for _, p, _ in kinds if id(p) not in known]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, rest, betas=(0.9, 0.95), weight_decay=0.01)
        ]
        if matrices:
            method = muon_for(matrices[0].device)
            found.append(method(matrices, lr, weight_decay=decay, momentum=0.9))
        return found

    return make


def grids(task: str) -> list[tuple[str, list, Callable[..., Make]]]:
    """(method, its settings, what makes it of one). In fine-tuning there is no Muon, and AdamW's
    decay is not tuned."""
    if task not in FINE_TUNING:
        return [("adamw", ADAMW, adamw), ("muon", MUON, muon)]
    slower = 0.1 if task == CHANGED else 1.0
    tried = [(slower * lr, beta, decay) for lr, beta, decay in ADAMW if decay == 0.01]
    return [("adamw", tried, adamw)]


def hybrid(**options: Any) -> Make:
    return lambda model: [HybridOptimizer(model, **options)]


def variants(task: str, steps: int) -> dict[str, dict[str, Any]]:
    """Of one configuration: what a user may get wrong."""
    if task in FINE_TUNING:
        changed = {"pretrained": True} if task == CHANGED else {}
        return {"as it is": {**changed, "max_steps": steps}}
    return {
        "as it is": {"max_steps": steps},
        "no horizon": {},
        "horizon / 10": {"max_steps": steps // 10},
        "horizon x 10": {"max_steps": 10 * steps},
        "horizon x 10, averaged": {"max_steps": 10 * steps, "average": True},
        "step_length / 5": {"max_steps": steps, "step_length": 0.12 / 5},
        "step_length x 5, cut to 0.14": {"max_steps": steps, "step_length": 0.12 * 5},
        "no guidance": {"max_steps": steps, "guided": False},
    }


def code() -> str:
    """Of what the hybrid's runs depend on: the file without its docstrings and comments."""
    tree = ast.parse(Path(hybrid_optimization.__file__).read_text("utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


CODE = code()


def recorded(
    log: RunLog, key: dict[str, Any], fill: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The log's run of this key, or one that is made now: fill adds its "loss" and what else it
    finds. Infinite where weights were not finite."""
    found = log.find(key)
    if found is None:
        found, started = dict(key), time.perf_counter()
        try:
            fill(found)
        except (RuntimeError, ValueError) as e:
            found["loss"], found["error"] = math.inf, str(e)[:200]
        found |= {"seconds": time.perf_counter() - started, **machine()}
        log.append(found)
        print(*key.values(), f"{found['loss']:.4f}", flush=True)
    return found


def loss_of(log: RunLog, task: str, method: str, options: Any, seed: int, make: Make) -> float:
    """Of a run in the log, or of one that is made now."""
    key: dict[str, Any] = dict(task=task, method=method, options=options, seed=seed)
    if method == "hybrid":
        key["code"] = CODE

    def fill(found: dict[str, Any]) -> None:
        found["loss"] = run(task, seed, make, linear=method != "hybrid")

    return recorded(log, key, fill)["loss"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--fine_tuning", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(1)
    tasks = FINE_TUNING if o.fine_tuning else TASKS
    if unknown := [task for task in o.tasks or () if task not in tasks]:
        parser.error(f"--tasks: not one of {list(tasks)}: {unknown}")
    folder = HERE / "fine_tuning" if o.fine_tuning else HERE
    folder.mkdir(exist_ok=True)
    log = RunLog(folder / "runs.jsonl")
    table: dict[str, dict[str, Any]] = {}
    for task in o.tasks or tasks:
        steps = tasks[task](0).steps
        row: dict[str, Any] = {}
        for name, grid, make in grids(task):
            tuned = min(
                grid,
                key=lambda x: loss_of(log, task, name, list(x), TUNING_SEED, make(*x)),
            )
            losses = [
                loss_of(log, task, name, list(tuned), s, make(*tuned)) for s in range(o.seeds)
            ]
            row[name] = {"options": list(tuned), "losses": losses}
        for name, options in variants(task, steps).items():
            losses = [
                loss_of(log, task, "hybrid", options, s, hybrid(**options)) for s in range(o.seeds)
            ]
            row[name] = {"options": options, "losses": losses}
        table[task] = row
        write(folder, table, o.seeds)


def error_of(losses: list[float]) -> float:
    """Standard error of their mean; infinite where a run diverged, or is the only one."""
    finite = len(losses) > 1 and all(map(math.isfinite, losses))
    return stdev(losses) / math.sqrt(len(losses)) if finite else math.inf


def write(folder: Path, table: dict[str, dict[str, Any]], seeds: int) -> None:
    """summary.json: means and ratios; table.md: the same for people.

    Errors are standard errors over seeds; a ratio's interval is two of them either way, of its
    logarithm, to first order (a mean's relative error is that of its logarithm). Geometric means
    and the worst are of the tasks that are not UNSEEN."""
    names = list(next(iter(table.values())))
    means = {t: {n: fmean(r[n]["losses"]) for n in names} for t, r in table.items()}
    errors = {t: {n: error_of(r[n]["losses"]) for n in names} for t, r in table.items()}
    seen = [t for t in means if t not in UNSEEN] or list(means)

    def ratios(n: str) -> dict[str, Any]:
        """Of AdamW and Muon ours over theirs, of a variant its loss over ours."""
        above, below = ("as it is", n) if n in ("adamw", "muon") else (n, "as it is")
        each = {t: m[above] / m[below] for t, m in means.items()}
        # Where a run diverged this is not a number, and so is the interval.
        squares = sum((errors[t][x] / means[t][x]) ** 2 for t in seen for x in (above, below))
        center = geometric_mean(each[t] for t in seen)
        error = math.sqrt(squares) / len(seen)
        return {
            "geometric_mean": center,
            "interval": [center * math.exp(-2 * error), center * math.exp(2 * error)],
            "worst": max(each[t] for t in seen),
            **each,
        }

    summary = {
        "command": "python benchmarks/portfolio/measure.py",
        "seeds": seeds,
        "means": means,
        "standard_errors": errors,
        "ratios": {n: ratios(n) for n in names if n != "as it is"},
        "tuned": {
            t: {n: r[n]["options"] for n in ("adamw", "muon") if n in r} for t, r in table.items()
        },
        **machine(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    head = ["task", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for t, m in means.items():
        cells = [f"{m[n]:.4g} ({errors[t][n]:.2g})" for n in names]
        lines.append("| " + " | ".join([t, *cells]) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
