"""SIGTERM, SIGHUP and Ctrl-C: at once, or after the step that is going on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal ended the run; told: the user knows what is left."""

    def __init__(self, number: int, told: bool = False) -> None:
        super().__init__(number)
        self.code, self.told = 128 + number, told  # as shells have it


class Stop:
    """Turns signals into `Stopped`: raised where the program happens to be, or, inside
    `deferred`, noted in ``number`` for the loop to see. A second signal is raised at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)
                # What the caller has ignored (nohup) stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self.number is not None:
            raise Stopped(number)
        self.number = number
        with suppress(OSError, ValueError, RuntimeError):  # stderr may be gone, or in use
            print(
                "\nfinishing the step, then saving; a second signal ends at once",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal only sets ``number``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
