"""A run that is killed at random, a hundred times, and resumed each time; and an undisturbed one.

    python benchmarks/chaos/measure.py [--kills 100] [--epochs 660] [--seed 0] [--folder DIR]

DIR holds both runs; given again, this script goes on where it was ended. Both must end with the
same files. Writes runs.jsonl, a line a kill, and summary.json. A run that ends before its last kill
is an error: more epochs.
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
    parser.add_argument("--epochs", type=int, default=660)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    o = parser.parse_args()
    rng, here = random.Random(o.seed), machine()
    log_path = HERE / "runs.jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = o.folder or Path(name)
        whole, parts = folder / "whole", folder / "parts"
        goes_on = whole.exists() or parts.exists()
        if not parts.exists():
            log_path.unlink(missing_ok=True)
        kills = len(log_path.read_text().splitlines()) if parts.exists() else 0
        for _ in range(kills):
            rng.uniform(EARLIEST, LATEST)
        started = time.perf_counter()
        subprocess.run(command(whole, o.epochs), check=True, capture_output=True)
        undisturbed = None if goes_on else time.perf_counter() - started
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
            with log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if process.returncode:
            raise SystemExit(errors.decode())
        if kills < o.kills:
            raise SystemExit(f"the run ended after {kills} kills: give it more --epochs")
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
            "seconds_with_kills": None if goes_on else time.perf_counter() - started,
            **here,
        }
        (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
