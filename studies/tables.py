"""What the benchmark prints and writes: tables, a picture, strict JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.files.atomic import atomic_write
from studies.bench import mean_interval
from studies.definitions import summary_name


def first_crossing(curve: Sequence[Sequence[float]], target: float) -> int | None:
    return next((int(step) for step, loss in curve if loss <= target), None)


def summarise(runs: Sequence[dict[str, Any]], target: float | None) -> dict[str, Any]:
    """Raw runs -> a row a method, in the order in which they first occur. The target, unless given:
    what the first method ends at of which no run diverged."""
    methods = dict.fromkeys(r["method"] for r in runs)
    by_method = {m: [r for r in runs if r["method"] == m] for m in methods}
    if target is None:
        sound = (
            rs
            for rs in by_method.values()
            if all(r["curve"] and math.isfinite(r["final_loss"]) for r in rs)
        )
        target = float(np.mean([r["curve"][-1][1] for r in next(sound, [])] or [math.nan]))
    table = []
    for method, rs in by_method.items():
        ended = [r for r in rs if math.isfinite(r["final_loss"])]
        whole = len(ended) == len(rs)
        loss, loss_ci = mean_interval([r["final_loss"] for r in rs]) if whole else (math.inf, None)
        seconds, seconds_ci = (
            mean_interval([r["seconds"] for r in ended]) if ended else (None, None)
        )
        crossings = [first_crossing(r["curve"], target) for r in rs]
        reached = [c for c in crossings if c is not None]
        table.append(
            {
                "method": method,
                "n": len(rs),
                "diverged": len(rs) - len(ended),
                "final_loss": loss,
                "final_loss_ci95": loss_ci,
                "final_kl": float(np.mean([r["final_kl"] for r in rs])),
                "reached": len(reached),
                "steps_to_target": float(np.mean(reached)) if len(reached) == len(rs) else None,
                "seconds": seconds,
                "seconds_ci95": seconds_ci,
                "step_seconds": float(np.median([r["step_seconds"] for r in ended]))
                if ended
                else None,
            }
        )
    return {"target": target, "table": table}


def with_interval(mean: float, half_width: float) -> str:
    """One seed has no interval."""
    return f"{mean:.4f}" + ("" if math.isnan(half_width) else f" +- {half_width:.4f}")


def format_table(summary: dict[str, Any]) -> list[str]:
    lines = [f"{'Method':<20} | {'Final Loss':<17} | {'Steps to Converge':<17} | Time (s)"]
    lines.append("-" * len(lines[0]))
    for row in summary["table"]:
        steps, n = row["steps_to_target"], row["n"]
        reached = f"{steps:.0f}" if steps is not None else f"{row['reached']} of {n} runs"
        if row["diverged"]:
            loss = f"diverged, {row['diverged']} of {n}"
        else:
            loss = with_interval(row["final_loss"], row["final_loss_ci95"])
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(f"{row['method']:<20} | {loss:<17} | {reached:<17} | {seconds}".rstrip())
    n = summary["table"][0]["n"]
    over = f"mean of {n} seeds, 95 % t-interval" if n > 1 else "one seed, no interval"
    lines.append(
        f"Validation loss of the student, nats a byte; {over}. "
        f"Converged: {summary['target']:.4f} on the windows of every epoch."
    )
    return lines


def quantization_rows(
    low: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Loss above the best full-precision student, a row for each method in ``low``."""
    means = {
        m: np.array([r["final_loss"] for r in full if r["method"] == m])
        for m in {r["method"] for r in full}
    }
    best = min(means.values(), key=np.mean)  # a method that diverged has mean inf
    rows = []
    for method in dict.fromkeys(r["method"] for r in low if r["method"] in means):
        gaps = np.array([r["final_loss"] for r in low if r["method"] == method]) - best
        mean, half = mean_interval(list(gaps))
        rows.append({"method": method, "quantization_error": mean, "ci95": half, "n": len(gaps)})
    return rows


def format_quantization(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'Method':<20} | Quantization error, nats a byte"]
    lines.append("-" * len(lines[0]))
    for r in rows:
        error = with_interval(r["quantization_error"], r["ci95"])
        lines.append(f"{r['method']:<20} | {error}")
    lines.append(
        "Loss of the quantized student above the best full-precision student (either optimiser) "
        "after the same steps."
    )
    return lines


def plot(path: Path, runs: Sequence[dict[str, Any]], target: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for method in dict.fromkeys(r["method"] for r in runs):
        curves = [r["curve"] for r in runs if r["method"] == method and r["curve"]]
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


def intervals(value: Any, label: str = "") -> list[tuple[str, float, float]]:
    """(label, mean, half width) of every mean in a study's entry, but those of the KL."""
    if isinstance(value, tuple):
        return [(label, value[0], value[1] if math.isfinite(value[1]) else 0.0)]
    found = []
    for k, v in value.items() if isinstance(value, dict) else ():
        if not str(k).endswith("kl"):
            found += intervals(v, f"{label}, {k}" if label else str(k))
    return found


def _draw_horizons(ax: Any, entry: dict[str, Any]) -> None:
    """Convergence: the hybrid at every horizon, each baseline at its own."""
    steps = sorted(int(h) for h in entry["hybrid_losses"])
    means, halves = zip(*(entry["hybrid_losses"][str(h)] for h in steps), strict=True)
    ax.errorbar(steps, means, halves, marker="o", capsize=3, label="hybrid")
    for i, baseline in enumerate(entry["tuning"], 1):
        name = summary_name(baseline)
        mean, half = entry[f"{name}_loss"]
        where = [entry[f"{name}_steps"]], [mean]
        ax.errorbar(*where, [half], marker="s", capsize=3, color=f"C{i}", label=f"tuned {baseline}")
        ax.axhline(mean, color=f"C{i}", ls="--", lw=1)
    ax.set(xlabel="steps of the whole run", ylabel="final validation loss, nats")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)  # covers no interval


