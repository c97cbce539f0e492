"""Published optimisers that the hybrid is compared with."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout

import torch
import torch.nn as nn

from hybrid_optimization import named_kinds
from lowbit import UserError
from studies.muon import muon_for


def make_rivals(o: argparse.Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    """What ``--optimizer`` muon, schedulefree or prodigy names. Muon takes the blocks' matrices, in
    steps of AdamW's size, so that AdamW takes the rest at the same rate; the others take
    everything. UserError if the method's package is not installed.
    """
    named = named_kinds(model)
    matrices = [p for _, p, kind in named if kind == "matrix"]
    rest = [p for _, p, kind in named if kind != "matrix"]
    everything = [p for _, p, _ in named]
    decay = dict(weight_decay=o.weight_decay)
    betas = (o.momentum, 0.95)
    if o.method == "muon":
        muon = muon_for(everything[0].device)
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
    raise ValueError(f"no optimiser is called {o.method}")
