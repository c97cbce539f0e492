"""Optimisers and rates from one calibrated start of SmolLM2:
python benchmarks/smollm2_rates/measure.py [--epochs 6]

The student is calibrated once; every method then trains a copy of it with the same objective and
schedule. Appends one JSON line a run to runs.jsonl beside this file and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from lowbit.training.preparation import settle  # noqa: E402
from lowbit.training.validation import Reference, pick_windows  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402

COMMON = "--ternary --qat --teacher smollm2"
METHODS = (
    "--hybrid",
    "--calibrate --optimizer adamw --lr 1e-3",
    "--calibrate --optimizer adamw --lr 3e-4",
    "--calibrate --optimizer adamw --lr 3e-3",
    "--hybrid --lr 3e-5",
    "--hybrid --lr 3e-3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    log = RunLog(HERE / "runs.jsonl")
    start = None
    for method in METHODS:
        words = f"{COMMON} {method} --epochs {epochs}"
        if any(run["flags"] == words for run in log.runs):
            continue
        if start is None:
            first = parse_options(f"{COMMON} --hybrid --epochs {epochs}".split())
            start = distillation.set_up(first)
            count = start.options.final_tokens // start.options.seq_len
            windows = pick_windows(start.corpus.validation, count)
            reference = Reference(start.teacher, windows, start.device, start.dtype)
            before = reference.validate(start.student)
        o = parse_options(words.split())
        settle(o, start.teacher, start.tokenizer)
        o.samples_per_epoch = start.options.samples_per_epoch
        setup = replace(start, options=o, student=copy.deepcopy(start.student))
        began = time.perf_counter()
        rows, _ = distillation.train(setup, print, bar=False)
        found = reference.validate(setup.student)
        log.append(
            {
                "flags": words,
                "steps": setup.max_steps,
                "start_loss": before.loss,
                "loss": found.loss,
                "loss_error": found.error,
                "kl": found.kl,
                "teacher": reference.teacher_loss,
                "windows": len(windows),
                "seconds": time.perf_counter() - began,
                "epochs": rows,
                **machine(),
            }
        )
        print(words, found, flush=True)
    table = [
        {
            k: run[k]
            for k in (
                "flags",
                "steps",
                "start_loss",
                "loss",
                "loss_error",
                "kl",
                "teacher",
                "seconds",
            )
        }
        for run in log.runs
    ]
    (HERE / "summary.json").write_text(json.dumps({"runs": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
