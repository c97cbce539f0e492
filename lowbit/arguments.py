"""Values of flags, and a parser that tells a mistake in one line; for every command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from lowbit.console import complain


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"error: {message} (--help lists the flags)")
        raise SystemExit(2)


def number(
    kind: type, low: float, high: float = math.inf, *, open_low: bool = False
) -> Callable[[str], Any]:
    above = f"above {low:g}" if open_low else f"at least {low:g}"
    range_ = above + (f" and at most {high:g}" if high < math.inf else "")
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value: Any = kind(text)
        except ValueError:
            value = math.nan
        good = abs(value) <= 2**53  # false for nan and inf too
        good = good and value <= high and (value > low if open_low else value >= low)
        if not good:
            raise argparse.ArgumentTypeError(f"expected {noun} {range_}, not {text!r}")
        return value

    return parse


COUNT = number(int, 1, 2**31 - 1)  # what other packages hold in 32 bits


def words(text: str) -> str:
    """A flag's text; what the shell gave that is not UTF-8 is refused."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise argparse.ArgumentTypeError(f"expected UTF-8, not {text!r}") from e
    return text


def boolean(text: str) -> bool:
    value = {
        "true": True,
        "1": True,
        "yes": True,
        "on": True,
        "false": False,
        "0": False,
        "no": False,
        "off": False,
    }.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return value


def interval(text: str) -> tuple[str, float]:
    """What --save_every says: 3 -> ("epochs", 3); 90s, 30m, 2h -> ("seconds", ...)."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        if text[-1:] in units:
            return "seconds", number(float, 0, open_low=True)(text[:-1]) * units[text[-1]]
        return "epochs", number(int, 1)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected epochs (3) or a time (90s, 30m, 2h), not {text!r}"
        ) from None
