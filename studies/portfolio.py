"""Small tasks of many kinds: on some parts of the optimiser were chosen, on two nothing was.

Each task gives a model, a function that draws a batch and returns its loss, a function that
returns the held-out loss, and the number of steps. Data come with scikit-learn and Python. A task
is made by its seed: the model's weights and the order of batches; the split is always the same.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from hybrid_optimization import HybridOptimizer, schedule_factor
from lowbit.models.interface import LanguageModel, Output, linear_layers
from lowbit.models.teacher import load_teacher
from lowbit.options import WARMUP_FRACTION

SPLIT_SEED = 7
HELD_OUT = 0.2


@dataclass
class Problem:
    model: nn.Module
    loss: Callable[[], torch.Tensor]  # of a batch, with gradients
    held_out: Callable[[], float]
    steps: int
    inputs: Sequence[torch.Tensor]  # of all that is trained on, in batches
    batch: int  # samples a step; may be set


def problem(
    seed: int,
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    batch: int,
    steps: int,
) -> Problem:
    """Samples x (n, ...) and targets y (n, ...): batches without replacement, epoch by epoch."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    kept = round(HELD_OUT * len(x))
    test, train = torch.from_numpy(order[:kept]), order[kept:]
    rng = np.random.default_rng(seed)
    waiting: list[int] = []

    def draw() -> torch.Tensor:
        while len(waiting) < found.batch:
            waiting.extend(rng.permutation(train))
        picked = torch.tensor(waiting[: found.batch])
        del waiting[: found.batch]
        model.train()
        return loss(model(x[picked]), y[picked])

    @torch.no_grad()
    def held_out() -> float:
        model.eval()
        return float(loss(model(x[test]), y[test]))

    inputs = x[torch.from_numpy(train)].split(batch)
    found = Problem(model, draw, held_out, steps, inputs, batch)
    return found


@cache
def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)


def mlp(*widths: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), between()]
    return nn.Sequential(*layers[:-1])


def digits_mlp(seed: int) -> Problem:
    x, y = digit_images()
    return problem(seed, mlp(64, 128, 128, 10), x.flatten(1), y, F.cross_entropy, 32, 440)


def digits_cnn(seed: int) -> Problem:
    x, y = digit_images()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip
    return problem(seed, model, x[:, None], y, F.cross_entropy, 32, 300)


class SmallViT(nn.Module):
    """Patches of 2 x 2, two blocks of width 48."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 48, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(16, 48))
        block = nn.TransformerEncoderLayer(
            48, 4, 96, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).mT + self.place
        return self.head(self.blocks(tokens).mean(1))


def digits_vit(seed: int) -> Problem:
    x, y = digit_images()
    return problem(seed, SmallViT(), x[:, None], y, F.cross_entropy, 32, 440)


def digits_autoencoder(seed: int) -> Problem:
    x = digit_images()[0].flatten(1)
    return problem(seed, mlp(64, 96, 12, 96, 64, between=nn.GELU), x, x, F.mse_loss, 64, 500)


def tabular(seed: int) -> Problem:
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(4000, n_features=10, noise=1.0, random_state=0)
    inputs = torch.tensor(2 * x - 1, dtype=torch.float32)
    targets = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    model = mlp(10, 128, 128, 1, between=nn.SiLU)
    return problem(seed, model, inputs, targets, F.mse_loss, 64, 500)


def float64_function(seed: int) -> Problem:
    """A smooth function of two variables in float64, as physics-informed networks fit."""
    points = torch.from_numpy(np.random.default_rng(SPLIT_SEED).uniform(-1, 1, (2000, 2)))
    a, b = points.T
    values = (torch.sin(math.pi * a) * torch.exp(-b) + 0.5 * torch.cos(3 * a * b))[:, None]
    model = mlp(2, 64, 64, 1, between=nn.Tanh).double()
    return problem(seed, model, points, values, F.mse_loss, 128, 600)


@cache
def characters() -> tuple[torch.Tensor, int]:
    """Sources of the standard library as ids of characters, and how many there are."""
    import argparse
    import ast
    import difflib
    import json
    import typing

    text = "".join(inspect.getsource(m) for m in (argparse, json, ast, difflib, typing))
    known, ids = np.unique(
        np.frombuffer(text.encode("ascii", "ignore"), np.uint8), return_inverse=True
    )
    return torch.from_numpy(ids.astype(np.int64)), len(known)


def next_character(seed: int, model: nn.Module, length: int, batch: int, steps: int) -> Problem:
    ids, _ = characters()
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return problem(seed, model, windows[:, :-1], windows[:, 1:], loss, batch, steps)


class SmallGRU(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.gru = nn.GRU(64, 128, batch_first=True)
        self.head = nn.Linear(128, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embedding(ids))[0])


def character_gru(seed: int) -> Problem:
    return next_character(seed, SmallGRU(characters()[1]), 64, 16, 400)


class SmallGPT(nn.Module):
    """Two blocks of width 64."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.place = nn.Embedding(length, 64)
        block = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(ids) + self.place(torch.arange(length))
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def character_gpt(seed: int) -> Problem:
    return next_character(seed, SmallGPT(characters()[1], 64), 64, 16, 400)


