"""Compare optimisers on the distillation task: a quick look, or the full studies.

    python benchmark_hybrid_optimization.py
    python benchmark_hybrid_optimization.py --study convergence --tasks conversion

Every run is appended to ``runs.jsonl`` in the study's folder as it ends, keyed by its settings: a
study that was interrupted goes on where it stopped, and more seeds, tasks or methods grow it.

The quick look trains each method for the same steps. "Steps to Converge" is there the first
validated step at which a run's loss reached the target: what the first method in the table ended
at (its mean over seeds), unless --target gives another. The convergence study is stricter: steps
to the target are the smallest horizon, with the schedule ending there, whose mean over seeds
reaches what the tuned baseline ends at. "Final Loss" is measured on EVALUATION_WINDOWS held-out
windows.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import distillation
from hybrid_optimization import schedule_factor
from lowbit import RunFailed, UserError
from lowbit.checkpoint import atomic_write, prepare_folder
from lowbit.corpus import StratifiedSampler
from lowbit.options import STEPS_PER_EPOCH, Parser, parse_options
from lowbit.study import (
    RunLog,
    gap_reduction,
    machine,
    mean_interval,
    ratio,
    smallest_horizon,
    steps_ratio,
)
from lowbit.tables import (
    format_quantization,
    format_table,
    plot,
    plot_study,
    print_summary,
    quantization_rows,
    study_readme,
    summarise,
    write_csv,
    write_json,
)

EVALUATION_WINDOWS = 512
TUNING_SEED = 1000  # rates are chosen on a seed that no result uses
RUN = 320  # steps of the default run, where a study needs one length

#: Method -> its flags. --cluster_batches is ours alone: batches balanced over clusters.
METHODS: dict[str, list[str]] = {
    "Baseline SGD": ["--optimizer", "sgd", "--lr_schedule", "constant"],
    "SGD + LR schedule": ["--optimizer", "sgd"],
    "SGD + clustering": ["--optimizer", "sgd", "--cluster_batches"],
    "AdamW": ["--optimizer", "adamw"],
    "AdamW + clustering": ["--optimizer", "adamw", "--cluster_batches"],
    "AdamW + calibration": ["--optimizer", "adamw", "--calibrate"],
    "Muon": ["--optimizer", "muon"],
    "Schedule-Free AdamW": ["--optimizer", "schedulefree", "--lr_schedule", "constant"],
    "Prodigy": ["--optimizer", "prodigy"],
    "Full hybrid": ["--hybrid"],
    "Hybrid - auxiliary network": ["--hybrid", "--use_auxiliary_nn=false"],
    "Hybrid - trust region": ["--hybrid", "--use_trust_region=false"],
    "Hybrid - data clustering": ["--hybrid", "--use_clustering=false"],
    "Hybrid - parameter clustering": ["--hybrid", "--param_clusters", "1"],
    "Hybrid - matrix geometry": ["--hybrid", "--use_matrix_geometry=false"],
    "Hybrid - calibration": ["--hybrid", "--calibrate=false"],
}
PAIR = ("AdamW", "Full hybrid")
QUICK = ["Baseline SGD", "SGD + LR schedule", "SGD + clustering", "AdamW", "Full hybrid"]


@dataclass(frozen=True)
class Task:
    """flags: of distillation.py. steps: the baseline's horizon. rates: where tuning starts."""

    flags: str
    steps: int
    rates: dict[str, float]


FROM_SCRATCH = {"AdamW": 4e-3, "Muon": 1e-2, "Schedule-Free AdamW": 4e-3, "Prodigy": 1.0}
#: {stdlib} stands for the folder of the standard library's source code.
SOURCE_CODE = " ".join(
    "{stdlib}/" + name for name in ("asyncio", "email", "http", "importlib", "json", "unittest")
)
TASKS: dict[str, Task] = {
    "conversion": Task(
        "--ternary --qat --student_init teacher",
        400,
        {"AdamW": 1e-3, "Muon": 2e-3, "Schedule-Free AdamW": 1e-3, "Prodigy": 1.0},
    ),
    "scratch": Task("--ternary --qat --student_init random", 800, FROM_SCRATCH),
    "scratch_small": Task(
        "--ternary --qat --student_init random --student_size small", 800, FROM_SCRATCH
    ),
    "full_precision": Task("--ternary --calibrate=false --student_init random", 800, FROM_SCRATCH),
    "heldout": Task(
        f"--ternary --qat --student_init random --data {SOURCE_CODE}", 800, FROM_SCRATCH
    ),
    "digits": Task("--digits", 192, FROM_SCRATCH),
}
TIMED_PAIRS = 3
GRID = 50  # horizons are whole epochs, about this many up to the baseline's steps
FIRST = 0.56  # of the baseline's steps, where the search for the horizon starts


