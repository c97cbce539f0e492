"""What checkpoints cost, and how soon a resumed run goes on:

    python benchmarks/checkpoints/measure.py [--teachers embedded smollm2]

For each teacher a run of 20 epochs (of SmolLM2: 2, without calibration) with checkpoints as by
default and one in the middle, where SIGTERM stops it; then `--resume`, up to the line that says
so. Rewrites runs.jsonl and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import distillation  # noqa: E402
from lowbit.training.resume import USUAL_SECONDS, Keeper  # noqa: E402
from lowbit.training.run import Run  # noqa: E402
from studies.bench import machine  # noqa: E402

FLAGS = {
    "embedded": "--epochs 20",
    "smollm2": "--epochs 2 --calibrate=false --teacher smollm2",
}


def measure(teacher: str, folder: Path) -> dict[str, Any]:
    """Times of one teacher. In this process until the signal, in another from then on."""
    saves: list[tuple[float, int]] = []
    steps: list[float] = []
    save, step = Keeper.save, Run.step

    def timed_save(self: Keeper, run: Any) -> Path:
        started = time.perf_counter()
        path = save(self, run)
        size = sum(f.stat().st_size for f in path.iterdir())
        saves.append((time.perf_counter() - started, size))
        return path

    def timed_step(self: Run) -> Any:
        started = time.perf_counter()
        result = step(self)
        steps.append(time.perf_counter() - started)
        if self.t == self.s.max_steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Keeper.save, Run.step = timed_save, timed_step  # type: ignore[method-assign]
    words = ["--hybrid", "--ternary", "--qat", *FLAGS[teacher].split(), "--output_dir", str(folder)]
    started = time.perf_counter()
    code = distillation.main(words)
    first = time.perf_counter() - started
    Keeper.save, Run.step = save, step  # type: ignore[method-assign]
    assert code == 128 + signal.SIGTERM

    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "distillation.py"), "--resume", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    resumed = next(x for x in process.stdout if re.match("Resumed at step", x))
    start = time.perf_counter() - started
    process.kill()
    process.communicate()
    seconds, size = saves[-1]
    return {
        "teacher": teacher,
        "flags": " ".join(words[:-2]),
        "saves": [{"seconds": s, "bytes": b} for s, b in saves],
        "steps": len(steps),
        "seconds_of_steps": sum(steps),
        "seconds_until_stopped": first,
        "share_of_a_checkpoint_every_ten_minutes": seconds / USUAL_SECONDS,
        "share_of_this_half_run": sum(s for s, _ in saves) / first,
        "checkpoint_bytes": size,
        "seconds_to_resume": start,
        "told": resumed.strip(),
        **machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teachers", nargs="+", choices=list(FLAGS), default=list(FLAGS))
    o = parser.parse_args()
    runs = []
    for teacher in o.teachers:
        with tempfile.TemporaryDirectory() as name:
            runs.append(measure(teacher, Path(name, "out")))
        print(json.dumps(runs[-1], indent=1), flush=True)
    (HERE / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    kept = [{k: v for k, v in r.items() if k != "saves"} for r in runs]
    (HERE / "summary.json").write_text(json.dumps({"runs": kept, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
