"""A run of the command line in a process of its own: what it printed, how long and how large."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.bench import machine

ROOT = Path(__file__).parent.parent


def measured(words: Sequence[str], *, output: str | None = "--output_dir") -> dict[str, Any]:
    """Run ``python WORDS``, with ``output`` and a temporary folder after them: command, exit code,
    seconds (starting Python included), peak memory in bytes, what was printed, and the rows of its
    metrics. Of a run that fails the end of its errors is printed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words, *([output, folder] if output else [])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if code := os.waitstatus_to_exitcode(status):
            errors.seek(0)
            print(errors.read()[-2000:], file=sys.stderr)
        metrics = Path(folder, "student_metrics.csv")
        rows = []
        if metrics.exists():
            with metrics.open(newline="") as f:
                rows = list(csv.DictReader(f))
    return {
        "command": " ".join(["python", *words]),
        "exit": code,
        "seconds": seconds,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "printed": printed.replace(folder, "student"),
        "metrics": rows,
        **machine(),
    }
