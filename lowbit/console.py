"""What is said while a program runs: lines on stdout, errors and progress bars on stderr.

A stream that is closed, or whose reader has gone (``| head``), ends what is said, not the run.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

WAIT = 3.0  # seconds after which it is told what is being done
#: Seconds between lines of a bar that no terminal shows; after ten times as many, a tenth of the
#: time that has gone by: a run of days should not fill its log.
LINE_EVERY = 60.0
LINE = "{desc}{percentage:.0f}%, {n_fmt} of {total_fmt}, {remaining} left, {rate_fmt}{postfix}"

_hushed = 0  # how many contexts hush


def sayable(text: str) -> str:
    """With escapes for what no encoding has: bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def silence(stream: Any) -> None:
    """What is left in its buffer would raise once more at the end of the process."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def complain(line: str, stream: Any = None) -> None:
    """A line on stderr, or what was stderr before, above a bar that is drawn there."""
    stream = stream or sys.stderr
    if stream is None:  # closed before the start: print would take stdout
        return
    try:
        tqdm.write(sayable(line), file=stream)
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


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


@contextmanager
def hushed(hush: bool = True) -> Iterator[None]:
    """Inside, if so asked, there are no bars, and nobody is told what is being done."""
    global _hushed
    _hushed += hush
    try:
        yield
    finally:
        _hushed -= hush


class Waiting:
    """Says on stderr what is being done, if that takes longer than WAIT seconds."""

    def __init__(self, what: str) -> None:
        # Meanwhile stderr may be redirected: other libraries have bars of their own.
        self._timer = threading.Timer(WAIT, complain, [f"{what} ...", sys.stderr])
        self._timer.daemon = True

    def __enter__(self) -> Waiting:
        if not _hushed:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def draws() -> bool:
    """Whether a bar on stderr can be drawn again and again in one place."""
    return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())


class _Drawing:
    """stderr for a bar. Where it cannot be drawn over, a line now and then."""

    def __init__(self, stream: Any, terminal: bool) -> None:
        self.stream, self.terminal = stream, terminal
        self.began = self.told = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        """tqdm clears and draws again the bars of stderr where a line is written."""
        return self.terminal and other is self.stream

    def write(self, text: str) -> None:
        if not self.terminal:
            now = time.monotonic()
            if not text.strip() or now - self.told < max(LINE_EVERY, (now - self.began) / 10):
                return
            self.told, text = now, text.strip() + "\n"
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            silence(self.stream)

    def flush(self) -> None:
        """`write` does it."""


def progress_bar(
    iterable: Any = None, desc: str | None = None, *, disable: bool = False, **kwargs: Any
) -> tqdm:
    """A bar on stderr, gone when it is done: a widget in a notebook that has them, lines where
    nothing can be drawn over."""
    if sys.stderr is None or _hushed or disable:
        return tqdm(iterable, desc=desc, disable=True, **kwargs)
    if in_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.auto import tqdm as widget

        return widget(iterable, desc=desc, leave=False, **kwargs)
    if draws():
        kwargs |= {"dynamic_ncols": True} if sys.stderr.isatty() else {"ncols": 80}
    else:
        kwargs["bar_format"] = LINE
        desc = f"{desc}: " if desc else None  # as `set_description` has it
    return tqdm(iterable, desc=desc, file=_Drawing(sys.stderr, draws()), leave=False, **kwargs)