# ------------------------------------------------------------------------------------- one run


def run_once(method: str, flags: Sequence[str], common: Sequence[str], seed: int) -> dict[str, Any]:
    """One training run, all overheads (calibration, clustering, network) inside ``seconds``.

    A run that diverges has final_loss inf.
    """
    flags = [f for f in flags if f != "--cluster_batches"]
    if "--digits" in common:
        return run_digits(flags, common, seed)
    stdlib = sysconfig.get_paths()["stdlib"]
    words = [x.replace("{stdlib}", stdlib) for x in (*common, *flags)]
    started = time.perf_counter()
    setup = distillation.set_up(parse_options([*words, "--seed", str(seed)]))
    result: dict[str, Any] = {"lr": setup.lr, "steps": setup.max_steps}
    result["text"] = setup.corpus.fingerprint
    try:
        rows, _ = distillation.train(
            setup,
            lambda line: None,
            cluster_batches="--cluster_batches" in METHODS[method],
            bar=False,
        )
    except RunFailed:
        return {**result, "final_loss": math.inf, "final_kl": math.inf, "curve": []}
    seconds = time.perf_counter() - started
    column = "val_loss_quantized" if setup.options.qat else "val_loss"
    windows = distillation.pick_windows(setup.corpus.validation, EVALUATION_WINDOWS)
    reference = distillation.logits_of(setup.teacher, windows, setup.device)
    final = distillation.validate(setup.student, windows, reference, setup.device)
    finite = math.isfinite(final.loss)
    return {
        **result,
        "final_loss": final.loss if finite else math.inf,
        "final_kl": final.kl if finite else math.inf,
        "teacher_loss": distillation.teacher_loss(windows, reference),
        "windows": len(windows),
        "curve": [(row["step"], row[column]) for row in rows if column in row],
        "activation": float(np.mean([row.get("activation_rate", 0.0) for row in rows])),
        "seconds": seconds,
        "step_seconds": float(np.median([row["median_step_seconds"] for row in rows])),
    }


def run_digits(flags: Sequence[str], common: Sequence[str], seed: int) -> dict[str, Any]:
    """Not a language model: scikit-learn's digits, a three-layer perceptron, batches of 32.
    final_loss is the cross-entropy on 360 held-out images."""
    from sklearn.datasets import load_digits

    o = parse_options([*(f for f in (*common, *flags) if f != "--digits"), "--seed", str(seed)])
    o.student_init, o.use_matrix_geometry = "random", o.use_matrix_geometry is not False
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.tensor(x[order] / 16, dtype=torch.float32)
    labels = torch.tensor(y[order])
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )
    lr = o.lr or distillation.DEFAULT_LR[o.method]["random"]
    steps = STEPS_PER_EPOCH * o.epochs
    setup: Any = SimpleNamespace(
        options=o, student=model, lr=lr, max_steps=steps, steps_per_epoch=STEPS_PER_EPOCH
    )
    started = time.perf_counter()
    manager = distillation.make_manager(setup) if o.hybrid else None
    baseline = [] if manager else distillation.make_baseline(setup)
    clusters = np.zeros(len(images) - 360, int)
    if manager and o.use_clustering:
        clusters = manager.setup_data_clustering(images[360:])
    sampler = StratifiedSampler(clusters, 32, seed)
    for t in range(steps):
        picked = 360 + torch.from_numpy(sampler.next_batch())
        loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
        model.zero_grad()
        loss.backward()
        if manager:
            manager.optimization_step(model, loss, None, cluster_id=-1, step=t)
        for opt in baseline:
            for group in opt.param_groups:
                share = schedule_factor(t, steps, distillation.WARMUP_FRACTION, o.lr_schedule)
                group["lr"] = group.setdefault("peak", group["lr"]) * share
            opt.step()
    seconds = time.perf_counter() - started
    with distillation.averaged(baseline), torch.no_grad():
        final = float(nn.functional.cross_entropy(model(images[:360]), labels[:360]))
    final = final if math.isfinite(final) else math.inf
    return {
        "lr": lr, "steps": steps, "final_loss": final, "final_kl": final, "curve": [],
        "seconds": seconds, "step_seconds": seconds / steps,
    }  # fmt: skip


