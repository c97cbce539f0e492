"""SmolLM2's default conversion in bfloat16 on a processor without instructions for it:
python benchmarks/smollm2_bfloat16/measure.py OUTPUT_DIR

Products of linear layers are emulated: inputs and results are rounded to bfloat16, sums are
float32, in the forward and the backward pass. Attention rounds what it reads and what it gives, and
nothing in between. The optimiser's products are torch's own in bfloat16. Appends a JSON line to
runs.jsonl beside this file and rewrites summary.json; the student stays in OUTPUT_DIR.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
import hybrid_optimization  # noqa: E402
from lowbit.training import preparation  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402

FLAGS = "--hybrid --ternary --qat --teacher smollm2 --save_metrics --epochs 20 --seed 0"
LARGE = 10_000_000  # weights of a head, which is multiplied chunk by chunk: widened once

linear, attention = F.linear, F.scaled_dot_product_attention
widened: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}


def exact() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def emulates() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def wide(w: torch.Tensor) -> torch.Tensor:
    """w, of bfloat16, as float32."""
    if w.numel() <= LARGE:
        return w.float()
    key = w.data_ptr(), w._version
    if key not in widened:
        while len(widened) > 2:
            del widened[next(iter(widened))]
        widened[key] = w, w.float()
    return widened[key][1]


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        with exact():
            rounded, weight = x.bfloat16(), w.bfloat16()
            ctx.save_for_backward(rounded, weight)
            ctx.kinds = x.dtype, w.dtype
            bias = None if b is None else b.bfloat16().float()
            return linear(rounded.float(), wide(weight), bias).bfloat16()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple:
        with exact():
            x, w = ctx.saved_tensors
            slope, d_x, d_w, d_b = slope.float(), None, None, None
            flat = slope.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_x = (slope @ wide(w)).bfloat16().to(ctx.kinds[0])
            if ctx.needs_input_grad[1]:
                d_w = (flat.mT @ x.float().flatten(0, -2)).bfloat16().to(ctx.kinds[1])
            if ctx.needs_input_grad[2]:
                d_b = flat.sum(0)
            return d_x, d_w, d_b


def emulated_linear(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
) -> torch.Tensor:
    return Linear.apply(x, w, b) if emulates() else linear(x, w, b)


def emulated_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    if not emulates():
        return attention(q, k, v, *args, **kwargs)
    with exact():
        read = [x.bfloat16().float() for x in (q, k, v)]
        return attention(*read, *args, **kwargs).bfloat16()


def main() -> None:
    folder = sys.argv[1]
    torch.set_num_threads(1)
    F.linear, F.scaled_dot_product_attention = emulated_linear, emulated_attention  # type: ignore
    for module in (preparation, hybrid_optimization):
        module.native_bfloat16 = lambda device: True  # type: ignore
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = distillation.main([*FLAGS.split(), "--output_dir", folder])
    with Path(folder, "student_metrics.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    log = RunLog(HERE / "runs.jsonl")
    log.append(
        {
            "command": f"python distillation.py {FLAGS}",
            "exit": code,
            "printed": printed.getvalue().replace(folder, "student"),
            "metrics": rows,
            **machine(),
        }
    )
    summary = [summarised(run) for run in log.runs]
    (HERE / "summary.json").write_text(json.dumps({"runs": summary, **machine()}, indent=1) + "\n")


def summarised(run: dict[str, Any]) -> dict[str, Any]:
    """Losses and KL as a run prints them, nats a token."""

    def number(pattern: str) -> float:
        found = re.search(pattern, run["printed"])
        assert found, pattern
        return float(found[1])

    return {
        "command": run["command"],
        "teacher": number(r"\n  teacher +(\d\S+)"),
        "loss": number(r"student, quantized +(\S+)"),
        "loss_error": number(r"quantized +\S+ \+- (\S+)"),
        "kl": number(r"KL to the teacher (\d+\.\d+)"),
        "start": number(r"student: (\S+) before"),
        "after": number(r"before training, (\d+\.\d+)"),
        "worst_epoch": max(float(row["val_loss_quantized"]) for row in run["metrics"]),
    }


if __name__ == "__main__":
    main()
