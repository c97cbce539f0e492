"""A training step of SmolLM2 against the same loop written plainly:
python benchmarks/smollm2_speed/measure.py [--steps 8]

Plainly: transformers' models called for logits and hidden states, torch's losses on whole logits,
torch.optim.AdamW; the same rounding layers, objective, batch (4 x 256 tokens) and bfloat16. The two
take turns, step by step. Rewrites runs.jsonl and summary.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from lowbit.training.step import Setup, make_manager, make_step  # noqa: E402
from lowbit.training.validation import autocast, batch_of  # noqa: E402
from studies.bench import machine  # noqa: E402

FLAGS = "--hybrid --ternary --qat --teacher smollm2 --calibrate=false"


def plain_step(s: Setup) -> Callable[[np.ndarray], float]:
    """The step as one writes it; it has a teacher and a student of its own."""
    student, teacher, o = copy.deepcopy(s.student), copy.deepcopy(s.teacher), s.options
    for p in teacher.parameters():
        p.data = p.data.float()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)

    def step(indices: np.ndarray) -> float:
        inputs, labels = batch_of(s.corpus.take(indices), s.device)
        with autocast(s.device, s.dtype):
            with torch.no_grad():
                theirs = teacher.net(inputs, output_hidden_states=True, use_cache=False)
            ours = student.net(inputs, output_hidden_states=True, use_cache=False)
        q = F.log_softmax(ours.logits.float().flatten(0, 1), -1)
        p = F.log_softmax(theirs.logits.float().flatten(0, 1), -1)
        loss = o.alpha * F.nll_loss(q, labels.flatten())
        loss = loss + (1 - o.alpha) * F.kl_div(q, p, log_target=True, reduction="batchmean")
        hints = [
            ((a.float() - b.float()).square().sum(-1) / b.float().square().sum(-1)).mean()
            for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        ]
        loss = loss + o.hidden_weight * torch.stack(hints).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    count = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        o = parse_options(f"{FLAGS} --output_dir {folder}".split())
        s = distillation.set_up(o)
        manager = make_manager(s)
        clusters = manager.setup_data_clustering(s.corpus.train)
        plain, ours = plain_step(s), make_step(s, manager, clusters)
        rng = np.random.default_rng(0)
        runs = []
        for t in range(count + 2):
            indices = rng.integers(0, len(s.corpus.train), o.batch_size)
            started = time.perf_counter()
            plain(indices)
            middle = time.perf_counter()
            ours(t, indices)
            ended = time.perf_counter()
            print(t, round(middle - started, 2), round(ended - middle, 2), flush=True)
            if t >= 2:  # the first steps make states and kernels
                runs.append({"plain": middle - started, "hybrid": ended - middle, **machine()})
    tokens = o.batch_size * o.seq_len
    ratios = [r["plain"] / r["hybrid"] for r in runs]
    summary = {
        "command": f"python benchmarks/smollm2_speed/measure.py --steps {count}",
        "flags": FLAGS,
        "n": len(runs),
        "tokens_a_second": {
            k: tokens / statistics.median(r[k] for r in runs) for k in ("plain", "hybrid")
        },
        "hybrid_over_plain": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        **machine(),
    }
    (HERE / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
