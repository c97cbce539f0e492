"""The hybrid and tuned AdamW from one calibrated start of SmolLM2:
python benchmarks/smollm2_rates/measure.py [--steps 20 60 200]

The student is calibrated once; every run then trains a copy of it with the same objective. AdamW
is tuned at the first number of steps, one setting after another, each from the best so far; at
every further number its rate once more. Appends one JSON line a run to runs.jsonl beside this file
(what is there is not run again) and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from lowbit.training.preparation import settle  # noqa: E402
from lowbit.training.step import Setup  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402

COMMON = "--ternary --qat --teacher smollm2"
START = "--hybrid"  # a calibrated start, with all of its defaults
EPOCHS = 4  # after each, eight windows are validated
#: AdamW's settings in the order of their tuning, and the values that are tried.
GRID: dict[str, tuple[str, ...]] = {
    "--lr": ("5e-4", "2.5e-4", "1e-3", "2e-3"),
    "--momentum": ("0.9", "0.6", "0.8"),
    "--weight_decay": ("0.01", "0"),
    "--lr_schedule": ("linear", "cosine", "wsd"),
}
HYBRID = ("--hybrid", "--hybrid --lr 1.5e-5", "--hybrid --lr 1.5e-3")


class Runs:
    """Runs from one start, each done once."""

    def __init__(self) -> None:
        self.log = RunLog(HERE / "runs.jsonl")
        self.start: Setup | None = None

    def prepare(self) -> Setup:
        if self.start is None:
            self.start = distillation.set_up(parse_options(f"{COMMON} {START}".split()), print)
            self.reference = distillation.final_reference(self.start)
            self.before = self.reference.validate(self.start.student)
        return self.start

    def loss(self, flags: str, steps: int) -> float:
        words = f"{COMMON} {flags} --epochs {EPOCHS}"
        key = {"flags": words, "steps": steps}
        done = self.log.find(key)
        if done is None:
            start = self.prepare()
            o = parse_options(words.split())
            settle(o, start.teacher, start.tokenizer)
            o.samples_per_epoch = steps // EPOCHS * o.batch_size
            o.micro_batch_size = start.options.micro_batch_size
            o.activation_checkpointing = start.options.activation_checkpointing
            setup = replace(
                start,
                options=o,
                student=copy.deepcopy(start.student),
                steps_per_epoch=steps // EPOCHS,
            )
            began = time.perf_counter()
            rows, _ = distillation.train(setup, print, bar=False)
            found = self.reference.validate(setup.student)
            done = {
                **key,
                "start_loss": self.before.loss,
                "loss": found.loss,
                "loss_error": found.error,
                "kl": found.kl,
                "teacher": self.reference.teacher_loss,
                "windows": len(self.reference.windows),
                "seconds": time.perf_counter() - began,
                "epochs": rows,
                **machine(),
            }
            self.log.append(done)
            print(flags, steps, found, flush=True)
        return float(done["loss"])


def words(settings: dict[str, str]) -> str:
    return " ".join(["--calibrate --optimizer adamw", *(f"{k} {v}" for k, v in settings.items())])


def tuned(runs: Runs, steps: int, best: dict[str, str]) -> dict[str, str]:
    """AdamW's best settings of GRID at that many steps, one setting after another."""
    for name, values in GRID.items():
        tried = {v: runs.loss(words({**best, name: v}), steps) for v in values}
        best = {**best, name: min(tried, key=lambda v: tried[v])}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 60, 200])
    steps = parser.parse_args().steps
    runs, table = Runs(), []
    best = {name: values[0] for name, values in GRID.items()}
    for i, n in enumerate(steps):
        hybrid = runs.loss(HYBRID[0], n)
        if i == 0:
            for flags in HYBRID[1:]:
                runs.loss(flags, n)
            best = tuned(runs, n, best)
        else:
            rate = float(best["--lr"])
            rates = [best["--lr"], f"{rate / 2:g}", f"{rate * 2:g}"]
            tried = {r: runs.loss(words({**best, "--lr": r}), n) for r in rates}
            best = {**best, "--lr": min(tried, key=lambda r: tried[r])}
        adamw = runs.loss(words(best), n)
        teacher = runs.log.runs[-1]["teacher"]
        row: dict[str, Any] = {"steps": n, "hybrid": hybrid, "adamw": adamw, "settings": best}
        table.append({**row, "teacher": teacher, "ratio": (hybrid - teacher) / (adamw - teacher)})
        keys = ("flags", "steps", "start_loss", "loss", "loss_error", "kl", "teacher", "seconds")
        every = [{k: run[k] for k in keys} for run in runs.log.runs]
        summary = {"ratios": table, "runs": every, **machine()}
        (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