class ResidualMLP(nn.Module):
    """Two blocks of width 64 with layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(30, 64), nn.Linear(64, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def diagnoses(seed: int) -> Problem:
    """Of breast cancer, from 30 measurements of 569 patients."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    inputs, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(data.target)
    return problem(seed, ResidualMLP(), inputs, labels, F.cross_entropy, 32, 300)


class Factors(nn.Module):
    """A user's and an item's vector of 16 numbers and one number each."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, 17), nn.Embedding(items, 17)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        u, v = self.users(pairs[:, 0]), self.items(pairs[:, 1])
        return (u[:, 1:] * v[:, 1:]).sum(1) + u[:, 0] + v[:, 0]


def ratings(seed: int) -> Problem:
    """12,000 noisy entries of a matrix of rank 5, by its factors."""
    rng = np.random.default_rng(SPLIT_SEED)
    a, b = rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    pairs = np.stack([rng.integers(300, size=12000), rng.integers(200, size=12000)], 1)
    values = (a[pairs[:, 0]] * b[pairs[:, 1]]).sum(1) / math.sqrt(5)
    values += 0.3 * rng.normal(size=len(values))
    targets = torch.tensor(values, dtype=torch.float32)
    return problem(seed, Factors(300, 200), torch.from_numpy(pairs), targets, F.mse_loss, 128, 600)


@cache
def pretrained_model() -> LanguageModel:
    """The embedded teacher: two million weights, which read bytes of documentation."""
    with torch.random.fork_rng():  # reading it draws weights, once; a task's are its seed's
        return load_teacher("embedded")[0]


def own_copy() -> LanguageModel:
    return copy.deepcopy(pretrained_model()).requires_grad_(True)


@cache
def code_windows() -> torch.Tensor:
    """Bytes of scikit-learn's sources, which that model never read. No run sees all of them."""
    import sklearn

    files = sorted(Path(sklearn.__file__).parent.glob("*/_*.py"))[:30]
    text = bytearray(b"".join(f.read_bytes() for f in files)[: 2500 * 65])
    return torch.frombuffer(text, dtype=torch.uint8).long().view(-1, 65)


def next_byte(seed: int, model: nn.Module) -> Problem:
    def loss(output: Output, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())

    windows = code_windows()
    return problem(seed, model, windows[:, :-1], windows[:, 1:], loss, 8, 100)


class LowRank(nn.Module):
    """A frozen layer and what is added to its weight: two factors (LoRA, arXiv 2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.empty(rank, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 2 * F.linear(F.linear(x, self.a), self.b)


def fine_tuning(seed: int) -> Problem:
    return next_byte(seed, own_copy())


def with_adapters(model: LanguageModel) -> LanguageModel:
    """The model, frozen, with an adapter at every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in linear_layers(block).items():
            block.set_submodule(name, LowRank(layer))
    return model


def low_rank(seed: int) -> Problem:
    """Adapters are made, not changed."""
    return next_byte(seed, with_adapters(own_copy()))


TASKS: dict[str, Callable[[int], Problem]] = {
    "digits, MLP": digits_mlp,
    "digits, CNN": digits_cnn,
    "digits, ViT": digits_vit,
    "digits, autoencoder": digits_autoencoder,
    "tabular regression, MLP": tabular,
    "smooth function in float64, MLP": float64_function,
    "characters, GRU": character_gru,
    "characters, GPT": character_gpt,
    "diagnoses, residual MLP": diagnoses,
    "ratings, matrix factors": ratings,
}
#: On which nothing was tried before they were run for the record.
UNSEEN = ("diagnoses, residual MLP", "ratings, matrix factors")
#: Of a model that was trained before, on other text.
FINE_TUNING: dict[str, Callable[[int], Problem]] = {
    "all weights": fine_tuning,
    "low-rank adapters": low_rank,
}


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Rates that rise over a twentieth of the run and fall to 0."""
    return LambdaLR(optimizer, lambda t: schedule_factor(t, steps, WARMUP_FRACTION, "linear"))


def run(
    task: str,
    seed: int,
    make: Callable[[nn.Module], list[torch.optim.Optimizer]],
    *,
    linear: bool,
    batch: float = 1.0,
) -> float:
    """Held-out loss after the task's steps, of averaged weights where an optimiser averages;
    infinite where it is not a number. linear: the rates rise over a twentieth of the run and fall
    to 0; False where optimisers see to that. batch: times the task's own."""
    torch.manual_seed(seed)
    p = (TASKS | FINE_TUNING)[task](seed)
    p.batch = max(1, round(p.batch * batch))
    optimizers = make(p.model)
    schedules = [linear_schedule(opt, p.steps) for opt in optimizers if linear]
    for _ in range(p.steps):
        p.model.zero_grad()
        p.loss().backward()
        for opt in optimizers:
            opt.step()
        for schedule in schedules:
            schedule.step()
    for opt in optimizers:
        if isinstance(opt, HybridOptimizer) and any("average" in s for s in opt.state.values()):
            opt.eval()
            torch.optim.swa_utils.update_bn(p.inputs, p.model)
    found = p.held_out()
    return found if math.isfinite(found) else math.inf
