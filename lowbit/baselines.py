"""Published optimisers to compare with, under the schedule that the hybrid has, too."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.nn as nn

from hybrid_optimization import named_kinds, native_bfloat16, schedule_factor
from lowbit import UserError
from lowbit.muon import OwnPrecisionMuon
from lowbit.options import WARMUP_FRACTION


class Baseline:
    """The optimiser that ``--optimizer`` names, for a run of max_steps steps on model.

    o: `lowbit.options.parse_options`' answer, after `settle_by_start`. UserError if the method's
    package is not installed.
    """

    def __init__(self, o: argparse.Namespace, model: nn.Module, max_steps: int) -> None:
        self.optimizers = make_optimizers(o, model)
        self.lr, self.lr_schedule, self.max_steps = o.lr, o.lr_schedule, max_steps
        self._peaks = [[g["lr"] for g in opt.param_groups] for opt in self.optimizers]

    def step(self, t: int) -> float:
        """Step t, from 0, with the gradients that are there; returns its learning rate."""
        factor = schedule_factor(t, self.max_steps, WARMUP_FRACTION, self.lr_schedule)
        for opt, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            opt.step()
        return self.lr * factor

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
    """Muon takes the blocks' matrices, in steps of AdamW's size, so that AdamW takes the rest at
    the same rate; the others take everything."""
    named = named_kinds(model)
    matrices = [p for _, p, kind in named if kind == "matrix"]
    rest = [p for _, p, kind in named if kind != "matrix"]
    everything = [p for _, p, _ in named]
    decay = dict(weight_decay=o.weight_decay)
    betas = (o.momentum, 0.95)
    if o.method == "sgd":
        return [torch.optim.SGD(everything, o.lr, momentum=o.momentum, **decay)]
    if o.method == "muon":
        device = everything[0].device
        emulated = device.type == "cpu" and not native_bfloat16(device)
        muon = OwnPrecisionMuon if emulated else torch.optim.Muon
        return [
            muon(matrices, o.lr, momentum=o.momentum, adjust_lr_fn="match_rms_adamw", **decay),
            torch.optim.AdamW(rest, o.lr, betas=(o.adamw_momentum, 0.95), **decay),
        ]
    try:
        if o.method == "schedulefree":  # its own warm-up would be a second one
            from schedulefree import AdamWScheduleFree

            schedule_free = AdamWScheduleFree(everything, o.lr, betas=betas, **decay)
            schedule_free.train()
            return [schedule_free]
        if o.method == "prodigy":
            from prodigyopt import Prodigy

            # The coefficient of its own estimate is what its authors tune; the rate, 1, is the
            # schedule's, whose warm-up calls for the safeguard. Its own second beta, 0.999, serves
            # it better than 0.95 (EXPERIMENTS.md).
            betas = (o.momentum, 0.999)
            with redirect_stdout(io.StringIO()):  # it says that its decay is decoupled
                found = Prodigy(
                    everything, d_coef=o.lr, betas=betas, safeguard_warmup=True, **decay
                )
            return [found]
    except ImportError as e:
        raise UserError(
            f"--optimizer {o.method} needs the package {e.name}: pip install {e.name}"
        ) from e
    return [torch.optim.AdamW(everything, o.lr, betas=betas, **decay)]
