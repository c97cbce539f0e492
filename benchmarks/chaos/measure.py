"""A run that is killed at random, a hundred times, and resumed each time; and an undisturbed one.

    python benchmarks/chaos/measure.py [--kills 100] [--epochs 190] [--seed 0] [--undisturbed DIR]

DIR holds an undisturbed run's files, where they are there already. Both must end with the same
files. Writes runs.jsonl, a line a kill, and summary.json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from studies.bench import machine  # noqa: E402

FLAGS = (
    "--hybrid --ternary --qat --seq_len 32 --batch_size 4 --samples_per_epoch 64 --eval_every 10 "
    "--calibration_tokens 2048 --save_metrics --save_every 5s"
)
EARLIEST, LATEST = 1.0, 16.0  # seconds after a process started


def command(folder: Path, epochs: int) -> list[str]:
    words = [*FLAGS.split(), "--epochs", str(epochs), "--output_dir", str(folder), "--resume"]
    return [sys.executable, str(ROOT / "distillation.py"), *words]


def outcome(folder: Path) -> dict[str, str]:
    """A sum for each file of a finished run, times aside."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".npz":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".pth":
            state = torch.load(path, weights_only=True)["state_dict"]
            whole = b"".join(v.numpy().tobytes() for v in state.values())
            found[path.name] = hashlib.sha256(whole).hexdigest()
        elif path.suffix == ".csv":
            with path.open(newline="") as f:
                rows = [
                    {k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(f)
                ]
            found[path.name] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return found


def newest(folder: Path) -> int:
    names = [p.name for p in folder.glob("checkpoints/*-step-*")]
    return max((int(n.rpartition("-")[2]) for n in names), default=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=190)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path)
    o = parser.parse_args()
    rng, here = random.Random(o.seed), machine()
    with tempfile.TemporaryDirectory() as name, (HERE / "runs.jsonl").open("w") as log:
        whole, parts = o.undisturbed or Path(name, "whole"), Path(name, "parts")
        started = time.perf_counter()
        if not o.undisturbed:
            subprocess.run(command(whole, o.epochs), check=True, capture_output=True)
        undisturbed = None if o.undisturbed else time.perf_counter() - started
        kills = 0
        started = time.perf_counter()
        while True:
            process = subprocess.Popen(
                command(parts, o.epochs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            wait = rng.uniform(EARLIEST, LATEST) if kills < o.kills else None
            try:
                _, errors = process.communicate(timeout=wait)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            kills += 1
            line = {"kill": kills, "after_seconds": round(wait, 2), "checkpoint": newest(parts)}
            line |= here
            log.write(json.dumps(line) + "\n")
            log.flush()
        if process.returncode:
            raise SystemExit(errors.decode())
        a, b = outcome(whole), outcome(parts)
        summary = {
            "command": f"python benchmarks/chaos/measure.py --kills {o.kills} --epochs {o.epochs} "
            f"--seed {o.seed}",
            "flags": FLAGS,
            "steps": 16 * o.epochs,
            "kills": kills,
            "same": a == b,
            "files": a,
            "files_after_kills": b,
            "seconds_undisturbed": undisturbed,
            "seconds_with_kills": time.perf_counter() - started,
            **here,
        }
        (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
