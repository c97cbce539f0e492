"""distillation.py in one of several processes, to which something happens:
``one_of_several.py FOLDER HAPPENS FLAGS``, HAPPENS as JSON: [[rank, step, "nan" or a signal], ...].

Leaves weights and the manager's state after the newest step in FOLDER/rank<n>.pt.
"""

from __future__ import annotations

import json
import os
import sys

import torch

import distillation
from lowbit import console
from lowbit.training import step as step_module
from lowbit.training.run import Run

console.WAIT = 3600.0  # on a machine that is busy, or not: stderr is the same
folder, happens, *flags = sys.argv[1:]
rank = int(os.environ["RANK"])
again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
mine = {step: what for r, step, what in json.loads(happens) if r == rank and not again}
original, objective = Run.step, step_module.distillation_objective
now = 0  # the number of the step, from 1


def step(self):
    global now
    now = self.t + 1
    result = original(self)
    state = {"student": self.s.student.state_dict(), "optimizer": self.optimizer.state_dict()}
    torch.save(state, f"{folder}/rank{rank}.pt")
    if isinstance(mine.get(now), int):
        os.kill(os.getpid(), mine[now])
    return result


def damaged(*arguments):
    found, ce, kl = objective(*arguments)
    return (found * float("nan") if mine.get(now) == "nan" else found), ce, kl


Run.step, step_module.distillation_objective = step, damaged
sys.exit(distillation.main(flags))
