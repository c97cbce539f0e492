"""The recipe of the embedded teacher: ``python -m lowbit.train_teacher --out teacher.npz``.

Next-byte prediction on the embedded text, random 257-byte windows, the trust-region step of
`hybrid_optimization`, 2 % warm-up, linear decay to zero. Every EVAL_EVERY steps the validation loss is measured; the best weights
are kept, so that the run shows where the loss stops improving. Minutes on a GPU, hours on a CPU.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

from hybrid_optimization import ConstrainedOptimizer
from lowbit.student import CausalLM, ModelConfig

EVAL_EVERY = 500
CONTEXT = 256


@torch.no_grad()
def validation_loss(model: CausalLM, windows: np.ndarray, batch: int = 64) -> float:
    """Mean cross-entropy in nats a token over windows (n, seq_len + 1)."""
    device = model.cos.device
    total = 0.0
    for i in range(0, len(windows), batch):
        ids = torch.from_numpy(windows[i : i + batch].astype(np.int64)).to(device)
        logits = model(ids[:, :-1]).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].size


def train(
    config: ModelConfig,
    tokens: np.ndarray,
    validation: np.ndarray,
    *,
    steps: int,
    batch: int = 6,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    log=print,
) -> tuple[CausalLM, float, list[tuple[int, float, float]]]:
    """tokens (n,) uint8, validation (m, seq_len + 1) -> best model, its loss, the curve.

    The curve has a row (step, training loss, validation loss) for each evaluation.
    """
    model = CausalLM(config).initialise(seed).to(device)
    for layer in model.model.layers:
        layer.dropout = dropout  # type: ignore[assignment]
    optimizer = ConstrainedOptimizer(model, lr=lr, weight_decay=weight_decay)
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / max(1, steps - warmup))
    )
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    data = torch.from_numpy(tokens.astype(np.int64)).to(device)
    best, best_loss, curve = model.state_dict(), float("inf"), []
    started = time.time()
    for step in range(1, steps + 1):
        starts = torch.from_numpy(rng.integers(0, len(tokens) - CONTEXT - 1, batch)).to(device)
        ids = data[starts[:, None] + torch.arange(CONTEXT + 1, device=device)]
        model.train()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVAL_EVERY == 0 or step == steps:
            model.eval()
            value = validation_loss(model, validation)
            curve.append((step, loss.item(), value))
            if value < best_loss:
                best_loss = value
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            log(f"step {step}: training {loss.item():.4f}, validation {value:.4f} nats/byte, "
                f"{time.time() - started:.0f} s")  # fmt: skip
    model.load_state_dict(best)
    model.eval()
    return model, best_loss, curve
