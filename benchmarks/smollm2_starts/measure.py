"""SmolLM2's ternary student before training, rounded to nearest and calibrated:
python benchmarks/smollm2_starts/measure.py

The same held-out windows as a run's last validation. Writes a JSON line a start to runs.jsonl
beside this file, and summary.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402

COMMON = "--hybrid --ternary --qat --teacher smollm2"


def main() -> None:
    log = RunLog(HERE / "runs.jsonl")
    for flags in ("--calibrate=false", "--calibrate"):
        if log.find({"flags": flags}):
            continue
        began = time.perf_counter()
        s = distillation.set_up(parse_options(f"{COMMON} {flags}".split()))
        reference = distillation.final_reference(s)
        found = reference.validate(s.student)
        record = {
            "flags": flags,
            "windows": len(reference.windows),
            "teacher": reference.teacher_loss,
            "loss": found.loss,
            "loss_error": found.error,
            "kl": found.kl,
            "seconds": time.perf_counter() - began,
            **machine(),
        }
        log.append(record)
        print(flags, found, flush=True)
    (HERE / "summary.json").write_text(
        json.dumps({"starts": log.runs, **machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
