"""The recipe of the embedded teacher: ``python -m lowbit.models.train_teacher --out teacher.npz``.

Next-byte prediction on the embedded text, random 257-byte windows, the trust-region step of
`hybrid_optimization`, 2 % warm-up, linear decay to zero, dropout on the embedding and on what the
blocks add to the residual stream (the text is read about seven times; a teacher that knows it by
heart teaches what does not generalise). Every EVAL_EVERY steps the loss of a quarter of the
validation windows is measured and the best weights are kept. Half an hour on two cores.
``lowbit/data/teacher.json`` is the record of the run that made the embedded teacher.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from hybrid_optimization import ConstrainedOptimizer
from lowbit import UserError
from lowbit.arguments import Parser
from lowbit.files.atomic import atomic_write, prepare_folder
from lowbit.files.packed import save_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.text.corpus import load_corpus
from lowbit.text.tokenizers import ByteTokenizer

EVAL_EVERY = 500
CONTEXT = 256


@contextmanager
def dropout(model: CausalLM, share: float) -> Iterator[None]:
    """Inside, in training mode, embeddings and the outputs of blocks' parts lose a random share of
    their entries (Srivastava et al. 2014)."""

    def drop(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, training=module.training)

    names = ("embed_tokens", "o_proj", "down_proj")
    handles = [m.register_forward_hook(drop) for n, m in model.named_modules() if n.endswith(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    drop: float = 0.15,
    seed: int = 0,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[CausalLM, float, list[tuple[int, float, float]]]:
    """tokens (n,) uint8, validation (m, seq_len + 1) -> best model, its loss, the curve.

    The curve has a row (step, training loss, validation loss) for each evaluation.
    """
    model = CausalLM(config).initialise(seed).to(device)
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
    with dropout(model, drop):
        for step in range(1, steps + 1):
            starts = torch.from_numpy(rng.integers(0, len(tokens) - CONTEXT - 1, batch)).to(device)
            ids = data[starts[:, None] + torch.arange(CONTEXT + 1, device=device)]
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
                model.train()
                curve.append((step, loss.item(), value))
                if value < best_loss:
                    best_loss = value
                    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
                log(
                    f"step {step}: training {loss.item():.4f}, validation {value:.4f} nats/byte, "
                    f"{time.time() - started:.0f} s"
                )
    model.load_state_dict(best)
    model.eval()
    return model, best_loss, curve


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lowbit.models.train_teacher", description=__doc__)
    parser.add_argument("--out", required=True, help="the .npz to write; a .json beside it")
    parser.add_argument("--steps", type=int, default=8000, help="default 8000")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate (default 2e-3)")
    parser.add_argument("--dropout", type=float, default=0.15, help="share (default 0.15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    tokenizer = ByteTokenizer()
    try:
        if args.steps < 1 or not 0 < args.lr < float("inf") or not 0 <= args.dropout < 1:
            raise UserError("--steps must be at least 1, --lr above 0, --dropout in [0, 1)")
        out = Path(args.out)
        prepare_folder(out.parent, "--out")
        corpus = load_corpus([], CONTEXT, tokenizer)
        tokens = np.concatenate([corpus.train[:, :-1].ravel(), corpus.train[-1, -1:]])
        model, best, curve = train(
            ModelConfig(),
            tokens,
            corpus.validation[::4],
            steps=args.steps,
            lr=args.lr,
            drop=args.dropout,
            seed=args.seed,
            device=args.device,
        )
        save_packed(out, model, tokenizer.describe(), plain="float16")
    except UserError as e:
        return e.tell()
    record = {
        "validation_loss": best,
        "text": corpus.fingerprint,
        "steps": args.steps,
        "lr": args.lr,
        "dropout": args.dropout,
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "curve": [{"step": s, "training": a, "validation": b} for s, a, b in curve],
    }
    text = json.dumps(record, indent=1) + "\n"
    atomic_write(out.with_suffix(".json"), lambda f: f.write(text.encode()))
    print(f"Wrote {out} and {out.with_suffix('.json')}: {best:.4f} nats a byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
