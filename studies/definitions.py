"""The full studies: what is asked of runs.

A study is a function of a `Bench` that asks for runs and returns its summary. The hybrid has its
default settings; `convergence` and `quantization` tune its rivals, the other studies give them
their default rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowbit import UserError
from lowbit.options import STEPS_PER_EPOCH, default
from studies.bench import Bench, gap_reduction, mean_interval, ratio, smallest_horizon, steps_ratio
from studies.tasks import METHODS, PAIR, RUN, SPOILED, TASKS, Task, given
from studies.tuning import tune

GRID = 50  # horizons are whole epochs, about this many up to the baseline's steps


def bracket(
    bench: Bench, task: Task, seeds: int, reference: Sequence[float]
) -> dict[int, list[dict[str, Any]]]:
    """The hybrid's runs at horizons around the smallest whose mean reaches the reference's: from
    where it is expected in growing strides until one is reached and one is not, then by halves;
    then more beyond, until (nearly) every resample reaches its target, too. From a log: every
    horizon that is there with all seeds. Horizon (steps) -> a record a seed."""
    target = float(np.mean(reference))
    horizons: dict[int, list[dict[str, Any]]] = {}
    unit = STEPS_PER_EPOCH * max(1, round(task.steps / GRID / STEPS_PER_EPOCH))
    points = task.steps // unit

    def keys(point: int) -> list[dict[str, Any]]:
        return [bench.key("Full hybrid", task.flags, point * unit, s) for s in range(seeds)]

    def reached(point: int) -> bool:
        horizons[point * unit] = bench.run(keys(point))
        return bool(np.mean([r["final_loss"] for r in horizons[point * unit]]) <= target)

    def open_interval() -> bool:
        losses = {h: [r["final_loss"] for r in rs] for h, rs in horizons.items()}
        return math.isinf(steps_ratio(losses, reference, task.steps)["ci95"][1])

    if bench.from_log:
        for point in range(1, points + 1):
            if not bench.missing(keys(point)):
                reached(point)
        if not horizons:
            raise UserError(f"{bench.log.path} has no horizon with {seeds} runs of the hybrid")
        return horizons
    low, high = 0, points + 1  # not reached, reached
    point, stride = round(task.expected * points), 1
    while low < point < high:
        if reached(point):
            high, point = point, max(point - stride, 1)
        else:
            low, point = point, min(point + stride, points)
        if low and high <= points:
            point = (low + high) // 2
        stride *= 2
    while high < points and open_interval():
        high += 1
        reached(high)
    return dict(sorted(horizons.items()))


def side_by_side(
    bench: Bench, task: Task, baseline: str, flags: Sequence[str], steps: int, pairs: int
) -> dict[str, Any]:
    """The hybrid's runs of ``steps`` over the baseline's of the task's steps, taking turns:
    "seconds_ratio", with clustering, calibration and validation, and "step_time_ratio", of median
    steps."""
    tuned, plain = (baseline, task.flags, flags), ("Full hybrid", task.flags, ())
    theirs, ours = bench.take_turns([(tuned, task.steps), (plain, steps)], pairs)
    return time_ratios(theirs, ours) if theirs else {}  # a log without timed runs


def time_ratios(
    theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of runs that took turns: seconds of the whole run and of a median step, ours over theirs."""
    return {
        f"{name}_ratio": ratio([r[column] for r in ours], [r[column] for r in theirs])
        for name, column in (("seconds", "seconds"), ("step_time", "step_seconds"))
    }


def summary_name(baseline: str) -> str:
    """What a baseline is called in the keys of the convergence study's summary."""
    words = baseline.lower().replace("-", "_").split()
    return "_".join([words[0], *words[2:]]) if "+" in words else words[0]


@dataclass(frozen=True)
class Comparison:
    """A tuned baseline's runs, a seed each, and the hybrid's around the same loss."""

    task: Task  # as the baseline runs it
    chosen: list[str]
    table: list[dict[str, Any]]
    reference: list[dict[str, Any]]
    horizons: dict[int, list[dict[str, Any]]]