def _draw_rates(ax: Any, entry: dict[str, Any]) -> None:
    """LR sensitivity: a line a method; rates at which it diverged are crosses at the top."""
    for method, found in entry.items():
        rates = sorted(found["losses"], key=float)
        losses = [found["losses"][r] for r in rates]
        (line,) = ax.plot([float(r) for r in rates], losses, marker="o", label=method)
        lost = [float(r) for r, loss in zip(rates, losses, strict=True) if not math.isfinite(loss)]
        if lost:
            look = dict(
                ls="", marker="x", ms=9, color=line.get_color(), label=f"{method}: diverged"
            )
            ax.plot(lost, [0.97] * len(lost), transform=ax.get_xaxis_transform(), **look)
    ax.set(xlabel="base rate", ylabel="final validation loss, nats a byte", xscale="log")
    ax.legend()


def _draw_means(ax: Any, entry: dict[str, Any]) -> None:
    """Any other study: every mean with its interval, a row each."""
    labels, means, halves = zip(*intervals(entry)[::-1], strict=True)
    ax.errorbar(means, range(len(means)), xerr=halves, fmt="o", capsize=3)
    ax.set_yticks(range(len(means)), labels)


def plot_study(path: Path, name: str, tasks: dict[str, Any]) -> None:
    """A panel a task, three in a row."""
    from matplotlib.figure import Figure

    draw = {"convergence": _draw_horizons, "lr-sensitivity": _draw_rates}.get(name, _draw_means)
    rows = max(len(intervals(e)) for e in tasks.values()) if draw is _draw_means else 12
    wide = min(len(tasks), 3)
    high = math.ceil(len(tasks) / wide)
    figure = Figure(figsize=(6 * wide + 1, high * max(4, 0.4 * rows)), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for ax in panels[len(tasks) :]:
        ax.set_axis_off()
    for ax, (task, entry) in zip(panels, tasks.items(), strict=False):
        ax.set_title(f"{name}: {task}")
        ax.grid(alpha=0.25)
        draw(ax, entry)
        if draw is _draw_means:
            what = "seconds a step" if name == "overhead" else "final loss, nats a byte"
            ax.set_xlabel(f"{what}, mean and 95 % t-interval")
    atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=120))


def made_of(used: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Commits, versions and machines of runs, each what occurs: "a, b"; machines: "a; b"."""
    names = ("commit", "version", "python", "torch", "numpy", "cpu", "threads", "cuda", "text")
    return {
        name: ("; " if name == "cpu" else ", ").join(
            sorted({str(r[name]) for r in used if r.get(name) is not None})
        )
        for name in names
    }


def study_readme(
    name: str, about: str, command: str, used: Sequence[dict[str, Any]], kept: int, before: str
) -> str:
    """Where a study's numbers come from. about: what it measures; used: the runs in its summary;
    kept: lines in its log; before: the README so far, whose remarks by hand stay."""

    where = made_of(used)
    left = kept - len(used)
    return "\n".join(
        [
            f"# {name}\n",
            f"{' '.join(about.split())} Losses are those on held-out data.\n",
            f"- Command: `{command}`",
            f"- Machine: {where['cuda'] or where['cpu']}, {where['threads']} threads",
            f"- Versions: {where['version']}, Python {where['python']}, torch {where['torch']}, "
            f"numpy {where['numpy']}",
            f"- Commit: {where['commit']} (each run's own is in its line of `runs.jsonl`)",
            f"- Withheld: nothing; {left} of the {kept} runs in `runs.jsonl` are not part of "
            "`summary.json`, because its command does not ask for them",
            *(x for x in before.splitlines() if x.startswith("- Read with care")),
            "",
        ]
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return atomic_write(path, lambda f: f.write(out.getvalue().encode()))


def write_json(path: Path, value: Any) -> Path:
    """Strict JSON: what is not finite becomes null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    return atomic_write(path, lambda f: f.write(text.encode()))


def print_summary(value: Any, prefix: str = "") -> None:
    """Estimates and intervals of a study, a line each."""
    if isinstance(value, dict) and "ci95" in value:
        low, high = value["ci95"]
        print(f"{prefix}: {value['value']:.3f} [{low:.3f}, {high:.3f}], n = {value['n']}")
    elif isinstance(value, dict):
        for k, v in value.items():
            if k != "tuning":
                print_summary(v, f"{prefix} / {k}" if prefix else str(k))
    elif isinstance(value, tuple):
        print(f"{prefix}: {with_interval(*value)}")
    elif isinstance(value, (int, float)):
        print(f"{prefix}: {value:.4g}")
