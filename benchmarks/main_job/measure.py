"""Time and memory of README's first command: python benchmarks/main_job/measure.py [--runs 3]

Each run is a fresh process with its own output folder; wall time includes starting Python.
Appends one JSON line a run to runs.jsonl beside this file and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from studies.bench import RunLog, machine, mean_interval  # noqa: E402

COMMAND = "distillation.py --hybrid --ternary --qat --epochs 20 --save_metrics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    log = RunLog(HERE / "runs.jsonl")
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                *COMMAND.split(),
                "--output_dir",
                folder,
                "--seed",
                str(seed),
            ]
            started = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        printed = printed.replace(folder, "student")
        record = {
            "command": f"python {COMMAND} --seed {seed}",
            "exit": status,
            "seconds": seconds,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "printed": printed,
            **machine(),
        }
        log.append(record)
        print(f"seed {seed}: {seconds:.1f} s, {usage.ru_maxrss / 2**10:.0f} MiB", flush=True)
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
