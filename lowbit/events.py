"""What a run tells, as events: lines for a person, JSON for a program, metrics for a log.

Events, in order: ``start``, ``step`` (to logs only), ``epoch``, ``trained``, ``warning``,
``summary``, ``files``; ``finished`` where there was nothing to do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from lowbit.console import Printer

LOGS = ("tensorboard", "wandb", "trackio")
#: What --quiet leaves.
FINAL = {"warning", "summary", "files", "finished"}

Log = Callable[[str, dict[str, Any]], None]  # told each event and its values


def add_flags(group: Any, switch: dict[str, Any]) -> None:
    """How a run is told, in a group of an argparse parser. switch: arguments of a true|false."""
    group.add_argument(
        "--quiet", default=False, help="say only errors, the final losses and files", **switch
    )
    group.add_argument(
        "--json",
        default=False,
        help="say each thing as a JSON object a line: start, epochs, summary, files; no bars",
        **switch,
    )
    group.add_argument(
        "--log_to",
        nargs="+",
        choices=[*LOGS, "none"],
        default=[],
        metavar="LOG",
        help="also write the metrics to tensorboard, wandb, trackio (extras of these names)",
    )


def plain(value: Any) -> Any:
    """As strict JSON has it: null for what is not a finite number, and for an empty cell."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


class Reporter(Printer):
    """Says a run's events on stdout as the flags want it, and tells its logs."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = self.json = False
        self.logs: list[Log] = []
        self._trained: dict[str, Any] = {}

    def follow(self, o: argparse.Namespace) -> None:
        """Speak as the flags want it from now on."""
        self.quiet, self.json = o.quiet, o.json

    def __call__(self, line: str, end: str = "\n") -> None:
        """A line for a person."""
        if not (self.quiet or self.json):
            super().__call__(line, end)

    def event(self, name: str, lines: Sequence[str], values: dict[str, Any]) -> None:
        for log in self.logs:
            log(name, values)
        if name == "step" or (self.quiet and name not in FINAL):
            return
        if not self.json:
            for line in lines:
                super().__call__(line)
        elif name in ("trained", "warning"):  # of one object with the final losses
            self._trained |= values
        else:
            values = self._trained | values if name == "summary" else values
            super().__call__(json.dumps({"event": name, **plain(values)}))


def tell(say: Callable[[str], None], name: str, lines: Sequence[str] = (), **values: Any) -> None:
    """An event, to a `Reporter`; its lines, to what only takes lines."""
    if isinstance(say, Reporter):
        say.event(name, lines, values)
    else:
        for line in lines:
            say(line)