def convergence(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Steps and seconds to what each tuned baseline ends at (Muon after half the steps): the
    smallest horizon tried, with the schedule ending there, whose mean over seeds reaches the
    baseline's mean. Baselines are tuned on a seed of their own, the hybrid has its default
    settings. Intervals resample seeds; seconds are of runs that take turns."""
    pairs = [(name, m) for name in tasks for m in methods if m in TASKS[name].rates]
    if bench.from_log:  # a baseline that was not run on every task
        pairs = [p for p in pairs if bench.has_run(p[1], TASKS[p[0]].flags)] or pairs
    for name in tasks:
        if name not in dict(pairs):
            where = f" in {bench.log.path}" if bench.from_log else ""
            raise UserError(f"--tasks {name}: none of {', '.join(methods)} to compare with{where}")

    def measure(name: str, baseline: str) -> Comparison:
        task = given(TASKS[name], baseline)
        best, table = tune(bench, baseline, task)
        keys = [bench.key(baseline, task.flags, task.steps, s, best) for s in range(seeds)]
        if bench.from_log:  # another comparison may have more seeds
            there = itertools.takewhile(lambda key: not bench.missing([key]), keys)
            keys = list(there) or keys[:1]
        reference = bench.run(keys)
        losses = [r["final_loss"] for r in reference]
        return Comparison(task, best, table, reference, bracket(bench, task, len(keys), losses))

    found = bench.together([partial(measure, *pair) for pair in pairs])
    summary: dict[str, Any] = {name: {"tuning": {}} for name in tasks}
    # Of a horizon that two comparisons have, the one with more seeds is kept.
    for (name, baseline), c in sorted(
        zip(pairs, found, strict=True), key=lambda x: len(x[1].reference)
    ):
        entry, task = summary[name], c.task
        target = [r["final_loss"] for r in c.reference]
        losses = {h: [r["final_loss"] for r in rs] for h, rs in c.horizons.items()}
        label = summary_name(baseline)
        entry["tuning"][baseline] = {"chosen": c.chosen, "table": c.table}
        entry[f"{label}_seeds"], entry[f"{label}_steps"] = len(target), task.steps
        entry[f"{label}_loss"] = mean_interval(target)
        entry[f"{label}_kl"] = mean_interval([r["final_kl"] for r in c.reference])
        entry[f"steps_ratio_vs_{label}"] = steps_ratio(losses, target, task.steps)
        reached = smallest_horizon(losses, float(np.mean(target)), np.arange(len(target)))
        if math.isfinite(reached) and (timed_pairs := min(len(target), bench.timed_pairs)):
            timed = side_by_side(bench, task, baseline, c.chosen, int(reached), timed_pairs)
            entry |= {f"{ratio}_vs_{label}": found for ratio, found in timed.items()}
        for column, key in (("final_loss", "hybrid_losses"), ("final_kl", "hybrid_kl")):
            entry.setdefault(key, {}).update(
                {str(h): mean_interval([r[column] for r in rs]) for h, rs in c.horizons.items()}
            )
    return {"tasks": summary}


def lr_sensitivity(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Final loss over base rates from 1/10 to 30 times the default, above the best, in per cent;
    what the network and the region are for shows here."""
    for name, method in itertools.product(tasks, methods):
        if METHODS[method][0] != "--hybrid" and method not in TASKS[name].rates:
            raise UserError(f"--methods {method}: lr-sensitivity has no rate to start from")
    summary: dict[str, Any] = {}
    for name in tasks:
        task = TASKS[name]
        entry: dict[str, Any] = {}
        for method in methods:
            hybrid = METHODS[method][0] == "--hybrid"
            start = "teacher" if "teacher" in task.flags else "random"
            centre = default("lr", "hybrid", start) if hybrid else task.rates[method]
            rates = [f"{centre * factor:g}" for factor in (0.1, 0.3, 1, 3, 10, 30)]
            losses = bench.losses([(method, task.flags, ["--lr", r]) for r in rates], RUN, seeds)
            table = dict(zip(rates, losses.mean(1).tolist(), strict=True))
            best = min(table.values())
            excess = {r: 100 * (x / best - 1) for r, x in table.items()}
            entry[method] = {
                "losses": table,
                "excess_percent": excess,
                "worst_excess_loss": max(excess.values()) / 100,
            }
        summary[name] = entry
    return {"tasks": summary, "seeds": seeds, "steps": RUN}


def quantization(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Loss of quantised students above the best full-precision student of the same size, start
    and number of steps, by AdamW, tuned for every kind of student at that number of steps, or by
    the hybrid with its default settings; and their KL to the teacher."""
    summary: dict[str, Any] = {}
    trained = [name for name in tasks if "--qat" in TASKS[name].flags.split()]
    if not trained:
        raise UserError(f"--tasks {' '.join(tasks)}: nothing to quantise in training")
    for name in trained:
        task = replace(TASKS[name], steps=RUN)
        full = task.flags.replace("--qat", "--calibrate=false")
        kinds = {
            "full_precision": replace(task, flags=full),
            "ternary": task,
            "1bit": replace(task, flags=task.flags.replace("--ternary ", "")),
        }
        tuned = bench.together([partial(tune, bench, "AdamW", kind) for kind in kinds.values()])
        settings = [
            (method, kind.flags, flags)
            for kind, (best, _) in zip(kinds.values(), tuned, strict=True)
            for method, flags in zip(PAIR, (best, []), strict=True)
        ]
        shape = len(kinds), len(PAIR), seeds
        losses, kl = (
            bench.losses(settings, RUN, seeds, x).reshape(shape) for x in ("final_loss", "final_kl")
        )
        adamw, hybrid = losses[0]
        reference = min((adamw, hybrid), key=np.mean)
        entry: dict[str, Any] = {
            "tuning": {
                kind: {"chosen": best, "table": table}
                for kind, (best, table) in zip(kinds, tuned, strict=True)
            },
            "full_precision": {"adamw": mean_interval(adamw), "hybrid": mean_interval(hybrid)},
        }
        for i, bits in enumerate(("ternary", "1bit"), 1):
            plain, guided = losses[i]
            entry[bits] = {
                "adamw": mean_interval(plain),
                "hybrid": mean_interval(guided),
                "adamw_gap": float(np.mean(plain - reference)),
                "hybrid_gap": float(np.mean(guided - reference)),
                "hybrid_own_gap": float(np.mean(guided - hybrid)),
                "adamw_own_gap": float(np.mean(plain - adamw)),
                "gap_reduction": gap_reduction(plain, guided, reference),
                "adamw_kl": mean_interval(kl[i, 0]),
                "hybrid_kl": mean_interval(kl[i, 1]),
                "kl_ratio": ratio(kl[i, 1], kl[i, 0]),
            }
        summary[name] = entry
    return {"tasks": summary, "seeds": seeds, "steps": RUN}


def overhead(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Time of default runs, the hybrid's over AdamW's of as many steps: a step, median of each run,
    and the whole run, with clustering, calibration and validation. The two take turns on the same
    machine."""
    summary: dict[str, Any] = {}
    for name in tasks:
        runs = bench.take_turns([((m, TASKS[name].flags, ()), RUN) for m in PAIR], seeds)
        if not runs[0]:
            raise UserError(f"{bench.log.path} has no pair of runs that took turns on {name}")
        adamw, hybrid = ([r["step_seconds"] for r in side] for side in runs)
        summary[name] = {
            "adamw_step_seconds": mean_interval(adamw),
            "hybrid_step_seconds": mean_interval(hybrid),
            **time_ratios(*runs),
        }
    return {"tasks": summary, "seeds": seeds}


def batch_size(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Batches a quarter, one and four times the default, rates untouched: losses, diverged runs.
    A run has diverged when it ends above where it was after its first epoch."""
    summary: dict[str, Any] = {}
    for name in tasks:
        entry: dict[str, Any] = {}
        for method in methods:
            for batch in (2, 8, 32):
                flags = f"{TASKS[name].flags} --batch_size {batch}"
                runs = bench.run(bench.key(method, flags, 96, s) for s in range(seeds))
                diverged = [
                    not math.isfinite(r["final_loss"]) or r["curve"][-1][1] > r["curve"][0][1]
                    for r in runs
                ]
                finite = [r["final_loss"] for r in runs if math.isfinite(r["final_loss"])]
                entry.setdefault(method, {})[str(batch)] = {
                    "diverged": sum(diverged),
                    "runs": len(runs),
                    "loss": mean_interval(finite) if finite else None,
                }
        summary[name] = entry
    return {"tasks": summary, "steps": 96}


def ablation(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """The hybrid without one part at a time, and AdamW with the parts that it can take."""
    summary: dict[str, Any] = {}
    for name in tasks:
        flags = TASKS[name].flags
        rows = [m for m in METHODS if "Hybrid" in m or m.startswith(("AdamW", "Full"))]
        rows.remove("AdamW + gradient clipping")  # belongs to `faults`
        words = flags.split()
        if "teacher" not in words:
            rows = [m for m in rows if "calibration" not in m]
        if "teacher" in words or "--qat" not in words:
            rows = [m for m in rows if "warm-up" not in m]
        settings = [(m, flags, ()) for m in rows]
        losses, kl = (bench.losses(settings, RUN, seeds, x) for x in ("final_loss", "final_kl"))
        whole = losses[rows.index("Full hybrid")]
        summary[name] = {
            method: {
                "loss": mean_interval(losses[i]),
                "kl": mean_interval(kl[i]),
                "loss_ratio_vs_full": ratio(losses[i], whole),
            }
            for i, method in enumerate(rows)
        }
    return {"tasks": summary, "seeds": seeds, "steps": RUN}


def faults(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Default runs as they are, and with every fortieth gradient of each parameter replaced by
    noise thirty times as long: what a broken batch now and then does to a method."""
    summary: dict[str, Any] = {}
    for name in tasks:
        flags = TASKS[name].flags, f"{TASKS[name].flags} {SPOILED}"
        found = bench.losses([(m, f, ()) for m in methods for f in flags], RUN, seeds)
        summary[name] = {
            method: {
                "clean": mean_interval(clean),
                "spoiled": mean_interval(spoiled),
                "loss_ratio_vs_clean": ratio(spoiled, clean),
            }
            for method, clean, spoiled in zip(methods, found[::2], found[1::2], strict=True)
        }
    return {"tasks": summary, "seeds": seeds, "steps": RUN}


#: study -> (function, default seeds, tasks, methods)
STUDIES: dict[str, tuple[Any, int, list[str], list[str]]] = {
    "convergence": (convergence, 5, list(TASKS), ["AdamW", "Muon"]),
    "lr-sensitivity": (
        lr_sensitivity,
        1,
        ["conversion", "scratch"],
        ["AdamW", "Full hybrid", "Hybrid - auxiliary network", "Hybrid - trust region"],
    ),
    "quantization": (quantization, 3, ["scratch"], ["AdamW", "Full hybrid"]),
    "overhead": (overhead, 3, ["conversion", "scratch"], ["AdamW", "Full hybrid"]),
    "batch-size": (batch_size, 20, ["scratch_small"], ["Full hybrid"]),
    "ablation": (ablation, 3, ["conversion", "scratch"], []),
    "faults": (
        faults,
        3,
        ["scratch_small"],
        ["AdamW", "AdamW + gradient clipping", "Full hybrid", "Hybrid - trust region"],
    ),
}
