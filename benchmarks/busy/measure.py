"""Steps of the embedded teacher's student on a machine that is idle, and on one that is busy:
python benchmarks/busy/measure.py [--rounds 3]

With as many threads as cores, beside as many other processes as --others, each busy all the time
and in a session of its own, as other programs are: Linux gives each session the same share of a
core, so that the one that spins on two cores has less of each.
OpenMP's default (its threads spin 300,000 times before they sleep) and what our programs set take
turns. Appends a JSON line a run to runs.jsonl beside this file and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from studies.bench import RunLog, machine  # noqa: E402
from studies.commands import measured  # noqa: E402

COMMAND = (
    "distillation.py --hybrid --ternary --qat --epochs 1 --calibrate=false --data QUICKSTART.md "
    "--samples_per_epoch 48 --save_metrics"
)
SPINS = {"OpenMP's default": "300000", "ours": None}


@contextlib.contextmanager
def busy(others: int) -> Iterator[None]:
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in range(others)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1])
    o = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    log = RunLog(HERE / "runs.jsonl")
    for n in range(o.rounds):
        for others in o.others:
            for name, count in sorted(SPINS.items(), reverse=bool(n % 2)):
                os.environ.pop("GOMP_SPINCOUNT", None)
                if count:
                    os.environ["GOMP_SPINCOUNT"] = count
                with busy(others):
                    run = measured(COMMAND.split())
                step = float(run["metrics"][0]["median_step_seconds"])
                log.append({**run, "others": others, "spins": name, "step_seconds": step})
                print(f"{others} others, {name}: {step:.3f} s a step", flush=True)
    table = []
    for others in sorted({run["others"] for run in log.runs}):
        found = {n: [r["step_seconds"] for r in log.runs
                     if r["others"] == others and r["spins"] == n] for n in SPINS}  # fmt: skip
        default, ours = found.values()
        ratios = [a / b for a, b in zip(default, ours, strict=False)]
        table.append(
            {
                "others": others,
                "rounds": len(ratios),
                "step_seconds": {n: statistics.median(v) for n, v in found.items()},
                "default_over_ours": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }
        )
    (HERE / "summary.json").write_text(json.dumps({"runs": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
