"""Rivals' best settings, found on a seed that no result uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lowbit.options import ADAMW_MOMENTUM, default
from studies.bench import Bench
from studies.tasks import METHODS, Task, optimizer_of

TUNING_SEED = 1000  # rates are chosen on a seed that no result uses
#: What tuning tries beside rates: a flag and its values, the first while it looks for the rate.
SHAPES = {"schedulefree": ("momentum", ("0.9", "0.95", "0.98"))}
NUMBERS = ("weight_decay", "momentum", "adamw_momentum")  # tuned, beside the rate
SCHEDULES = ("lr_schedule", ("linear", "cosine", "wsd"))
DECAYS = (0.01, 0.1, 0.3, 1.0)  # from distillation.py's default
MOMENTA = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)


def tune(bench: Bench, method: str, task: Task) -> tuple[list[str], list[dict[str, Any]]]:
    """(best flags, the tuning table): rates a factor 2 apart on a linear schedule until the best
    is interior, the other schedules at that rate (of Schedule-Free, which has none, other
    momenta), then, in rounds, while it helps: weight decay, momentum, that of what Muon leaves to
    AdamW, schedule, rate, one step of its scale after the other. A better trial that the log holds
    already is where the next round starts. One seed, which no result uses. From a log: as far as
    its runs of these rounds go."""
    table: dict[str, dict[str, Any]] = {}  # a row a trial, under its flags
    optimizer = optimizer_of(method)
    name, (first, *others) = SHAPES.get(optimizer, SCHEDULES)
    order = list(dict.fromkeys(("lr", name, *NUMBERS)))  # of the flags, in the log's keys

    def flags(trial: dict[str, Any]) -> list[str]:
        pairs = [(k, trial[k]) for k in order if k in trial]
        pairs = [x for x in pairs if x != ("weight_decay", DECAYS[0])]
        return [word for k, v in pairs for word in (f"--{k}", v if k == name else f"{v:g}")]

    def key(trial: dict[str, Any]) -> dict[str, Any]:
        return bench.key(method, task.flags, task.steps, TUNING_SEED, flags(trial))

    def losses(trials: Sequence[dict[str, Any]]) -> list[float]:
        found = [r["final_loss"] for r in bench.run(map(key, trials))]
        for trial, loss in zip(trials, found, strict=True):
            table[str(flags(trial))] = {**trial, "loss": loss}
        return found

    start = task.rates[method]
    plain = {"lr": start, name: first, "weight_decay": DECAYS[0]}
    rates = [start / 2, start, start * 2]
    found = dict(zip(rates, losses([{**plain, "lr": r} for r in rates]), strict=True))
    while (rate := min(found, key=found.__getitem__)) in (min(found), max(found)):
        if len(found) > 7:
            break
        further = rate / 2 if rate == min(found) else rate * 2
        (found[further],) = losses([{**plain, "lr": further}])
    best: dict[str, Any] = {**plain, "lr": rate}
    lowest = found[rate]
    shapes = [{**best, name: x} for x in others]
    for trial, loss in zip(shapes, losses(shapes), strict=True):
        if loss < lowest:
            best, lowest = trial, loss

    def climb(what: str, values: Iterable[float | str]) -> bool:
        """Whether any of the values helped; the last that did is kept."""
        nonlocal best, lowest
        before = lowest
        for value in values:
            trial = {**best, what: value}
            if bench.from_log and bench.missing([key(trial)]):
                break
            (loss,) = losses([trial])
            if loss >= lowest:
                break
            best, lowest = trial, loss
        return lowest < before

    def climb_scale(what: str, scale: Sequence[float], usual: float) -> None:
        """Down, or else up, the scale."""
        here = best.get(what, usual)  # a trial on record may lie beside the scale
        below, above = [x for x in scale if x < here], [x for x in scale if x > here]
        climb(what, below[::-1]) or climb(what, above)

    def best_on_record() -> None:
        """A climb ends at a local optimum: trials of other climbs, or made by hand, count."""
        nonlocal best, lowest
        for r in bench.log.runs:
            if r["method"] != method or r["seed"] != TUNING_SEED or r["final_loss"] >= lowest:
                continue
            words = r["flags"][len(METHODS[method]) :]
            pairs = {f[2:]: v for f, v in zip(words[::2], words[1::2], strict=False)}
            if pairs.keys() <= set(order):
                pairs = {"weight_decay": DECAYS[0], **pairs}
                trial = {k: pairs[k] if k == name else float(pairs[k]) for k in order if k in pairs}
                if bench.log.find(key(trial)) is r:  # of this task and horizon
                    (lowest,) = losses([trial])
                    best = trial

    before = math.inf
    while lowest < before:
        before = lowest
        climb_scale("weight_decay", DECAYS, DECAYS[0])
        if name != "momentum":
            climb_scale("momentum", MOMENTA, default("momentum", optimizer, "random"))
        if optimizer == "muon":
            climb_scale("adamw_momentum", MOMENTA, ADAMW_MOMENTUM)
        for shape in [x for x in (first, *others) if x != best[name]]:
            climb(name, [shape])
        peak = best["lr"]
        for factor in (0.5, 2.0):
            climb("lr", [peak * factor**n for n in range(1, 5)])
        best_on_record()
    return flags(best), list(table.values())
