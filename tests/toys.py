"""A model that is not ours, its data, and bit-exact comparison, for the optimiser's tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from hybrid_optimization import (
    ConstrainedOptimizer,
    HybridOptimizationManager,
    HybridTrainingConfig,
)

#: The linear layers of the plain decoder's blocks, by the last part of their names.
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_net(seed: int = 0) -> nn.Module:
    """A model that is not ours: convolution, normalisation, embedding-free, with biases."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(4 * 36),
        nn.Linear(4 * 36, 16),
        nn.GELU(),
        nn.Linear(16, 10),
    )


def digits(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:n] / 16, dtype=torch.float32)
    return images[:, None], torch.tensor(data.target[:n])


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def losses_plain_and_compiled(device: str, n: int) -> list[float]:
    """After five steps on n digits: of a model, and of the same under torch.compile."""
    x, y = (t.to(device) for t in digits(n))
    plain, model = make_net().to(device), make_net().to(device)
    losses = []
    for m, root in ((plain, plain), (torch.compile(model), model)):
        optimizer = ConstrainedOptimizer(root, lr=2e-3)
        for _ in range(5):
            loss = backward(m, x, y)
            optimizer.step()
        losses.append(loss.item())
    return losses


def toy_run(method: str, flags: list[str], task: list[str], seed: int) -> dict:
    """A run of a study, to be called in another process: notes that it began, may fail or last."""
    with Path(method).open("a") as f:
        f.write(f"{os.getpid()}\n")
    if "fail" in flags:
        raise ValueError("no")
    if "last" in flags:
        time.sleep(60)
    return {"final_loss": float(seed)}


def distributed_run(rank: int, count: int, folder: str, how: str) -> None:
    """Process ``rank`` of ``count``: eight steps on its share of 64 digits, of the "optimizer" or
    of the "manager", whose model may be "compiled", with a loss that is not finite on one rank;
    leaves weights and what the steps reported in rank<n>.pt."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    model = nn.parallel.DistributedDataParallel(make_net())
    x, y = digits()
    x, y = x[rank::count], y[rank::count]
    manager = HybridOptimizationManager(HybridTrainingConfig(max_steps=8, data_clusters=count))
    optimizer = ConstrainedOptimizer(model, lr=2e-3, product_dtype=torch.float32)
    found = []
    trained = torch.compile(model, backend="eager") if how == "compiled" else model
    for step in range(8):
        loss = backward(trained, x, y)
        if how != "optimizer":
            manager.observe_clusters(range(count), [1.0 + rank, 4.0])
            value = float("nan") if (rank, step) == (1, 3) else loss
            found.append(manager.optimization_step(trained, value, None, rank, step))
        else:
            optimizer.step()
    torch.save({"model": model.module.state_dict(), "steps": found}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def same(a, b):
    """Nested structures with bit-identical tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b or (a != a and b != b)  # NaN
