"""What a person sees of a run: console lines, the CSV and the model card."""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.files.atomic import atomic_write

RULE = "=" * 60


def epoch_line(epoch: int, row: dict[str, Any]) -> str:
    line = f"Epoch {epoch}, Loss: {row['train_loss']:.6f}, LR: {row['lr']:.6f}"
    if "trust_radius" in row:
        line += f", Trust Radius: {row['trust_radius']:.6f}"
    return line


def start_line(teacher: float, student: float, kind: str) -> str:
    """Validation losses before the first step; kind: how the student is made then."""
    return (
        f"Before training, validation loss: teacher {teacher:.4f}, student {student:.4f} ({kind})"
    )


def worse_line(summary: dict[str, Any]) -> str:
    """What a run has to admit whose student validates worse than before it was trained, or is
    still the start; "" of others."""
    before, after = summary["val_loss_before"], summary["val_loss_after"]
    if math.isnan(before) or after < before:
        return ""
    if summary["keeps_best"]:
        return (
            f"WARNING: TRAINING DID NOT HELP. No epoch validated better than the start "
            f"({before:.4f}); the student is the start."
        )
    if after == before:
        return ""
    return (
        f"WARNING: THE STUDENT IS WORSE THAN BEFORE TRAINING. Validation loss {before:.4f} "
        f"before, {after:.4f} after; use a smaller --lr, or --hybrid."
    )


def talk_command(packed: Path, *, chats: bool, prompt: str) -> str:
    """What to type to talk to a student, or to have it continue a text. packed: its file; chats:
    its tokenizer has a chat template."""
    if not chats:
        return f'python -m lowbit.generate {shlex.quote(str(packed))} --prompt "{prompt}"'
    alone = len(list(packed.parent.glob("*.npz"))) == 1
    name = f"{packed.parent}/" if alone else str(packed)
    return f"python -m lowbit.chat {shlex.quote(name)}"


def summary_lines(summary: dict[str, Any], *, hybrid: bool) -> list[str]:
    lines = ["HYBRID OPTIMIZATION SUMMARY" if hybrid else "TRAINING SUMMARY", RULE]
    lines += [f"Total Steps: {summary['total_steps']}", f"Final Loss: {summary['final_loss']:.6f}"]
    if hybrid:
        rate = 100 * summary["constraint_activation_rate"]
        lines += [
            f"Avg Learning Rate Multiplier: {summary['avg_lr_multiplier']:.2f}x",
            f"Constraint Activation Rate: {rate:.1f}%",
            f"Final Trust Radius: {summary['trust_radius']:.6f}",
        ]
    if summary.get("skipped_steps"):
        lines.append(f"Skipped Steps (loss or gradient not finite): {summary['skipped_steps']}")
    for key, told in {
        "rollbacks": "Rollbacks to a Checkpoint",
        "resumed": "Resumed",
        "fallback_steps": "Steps by the Plain Rule (the network's output was not finite)",
    }.items():
        if summary.get(key):
            lines.append(f"{told}: {summary[key]}")
    return [*lines, RULE]


def model_card(
    teacher: str, mode: str, steps: int, text: str, losses: dict[str, str], windows: str
) -> str:
    """README.md of a student's folder for transformers: what it is, what was measured, how it is
    loaded. losses: a row of the table each; windows: what they were measured on."""
    kind = "ternary (1.58-bit)" if mode == "ternary" else "1-bit"
    table = "\n".join(f"| {name} | {value} |" for name, value in losses.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {mode}
- distillation
- quantization-aware-training
---

# A {kind} student of {teacher}

The weights are rounded, and stored here as float32, so that any program loads them. The small
file is the packed .npz, or the GGUF, of the same run.

| cross-entropy, nats a token | on {windows} |
| --- | --- |
{table}

Distilled in {steps} steps on a text of fingerprint {text}, held-out windows of which are what the
table is about. On other texts it was not measured.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def write_csv(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> Path:
    """A row an epoch, whole file or nothing. Floats are written with 9 significant digits."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    return atomic_write(path, lambda f: f.write(text.getvalue().encode()))
