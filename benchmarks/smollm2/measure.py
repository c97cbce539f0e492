"""Conversions of SmolLM2: python benchmarks/smollm2/measure.py [--seeds 1] [--one_bit] [FLAGS]

Each run is a fresh process. Appends one JSON line a run to runs.jsonl beside this file, or in
--folder, and rewrites summary.json there, in which runs of one command differ in their seeds only.
With --teacher and --folder it measures any other teacher.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from studies.bench import RunLog, machine, mean_interval  # noqa: E402
from studies.commands import measured  # noqa: E402

COMMAND = "distillation.py {}--qat --teacher {} --save_metrics"


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found[1].replace(",", "")) if found else float("nan")


def summarise(log: RunLog) -> dict:
    commands: dict[str, list[dict]] = {}
    for run in log.runs:
        commands.setdefault(run["command"].rpartition(" --seed ")[0], []).append(run)
    table = []
    for command, runs in commands.items():
        printed = [r["printed"] for r in runs]
        loss = [number(r"student, quantized +(\S+)", p) for p in printed]
        mean, ci95 = mean_interval(loss)
        table.append(
            {
                "command": command,
                "n": len(runs),
                "loss": mean,
                "loss_ci95": ci95 if len(runs) > 1 else None,
                "teacher": number(r"\n  teacher +(\d\S+)", printed[0]),
                "kl": [number(r"KL to the teacher (\d+\.\d+)", p) for p in printed],
                "start": [number(r"student: (\S+) before", p) for p in printed],
                "after": [number(r"before training, (\d+\.\d+)", p) for p in printed],
                "worst_epoch": [
                    max(float(r["val_loss_quantized"]) for r in run["metrics"]) for run in runs
                ],
                "minutes": [r["seconds"] / 60 for r in runs],
                "step_seconds": [
                    sorted(float(x["median_step_seconds"]) for x in r["metrics"])[
                        len(r["metrics"]) // 2
                    ]
                    for r in runs
                ],
                "peak_gb": [r["peak_rss_bytes"] / 1e9 for r in runs],
                "file_bytes": number(r"Size: (\S+) bytes", printed[0]),
                "size_ratio": number(r"(\S+)x smaller", printed[0]),
            }
        )
    return {"runs": table, **machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--one_bit", action="store_true", help="weights of 1 bit, not ternary")
    parser.add_argument("--folder", type=Path, default=HERE)
    o, flags = parser.parse_known_args()
    o.folder.mkdir(exist_ok=True)
    log = RunLog(o.folder / "runs.jsonl")
    for seed in o.seeds:
        command = COMMAND.format("" if o.one_bit else "--ternary ", o.teacher)
        run = measured([*command.split(), *flags, "--seed", str(seed)])
        log.append(run)
        print(f"{run['command']}: {run['seconds']:.0f} s, exit {run['exit']}", flush=True)
        (o.folder / "summary.json").write_text(json.dumps(summarise(log), indent=1) + "\n")


if __name__ == "__main__":
    main()
