"""A training step of SmolLM2 against the same loop written plainly, and with a cached teacher:
python benchmarks/smollm2_speed/measure.py [--steps 8]

Plainly: transformers' models called for logits and hidden states, torch's losses on whole logits,
torch.optim.AdamW; the same rounding layers, objective, batch (4 x 256 tokens) and bfloat16. With a
cache (`--cache_teacher 64`, all windows in it) there are no hints, so a step without hints and
without a cache is there, too. All take turns, step by step. Rewrites runs.jsonl and summary.json
beside this file.
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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import distillation  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from lowbit.training.preparation import cache_of, settle  # noqa: E402
from lowbit.training.step import Setup, make_manager, make_step  # noqa: E402
from lowbit.training.validation import autocast, batch_of  # noqa: E402
from studies.bench import machine  # noqa: E402

FLAGS = "--hybrid --ternary --qat --teacher smollm2 --calibrate=false"
KEPT = 64  # tokens of the cached teacher
WARM_UP = 4  # steps of each, which make states, kernels and the cache


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


def own_step(s: Setup, flags: str) -> Callable[[np.ndarray], None]:
    """The step of a run with further flags; it has a student of its own."""
    with tempfile.TemporaryDirectory() as folder:
        o = parse_options(f"{FLAGS} {flags} --output_dir {folder}".split())
    settle(o, s.teacher, s.tokenizer)
    o.samples_per_epoch = s.options.samples_per_epoch
    o.micro_batch_size = s.options.micro_batch_size
    known = cache_of(o, s.teacher, s.corpus, s.teacher_print) if o.cache_teacher else None
    mine = replace(s, options=o, student=copy.deepcopy(s.student), known=known)
    manager = make_manager(mine)
    step = make_step(mine, manager, manager.setup_data_clustering(s.corpus.train))
    done = 0

    def next_step(indices: np.ndarray) -> None:
        nonlocal done
        step(done, indices)
        done += 1

    return next_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    count = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        o = parse_options(f"{FLAGS} --output_dir {folder}".split())
        s = distillation.set_up(o)
        steps = {"plain": plain_step(s), "hybrid": own_step(s, "")}
        steps["no hints"] = own_step(s, "--hidden_weight 0")
        steps["cached"] = own_step(s, f"--cache_teacher {KEPT}")
        rng = np.random.default_rng(0)
        batches = rng.integers(0, len(s.corpus.train), (WARM_UP, o.batch_size))
        runs = []
        for t in range(count + WARM_UP):
            taken = {}
            for name, step in steps.items():
                started = time.perf_counter()
                step(batches[t % WARM_UP])
                taken[name] = time.perf_counter() - started
            print(t, {k: round(v, 2) for k, v in taken.items()}, flush=True)
            if t >= WARM_UP:
                runs.append({**taken, **machine()})
    tokens = o.batch_size * o.seq_len

    def ratio(slow: str, fast: str) -> dict:
        found = [r[slow] / r[fast] for r in runs]
        return {"median": statistics.median(found), "range": [min(found), max(found)]}

    summary = {
        "command": f"python benchmarks/smollm2_speed/measure.py --steps {count}",
        "flags": FLAGS,
        "n": len(runs),
        "tokens_a_second": {k: tokens / statistics.median(r[k] for r in runs) for k in steps},
        "hybrid_over_plain": ratio("plain", "hybrid"),
        "cached_over_hybrid": ratio("hybrid", "cached"),
        "cached_over_no_hints": ratio("no hints", "cached"),
        **machine(),
    }
    (HERE / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
