"""AdamW and SGD under the schedule that the hybrid has, too; rivals of the studies on request."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from hybrid_optimization import named_kinds, schedule_factor
from lowbit.options import WARMUP_FRACTION


class Baseline:
    """The optimiser that ``--optimizer`` names, for a run of max_steps steps on model.

    o: `lowbit.options.parse_options`' answer, after `settle_by_start`. UserError if the method's
    package is not installed.
    """

    def __init__(self, o: argparse.Namespace, model: nn.Module, max_steps: int) -> None:
        self.optimizers = make_optimizers(o, model)
        self.lr, self.lr_schedule, self.max_steps = o.lr, o.lr_schedule, max_steps
        self.decay_fraction = o.decay_fraction
        self._peaks = [[g["lr"] for g in opt.param_groups] for opt in self.optimizers]

    def step(self, t: int) -> float:
        """Step t, from 0, with the gradients that are there; returns its learning rate."""
        factor = schedule_factor(
            t, self.max_steps, WARMUP_FRACTION, self.lr_schedule, self.decay_fraction
        )
        for opt, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            opt.step()
        return self.lr * factor

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [opt.state_dict() for opt in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for opt, mine in zip(self.optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(mine)

    def use_averaged(self, averaged: bool = True) -> None:
        """Give the model the weights to be judged by, where they are not those that are stepped
        (Schedule-Free's mean of them), or with False take them away again."""
        for opt in self.optimizers:
            switch: Any = getattr(opt, "eval" if averaged else "train", None)
            if switch:
                switch()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """`use_averaged` for a while."""
        self.use_averaged()
        yield
        self.use_averaged(False)


def make_optimizers(o: argparse.Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    everything = [p for _, p, _ in named_kinds(model)]
    decay = dict(weight_decay=o.weight_decay)
    if o.method == "sgd":
        return [torch.optim.SGD(everything, o.lr, momentum=o.momentum, **decay)]
    if o.method == "adamw":
        return [torch.optim.AdamW(everything, o.lr, betas=(o.momentum, 0.95), **decay)]
    from studies.rivals import make_rivals  # what only comparisons need

    return make_rivals(o, model)
