"""What is said while a program runs: lines on stdout, errors and progress bars on stderr.

A stream that is closed, or whose reader has gone (``| head``), ends what is said, not the run.
"""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines of a bar that no terminal shows


def sayable(text: str) -> str:
    """With escapes for what no encoding has: bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def silence(stream: Any) -> None:
    """What is left in its buffer would raise once more at the end of the process."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def complain(line: str) -> None:
    """A line on stderr, above a bar that is drawn there."""
    if sys.stderr is None:  # closed before the start: print would take stdout
        return
    try:
        tqdm.write(sayable(line), file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        silence(sys.stderr)


class Printer:
    """Lines on stdout. What its encoding cannot say is replaced."""

    def __init__(self) -> None:
        self.closed = sys.stdout is None
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def __call__(self, line: str, end: str = "\n") -> None:
        if self.closed:
            return
        try:
            tqdm.write(sayable(line), file=sys.stdout, end=end)
            sys.stdout.flush()
        except (OSError, ValueError):  # or of a full disk
            self.closed = True
            silence(sys.stdout)


class _Drawing:
    """stderr for a bar. Where it is no terminal a line now and then, in place of one that is drawn
    again and again."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.told = stream, time.monotonic()
        self.terminal = stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        """tqdm clears and draws again the bars of stderr where a line is written."""
        return self.terminal and other is self.stream

    def write(self, text: str) -> None:
        if not self.terminal:
            now = time.monotonic()
            if not text.strip() or now - self.told < LINE_EVERY:
                return
            self.told, text = now, text.strip() + "\n"
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            silence(self.stream)

    def flush(self) -> None:
        """`write` does it."""


def progress_bar(*args: Any, disable: bool = False, **kwargs: Any) -> tqdm:
    """A bar on stderr, gone when it is done."""
    if sys.stderr is None:
        return tqdm(*args, disable=True, **kwargs)
    return tqdm(*args, file=_Drawing(sys.stderr), leave=False, disable=disable, **kwargs)
