"""The picture of a run. Needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, PALE, STRONG, WARM = "#333333", "#9aa5b1", "#1f6f8b", "#c8553d"
ROW = 3  # panels side by side
BLOCKS_WITH_NAMES = 12  # more are ticked by matplotlib

Rows = Sequence[dict[str, Any]]


@dataclass
class Scenery:
    """What the metrics' rows do not say. start: the student's validation loss before training, NaN
    where it is not known; kind: how it was made then; words: typical ones of each cluster of the
    text; bits: a weight of each block, in the mean."""

    unit: str = "byte"
    start: float = math.nan
    kind: str = "start"
    words: Sequence[str] = ()
    bits: Sequence[float] = field(default_factory=list)


def plot_metrics(path: str | os.PathLike, rows: Rows, about: Scenery) -> Path:
    """One panel an idea; panels of which a run has nothing are left out."""
    from matplotlib.figure import Figure  # without pyplot: no backend is chosen

    panels: list[Callable[[Axes, Rows, Scenery], None]] = [losses, rates]
    if "step_asked" in rows[0]:
        panels.append(lengths)
    panels.append(divergence)
    if flip_columns(rows):
        panels.append(flips)
    if len(set(about.bits)) > 1:
        panels.append(bits)
    lines = -(-len(panels) // ROW)
    figure = Figure(figsize=(4.6 * ROW, 3.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, ROW, squeeze=False).flat)
    for draw, ax in zip(panels, axes, strict=False):
        draw(ax, rows, about)
        ax.grid(alpha=0.2)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            columns = 2 if len(ax.lines) > 3 else 1
            ax.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns, fontsize=8,
                frameon=False,
            )  # fmt: skip
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=120))


def trained(rows: Rows) -> list[int]:
    """How many epochs the student has been trained for, at the end of each."""
    return [r["epoch"] + 1 for r in rows]


def set_up(ax: Axes, title: str, y: str, x: str = "epochs trained") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11, color=INK)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def from_zero(ax: Axes) -> None:
    ax.set_ylim(0, 1.05 * ax.get_ylim()[1])


def losses(ax: Axes, rows: Rows, about: Scenery) -> None:
    column = next(c for c in ("val_loss_quantized", "val_loss") if any(c in r for r in rows))
    measured = [(r["epoch"] + 1, r[column]) for r in rows if column in r]
    set_up(ax, "Loss", f"cross-entropy, nats a {about.unit}")
    name = f"{'quantised ' * (column != 'val_loss')}student, validation"
    if not math.isnan(about.start):
        ax.plot(0, about.start, "o", mfc="white", color=STRONG, label=f"before: {about.kind}")
        measured.insert(0, (0, about.start))
    ax.plot(*zip(*measured, strict=True), color=STRONG, marker="o", ms=3, label=name, zorder=1)
    ax.plot(trained(rows), [r["train_ce"] for r in rows], color=PALE, label="student, training")
    ax.axhline(rows[-1]["val_loss_teacher"], color=INK, ls="--", lw=1, label="teacher, validation")


def rates(ax: Axes, rows: Rows, about: Scenery) -> None:
    set_up(ax, "Learning rate", "mean of the epoch")
    ax.plot(trained(rows), [r["lr"] for r in rows], color=STRONG, label="used")
    if "lr_multiplier" in rows[0]:
        planned = [r["lr"] / r["lr_multiplier"] for r in rows]
        ax.plot(trained(rows), planned, color=INK, ls="--", lw=1, label="planned, before guidance")
    from_zero(ax)


def lengths(ax: Axes, rows: Rows, about: Scenery) -> None:
    set_up(ax, "Trust region", "length of a step, mean of the epoch")
    asked, taken = ([r[k] for r in rows] for k in ("step_asked", "step_taken"))
    ax.plot(trained(rows), asked, color=WARM, label="asked for")
    ax.plot(trained(rows), taken, color=STRONG, label="allowed, and taken")
    ax.fill_between(trained(rows), taken, asked, color=WARM, alpha=0.15, lw=0)
    from_zero(ax)


def divergence(ax: Axes, rows: Rows, about: Scenery) -> None:
    set_up(ax, "KL to the teacher, training text", f"nats a {about.unit}")
    names = [k for k in rows[0] if k.startswith("kl_cluster_")]
    for k, name in enumerate(names or ["train_kl"]):
        words = about.words[k] if k < len(about.words) else ""
        label = (words or f"cluster {k}") if names else "all text"
        values = [math.nan if r[name] == "" else r[name] for r in rows]  # no window that epoch
        ax.plot(trained(rows), values, lw=1.2, label=label)


def flip_columns(rows: Rows) -> list[str]:
    return [k for k in rows[0] if k.startswith("code_flips_block_")]


def flips(ax: Axes, rows: Rows, about: Scenery) -> None:
    means = [100 * sum(r[n] for r in rows) / len(rows) for n in flip_columns(rows)]
    by_block(ax, means, "Codes that an epoch changes", "% of the block's, mean")


def bits(ax: Axes, rows: Rows, about: Scenery) -> None:
    by_block(ax, about.bits, "Bits a weight", "mean of the block's matrices")


def by_block(ax: Axes, values: Sequence[float], title: str, y: str) -> None:
    set_up(ax, title, y, x="block, first to last")
    ax.bar(range(len(values)), values, color=STRONG, width=0.8)
    if len(values) <= BLOCKS_WITH_NAMES:
        ax.set_xticks(range(len(values)))
