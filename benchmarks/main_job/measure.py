"""Time and memory of README's first command: python benchmarks/main_job/measure.py [--runs 3]

Each run is a fresh process with its own output folder; wall time includes starting Python.
Appends one JSON line a run to runs.jsonl beside this file and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from studies.bench import RunLog, machine, mean_interval  # noqa: E402
from studies.commands import measured  # noqa: E402

COMMAND = "distillation.py --hybrid --ternary --qat --epochs 20 --save_metrics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    log = RunLog(HERE / "runs.jsonl")
    for seed in range(runs):
        record = measured([*COMMAND.split(), "--seed", str(seed)])
        log.append(record)
        size = record["peak_rss_bytes"] / 2**20
        print(f"seed {seed}: {record['seconds']:.1f} s, {size:.0f} MiB", flush=True)
    records = log.runs
    loss = [float(re.search(r"student, quantized +(\S+)", r["printed"])[1]) for r in records]
    teacher = [float(re.search(r"teacher +(\d\S+)", r["printed"])[1]) for r in records]
    ratio = [a / b for a, b in zip(loss, teacher, strict=True)]
    summary = {
        "n": len(records),
        "seconds": dict(
            zip(("mean", "ci95"), mean_interval([r["seconds"] for r in records]), strict=True)
        ),
        "seconds_max": max(r["seconds"] for r in records),
        "peak_rss_bytes_max": max(r["peak_rss_bytes"] for r in records),
        "loss_over_teacher": dict(zip(("mean", "ci95"), mean_interval(ratio), strict=True)),
        "size_ratio": [float(re.search(r"(\S+)x smaller", r["printed"])[1]) for r in records],
        "bits_a_linear_weight": [
            float(re.search(r"(\S+) bits a linear", r["printed"])[1]) for r in records
        ],
        **machine(),
    }
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
