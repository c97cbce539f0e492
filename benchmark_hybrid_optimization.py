"""Compare optimisers on the distillation task: methods x seeds -> table, JSON, CSV and plot.

    python benchmark_hybrid_optimization.py

Every run is appended to ``runs.jsonl`` in the output folder as it ends, keyed by its settings: a
study that was interrupted goes on where it stopped, and more seeds grow it.

"Steps to Converge" is the first validated step at which a run's loss reached the *target*: what
the first method in the table ended at on the windows that are validated after every epoch (its
mean over seeds), unless --target gives another. Schedules end at the last step, so a crossing
earlier than that is reached without the benefit of annealing. "Final Loss" is measured on all
validation windows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import distillation
from lowbit import UserError, __version__
from lowbit.checkpoint import atomic_write, prepare_folder
from lowbit.options import Parser, parse_options

#: Method -> what it adds to the common command line. The first is the reference of the table.
METHODS: dict[str, list[str]] = {
    "Baseline SGD": ["--optimizer", "sgd", "--lr_schedule", "constant"],
    "SGD + LR schedule": ["--optimizer", "sgd"],
    "SGD + clustering": ["--optimizer", "sgd", "--cluster_batches"],
    "AdamW": ["--optimizer", "adamw"],
    "Full hybrid": ["--hybrid"],
}
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 %


def machine() -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=root,
        text=True,
        capture_output=True,
        check=False,
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "commit": commit,
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def run_once(method: str, flags: Sequence[str], common: Sequence[str], seed: int) -> dict[str, Any]:
    """One training run, all overheads (clustering, network) inside ``seconds``."""
    flags = [f for f in flags if f != "--cluster_batches"]
    options = parse_options([*common, *flags, "--seed", str(seed)])
    started = time.perf_counter()
    setup = distillation.set_up(options)
    rows, _ = distillation.train(
        setup,
        lambda line: None,
        cluster_batches="--cluster_batches" in METHODS[method],
        bar=False,
    )
    seconds = time.perf_counter() - started
    column = "val_loss_quantized" if options.qat else "val_loss"
    curve = [(row["step"], row[column]) for row in rows if column in row]
    windows = setup.corpus.validation
    reference = distillation.logits_of(setup.teacher, windows, setup.device)
    final = distillation.validate(setup.student, windows, reference, setup.device)
    return {
        "method": method,
        "seed": seed,
        "final_loss": final.loss,
        "final_kl": final.kl,
        "curve": curve,
        "seconds": seconds,
        "lr": setup.lr,
        "step_seconds": float(np.median([row["median_step_seconds"] for row in rows])),
        "steps": setup.max_steps,
        "text": setup.corpus.fingerprint,
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval); nan half width for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(T_QUANTILE.get(n, 2.3) * np.std(values, ddof=1) / n**0.5)


def first_crossing(curve: Sequence[Sequence[float]], target: float) -> int | None:
    return next((int(step) for step, loss in curve if loss <= target), None)


def summarise(runs: Sequence[dict[str, Any]], target: float | None) -> dict[str, Any]:
    """Raw runs -> a row a method, in METHODS' order."""
    by_method = {m: [r for r in runs if r["method"] == m] for m in METHODS}
    by_method = {m: rs for m, rs in by_method.items() if rs}
    if target is None:
        reference = next(iter(by_method.values()))
        target = float(np.mean([r["curve"][-1][1] for r in reference]))
    table = []
    for method, rs in by_method.items():
        loss, loss_ci = mean_interval([r["final_loss"] for r in rs])
        seconds, seconds_ci = mean_interval([r["seconds"] for r in rs])
        crossings = [first_crossing(r["curve"], target) for r in rs]
        reached = [c for c in crossings if c is not None]
        table.append(
            {
                "method": method,
                "n": len(rs),
                "final_loss": loss,
                "final_loss_ci95": loss_ci,
                "final_kl": float(np.mean([r["final_kl"] for r in rs])),
                "reached": len(reached),
                "steps_to_target": float(np.mean(reached)) if len(reached) == len(rs) else None,
                "seconds": seconds,
                "seconds_ci95": seconds_ci,
                "step_seconds": float(np.median([r["step_seconds"] for r in rs])),
            }
        )
    return {"target": target, "table": table}