#: Method, the task's flags, further flags.
Setting = tuple[str, str, Sequence[str]]


class Bench:
    """Runs of a study: what is in the log is not run again."""

    def __init__(self, folder: Path, jobs: int, device: str) -> None:
        self.folder, self.jobs, self.device = folder, jobs, device
        self.log = RunLog(folder / "runs.jsonl")
        self.where = machine()
        self.bar = tqdm(unit="run", file=sys.stderr, leave=False)
        self.used: dict[int, dict[str, Any]] = {}  # records that a result was made of

    def key(
        self, method: str, task: str, steps: int, seed: int, extra: Sequence[str] = ()
    ) -> dict[str, Any]:
        flags = [*task.split(), "--device", self.device, "--epochs", str(steps // STEPS_PER_EPOCH)]
        return {"method": method, "seed": seed, "task": flags, "flags": [*METHODS[method], *extra]}

    def run(self, keys: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of ``keys``, in their order."""
        keys = list(keys)
        missing = [k for k in keys if self.log.find(k) is None]
        self.bar.total = (self.bar.total or 0) + len(missing)
        arguments = [(k["method"], k["flags"], k["task"], k["seed"]) for k in missing]
        if self.jobs > 1 and len(missing) > 1:
            threads = max(1, torch.get_num_threads() // self.jobs)
            with ProcessPoolExecutor(
                self.jobs, initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool:
                results = pool.map(run_once, *zip(*arguments, strict=True))
                for k, result in zip(missing, results, strict=True):
                    self._keep(k, result)
        else:
            for k, a in zip(missing, arguments, strict=True):
                self.bar.set_description(f"{k['method']}, seed {k['seed']}")
                self._keep(k, run_once(*a))
        found = [r for r in map(self.log.find, keys) if r is not None]
        self.used |= {id(r): r for r in found}
        return found

    def _keep(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        self.log.append({**key, **result, **self.where})
        self.bar.update()

    def losses(
        self, settings: Iterable[Setting], seeds: int, column: str = "final_loss"
    ) -> np.ndarray:
        """Of runs of the default length: a row for each setting, a column for each seed. All are
        asked for at once, so that --jobs fills the machine."""
        settings = list(settings)
        runs = self.run(
            self.key(method, task, RUN, seed, extra)
            for method, task, extra in settings
            for seed in range(seeds)
        )
        return np.array([r[column] for r in runs]).reshape(len(settings), seeds)

    def take_turns(self, sides: Sequence[tuple[Setting, int]], pairs: int) -> list[list[dict]]:
        """For each side, a setting and its steps, a record a seed: runs whose times are compared,
        one at a time on this machine, whatever --jobs."""
        runs: list[list[dict]] = [[] for _ in sides]
        for seed in range(pairs):
            for ((method, task, extra), steps), side in zip(sides, runs, strict=True):
                key = self.key(method, task, steps, seed, extra)
                side += self.run([{**key, "purpose": "timing", "cpu": self.where["cpu"]}])
        return runs


def tune(bench: Bench, method: str, task: Task) -> tuple[list[str], list[dict[str, Any]]]:
    """(best flags, the tuning table): rates a factor 2 apart on a linear schedule until the best
    is interior, then the other schedules at that rate. One seed, which no result uses."""

    def losses(trials: Sequence[tuple[float, str]]) -> list[float]:
        flags = [["--lr", f"{rate:g}", "--lr_schedule", schedule] for rate, schedule in trials]
        keys = [bench.key(method, task.flags, task.steps, TUNING_SEED, f) for f in flags]
        found = [r["final_loss"] for r in bench.run(keys)]
        for (rate, schedule), loss in zip(trials, found, strict=True):
            table.append({"lr": rate, "schedule": schedule, "loss": loss})
        return found

    table: list[dict[str, Any]] = []
    start = task.rates[method]
    rates = [start / 2, start, start * 2]
    found = dict(zip(rates, losses([(r, "linear") for r in rates]), strict=True))
    while (best := min(found, key=found.__getitem__)) in (min(found), max(found)):
        if len(found) > 7:
            break
        further = best / 2 if best == min(found) else best * 2
        (found[further],) = losses([(further, "linear")])
    others = losses([(best, "cosine"), (best, "wsd")])
    schedules = dict(zip(("linear", "cosine", "wsd"), (found[best], *others), strict=True))
    schedule = min(schedules, key=schedules.__getitem__)
    return ["--lr", f"{best:g}", "--lr_schedule", schedule], table


# ------------------------------------------------------------------------------------- studies


def bracket(bench: Bench, task: Task, seeds: int, target: float) -> dict[int, list[dict[str, Any]]]:
    """The hybrid's runs at horizons around the smallest that reaches the target: from FIRST of
    the baseline's steps in growing strides until one is reached and one is not, then by halves; and
    one beyond, for the interval. Horizon (steps) -> a record a seed."""
    horizons: dict[int, list[dict[str, Any]]] = {}
    unit = STEPS_PER_EPOCH * max(1, round(task.steps / GRID / STEPS_PER_EPOCH))
    points = task.steps // unit

    def reached(point: int) -> bool:
        steps = point * unit
        keys = [bench.key("Full hybrid", task.flags, steps, s) for s in range(seeds)]
        horizons[steps] = bench.run(keys)
        return bool(np.mean([r["final_loss"] for r in horizons[steps]]) <= target)

    low, high = 0, points + 1  # not reached, reached
    point, stride = round(FIRST * points), 1
    while low < point < high:
        if reached(point):
            high, point = point, max(point - stride, 1)
        else:
            low, point = point, min(point + stride, points)
        if low and high <= points:
            point = (low + high) // 2
        stride *= 2
    if high < points:
        reached(high + 1)
    return dict(sorted(horizons.items()))


def side_by_side(
    bench: Bench, task: Task, baseline: str, flags: Sequence[str], steps: int, pairs: int
) -> dict[str, Any]:
    """The hybrid's runs of ``steps`` over the baseline's of the task's steps, taking turns:
    "seconds_ratio", with clustering, calibration and validation, and "step_time_ratio", of median
    steps."""
    tuned, plain = (baseline, task.flags, flags), ("Full hybrid", task.flags, ())
    theirs, ours = bench.take_turns([(tuned, task.steps), (plain, steps)], pairs)
    return {
        f"{name}_ratio": ratio([r[column] for r in ours], [r[column] for r in theirs])
        for name, column in (("seconds", "seconds"), ("step_time", "step_seconds"))
    }


def convergence(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Steps and seconds to what each tuned baseline ends at: the smallest horizon tried, with the
    schedule ending there, whose mean over seeds reaches the baseline's mean. Baselines are tuned
    on a seed of their own, the hybrid has its default settings. Intervals resample seeds; seconds
    are of runs that take turns."""
    summary: dict[str, Any] = {}
    for name in tasks:
        task = TASKS[name]
        entry: dict[str, Any] = {"baseline_steps": task.steps, "seeds": seeds, "tuning": {}}
        for baseline in [m for m in methods if m in task.rates]:
            best, table = tune(bench, baseline, task)
            entry["tuning"][baseline] = {"chosen": best, "table": table}
            keys = [bench.key(baseline, task.flags, task.steps, s, best) for s in range(seeds)]
            reference = bench.run(keys)
            target = [r["final_loss"] for r in reference]
            horizons = bracket(bench, task, seeds, float(np.mean(target)))
            losses = {h: [r["final_loss"] for r in rs] for h, rs in horizons.items()}
            label = baseline.split()[0].lower().replace("-", "_")
            entry[f"{label}_loss"] = mean_interval(target)
            entry[f"{label}_kl"] = mean_interval([r["final_kl"] for r in reference])
            entry[f"steps_ratio_vs_{label}"] = steps_ratio(losses, target, task.steps)
            reached = smallest_horizon(losses, float(np.mean(target)), np.arange(seeds))
            if math.isfinite(reached):
                timed = side_by_side(
                    bench, task, baseline, best, int(reached), min(seeds, TIMED_PAIRS)
                )
                entry |= {f"{name}_vs_{label}": found for name, found in timed.items()}
            entry["hybrid_losses"] = {str(h): mean_interval(x) for h, x in losses.items()}
            entry["hybrid_kl"] = {
                str(h): mean_interval([r["final_kl"] for r in rs]) for h, rs in horizons.items()
            }
        summary[name] = entry
    return {"tasks": summary}


def lr_sensitivity(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Final loss over base rates from 1/10 to 30 times the default, above the best, in per cent."""
    summary: dict[str, Any] = {}
    for name in tasks:
        task = TASKS[name]
        entry: dict[str, Any] = {}
        for method in methods:
            hybrid = METHODS[method][0] == "--hybrid"
            start = "teacher" if "teacher" in task.flags else "random"
            centre = distillation.DEFAULT_LR["hybrid"][start] if hybrid else task.rates[method]
            rates = [f"{centre * factor:g}" for factor in (0.1, 0.3, 1, 3, 10, 30)]
            losses = bench.losses([(method, task.flags, ["--lr", r]) for r in rates], seeds)
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
    and number of steps, by any of the methods."""
    summary: dict[str, Any] = {}
    for name in tasks:
        flags = TASKS[name].flags
        if "--qat" not in flags.split():
            continue
        full = flags.replace("--qat", "--calibrate=false")
        kinds = (full, flags, flags.replace("--ternary ", ""))
        losses = bench.losses([(m, kind, ()) for kind in kinds for m in PAIR], seeds)
        (adamw, hybrid), *quantized = losses.reshape(len(kinds), len(PAIR), seeds)
        reference = min((adamw, hybrid), key=np.mean)
        entry: dict[str, Any] = {
            "full_precision": {"AdamW": mean_interval(adamw), "Full hybrid": mean_interval(hybrid)}
        }
        for bits, (plain, guided) in zip(("ternary", "1bit"), quantized, strict=True):
            entry[bits] = {
                "adamw": mean_interval(plain),
                "hybrid": mean_interval(guided),
                "adamw_gap": float(np.mean(plain - reference)),
                "hybrid_gap": float(np.mean(guided - reference)),
                "hybrid_own_gap": float(np.mean(guided - hybrid)),
                "adamw_own_gap": float(np.mean(plain - adamw)),
                "gap_reduction": gap_reduction(plain, guided, reference),
            }
        summary[name] = entry
    return {"tasks": summary, "seeds": seeds, "steps": RUN}


def overhead(bench: Bench, seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> dict:
    """Time a step against AdamW: medians over default runs that alternate on the same machine."""
    summary: dict[str, Any] = {}
    for name in tasks:
        runs = bench.take_turns([((m, TASKS[name].flags, ()), RUN) for m in PAIR], seeds)
        adamw, hybrid = ([r["step_seconds"] for r in side] for side in runs)
        summary[name] = {
            "adamw_step_seconds": mean_interval(adamw),
            "hybrid_step_seconds": mean_interval(hybrid),
            "step_time_ratio": ratio(hybrid, adamw),
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
        if "--student_init teacher" not in flags:
            rows = [m for m in rows if "calibration" not in m]
        settings = [(m, flags, ()) for m in rows]
        losses, kl = (bench.losses(settings, seeds, x) for x in ("final_loss", "final_kl"))
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


#: study -> (function, default seeds, tasks, methods)
STUDIES: dict[str, tuple[Any, int, list[str], list[str]]] = {
    "convergence": (convergence, 5, list(TASKS), ["AdamW", "Muon"]),
    "lr-sensitivity": (lr_sensitivity, 1, ["conversion", "scratch"], ["AdamW", "Full hybrid"]),
    "quantization": (quantization, 3, ["scratch"], ["AdamW", "Full hybrid"]),
    "overhead": (overhead, 3, ["conversion", "scratch"], ["AdamW", "Full hybrid"]),
    "batch-size": (batch_size, 20, ["scratch_small"], ["Full hybrid"]),
    "ablation": (ablation, 3, ["conversion", "scratch"], []),
}


# ---------------------------------------------------------------------------------- quick look


def finish(written: list[Path], picture: Path, draw: Callable[[], None]) -> None:
    """Draw the picture where matplotlib is there, and say which files were written."""
    try:
        draw()
        written.append(picture)
    except ImportError:
        print("No picture: pip install matplotlib")
    for path in written:
        print(f"Wrote {path}")


def quick_look(o: argparse.Namespace, folder: Path) -> None:
    """The classical table, and the quantisation-error table where both kinds of run are there."""
    bench = Bench(folder, o.jobs, o.device)
    methods = o.methods or QUICK
    steps = o.epochs * STEPS_PER_EPOCH
    keys = [bench.key(m, o.task, steps, s) for s in range(o.seeds) for m in methods]
    paired = [m for m in PAIR if m in methods]
    words = o.task.split()
    full_keys = []
    if len(paired) == 2 and "--qat" in words:
        task = " ".join("--calibrate=false" if w == "--qat" else w for w in words)
        full_keys = [bench.key(m, task, steps, s) for s in range(o.seeds) for m in paired]
    runs, full = bench.run(keys), bench.run(full_keys)
    bench.bar.close()
    summary = {"task": keys[0]["task"], **bench.where, **summarise(runs, o.target)}
    print("\n".join(format_table(summary)))
    if full:
        rows = summary["quantization"] = quantization_rows(
            [r for r in runs if r["method"] in paired], full
        )
        print("\n" + "\n".join(format_quantization(rows)))
    written = [
        bench.log.path,
        write_json(folder / "summary.json", summary),
        write_csv(folder / "summary.csv", summary["table"]),
    ]
    picture = folder / "summary.png"
    finish(written, picture, lambda: plot(picture, runs, summary["target"]))


# ---------------------------------------------------------------------------------- command line


def run_study(name: str, o: argparse.Namespace, folder: Path, command: Sequence[str]) -> None:
    function, seeds, tasks, methods = STUDIES[name]
    bench = Bench(folder, o.jobs, o.device)
    seeds = o.seeds if o.seeds is not None else seeds
    found = function(bench, seeds, o.tasks or tasks, o.methods or methods)
    bench.bar.close()
    print(name)
    print_summary(found)
    written = [
        bench.log.path,
        write_json(folder / "summary.json", {"study": name, **bench.where, **found}),
    ]
    text = study_readme(
        name,
        function.__doc__,
        shlex.join(["python", "benchmark_hybrid_optimization.py", *command]),
        list(bench.used.values()),
        len(bench.log.runs),
    )
    written.append(atomic_write(folder / "README.md", lambda f: f.write(text.encode())))
    picture = folder / "summary.png"
    finish(written, picture, lambda: plot_study(picture, name, found["tasks"]))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="benchmark_hybrid_optimization.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--study", choices=[*STUDIES, "all"], help="a full study (default: the quick look)"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs a method (default 3; a study has its own default)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        help=f"among: {', '.join(METHODS)} (default: {', '.join(QUICK)})",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), metavar="NAME", help="of a study (default all)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--output_dir", default="benchmark", help="folder (default benchmark/)")
    g = parser.add_argument_group("quick look")
    g.add_argument("--epochs", type=int, default=10, help="epochs of 16 steps a run (default 10)")
    g.add_argument("--target", type=float, help="validation loss that counts as converged")
    g.add_argument(
        "--task",
        default="--ternary --qat --student_size small",
        help='distillation.py flags of every run (default "%(default)s")',
    )
    o = parser.parse_args(argv)
    try:
        for name in ("seeds", "epochs", "jobs"):
            if (value := getattr(o, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1")
        if o.study:
            for name in STUDIES if o.study == "all" else [o.study]:
                run_study(name, o, prepare_folder(Path(o.output_dir) / name), argv)
        else:
            o.seeds = o.seeds or 3
            parse_options(o.task.split())
            quick_look(o, prepare_folder(o.output_dir))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept and the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