def format_table(summary: dict[str, Any]) -> list[str]:
    lines = [f"{'Method':<20} | {'Final Loss':<17} | {'Steps to Converge':<17} | Time (s)"]
    lines.append("-" * len(lines[0]))
    for row in summary["table"]:
        steps = row["steps_to_target"]
        reached = f"{steps:.0f}" if steps is not None else f"{row['reached']} of {row['n']} runs"
        loss = f"{row['final_loss']:.4f} +- {row['final_loss_ci95']:.4f}"
        lines.append(f"{row['method']:<20} | {loss:<17} | {reached:<17} | {row['seconds']:.1f}")
    n = summary["table"][0]["n"]
    lines.append(
        f"Validation loss of the student, nats a byte; mean of {n} seeds, 95 % t-interval. "
        f"Converged: {summary['target']:.4f} on the windows of every epoch."
    )
    return lines


def plot(path: Path, runs: Sequence[dict[str, Any]], target: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for method in METHODS:
        curves = [r["curve"] for r in runs if r["method"] == method]
        if curves:
            steps = [step for step, _ in curves[0]]
            values = np.array([[loss for _, loss in c] for c in curves])
            (line,) = ax.plot(steps, values.mean(0), marker="o", ms=3, label=method)
            ax.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    ax.axhline(target, color="black", ls="--", lw=1, label="target")
    ax.set(
        xlabel="step",
        ylabel="validation loss of the student, nats a byte",
        title="Mean over seeds, band from lowest to highest",
    )
    ax.grid(alpha=0.25)
    ax.legend()
    atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=120))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="benchmark_hybrid_optimization.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs a method (default 3)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs a run (default 10)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        help=f"among: {', '.join(METHODS)} (default all)",
    )
    parser.add_argument("--target", type=float, help="validation loss that counts as converged")
    parser.add_argument("--output_dir", default="benchmark", help="folder (default benchmark/)")
    parser.add_argument(
        "--task",
        default="--ternary --qat --student_size small",
        help='distillation.py flags of every run (default "%(default)s")',
    )
    options = parser.parse_args(argv)
    try:
        if options.seeds < 1 or options.epochs < 1:
            raise UserError("--seeds and --epochs must be at least 1")
        folder = prepare_folder(options.output_dir)
        common = [*options.task.split(), "--epochs", str(options.epochs)]
        parse_options(common)
        log = folder / "runs.jsonl"
        where = machine()
        runs = read_runs(log)
        wanted = [(m, s) for s in range(options.seeds) for m in options.methods or METHODS]
        selected = []
        with tqdm(wanted, unit="run", file=sys.stderr, leave=False) as bar:
            for method, seed in bar:
                bar.set_description(f"{method}, seed {seed}")
                key = {"method": method, "seed": seed, "task": common, "flags": METHODS[method]}
                found = next((r for r in runs if all(r.get(k) == v for k, v in key.items())), None)
                if found is None:
                    found = {**key, **run_once(method, METHODS[method], common, seed), **where}
                    append_run(log, found)
                selected.append(found)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept and the same command goes on", file=sys.stderr)
        return 130
    summary = {"task": common, **where, **summarise(selected, options.target)}
    print("\n".join(format_table(summary)))
    text = json.dumps(summary, indent=1) + "\n"
    written = [atomic_write(folder / "summary.json", lambda f: f.write(text.encode()))]
    try:
        plot(folder / "summary.png", selected, summary["target"])
        written.append(folder / "summary.png")
    except ImportError:
        print("No picture: pip install matplotlib")
    for path in [log, *written]:
        print(f"Wrote {path}")
    return 0


def append_run(log: Path, record: dict[str, Any]) -> None:
    """Add a line; a last line that was cut short by a killed run is ended first."""
    text = json.dumps(record) + "\n"
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with log.open("a", encoding="utf-8") as f:
        f.write(text)


def read_runs(log: Path) -> list[dict[str, Any]]:
    """Finished runs of an earlier call; a last line that was cut short is ignored."""
    if not log.exists():
        return []
    runs = []
    for line in log.read_text("utf-8").splitlines():
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


if __name__ == "__main__":
    sys.exit(main())
