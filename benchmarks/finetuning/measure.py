"""SmolLM2-135M-Instruct fine-tuned on source code, in full or by low-rank adapters: with
HybridOptimizer, and with AdamW at several rates:

    python benchmarks/finetuning/measure.py [--tasks full adapters] [--methods "adamw 1e-4" ...]

The text is scikit-learn's sources; files that are held out are not trained on. Appends a line to
runs.jsonl for each run that is not there yet, and rewrites summary.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from hybrid_optimization import HybridOptimizer  # noqa: E402
from lowbit.models.interface import LanguageModel  # noqa: E402
from lowbit.models.teacher import load_teacher  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.portfolio import linear_schedule, with_adapters  # noqa: E402

LENGTH, BATCH, HELD_OUT = 96, 4, 32  # tokens a window; windows a step, and held out
METHODS = {
    "full": [f"adamw {r}" for r in ("1e-4", "3e-5", "3e-4")] + ["hybrid pretrained"],
    "adapters": [f"adamw {r}" for r in ("1e-3", "3e-3", "1e-2")] + ["hybrid"],
}


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """(n, LENGTH) of files that are trained on, and of every fifth file, which is not."""
    import sklearn

    _, tokenizer = load_teacher("smollm2")
    files = sorted(Path(sklearn.__file__).parent.glob("*/_*.py"))
    kinds: tuple[list[str], list[str]] = [], []
    for i, f in enumerate(files):
        kinds[i % 5 == 4].append(f.read_text("utf-8"))

    def cut(texts: list[str], characters: int) -> torch.Tensor:
        ids = np.asarray(tokenizer.encode("".join(texts)[:characters])).astype(np.int64)
        return torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    held = cut(kinds[1], 200_000)
    return cut(kinds[0], 600_000), held[torch.arange(HELD_OUT) * (len(held) // HELD_OUT)]


def loss_of(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out(model: LanguageModel, ids: torch.Tensor) -> list[float]:
    """Of each window."""
    return [float(loss_of(model, w)) for w in ids.split(1)]


def optimizer_for(method: str, model: LanguageModel, steps: int) -> torch.optim.Optimizer:
    """method: 'adamw RATE', 'hybrid' or 'hybrid pretrained'."""
    name, *words = method.split()
    if name == "adamw":
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, float(words[0]), betas=(0.9, 0.95), weight_decay=0.01)
    return HybridOptimizer(model, steps, pretrained="pretrained" in words)


def train(model: LanguageModel, method: str, steps: int, ids: torch.Tensor) -> list[float]:
    """On windows ids (steps x BATCH, LENGTH); the loss of every step."""
    optimizer, losses = optimizer_for(method, model, steps), []
    schedule = linear_schedule(optimizer, steps) if method.startswith("adamw") else None
    for batch in ids.split(BATCH):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    o = parser.parse_args()
    log = RunLog(HERE / "runs.jsonl")
    known = load_teacher("smollm2")[0].float()
    text, held = windows()
    start = fmean(held_out(known, held))
    keys = (
        {"task": task, "method": method, "steps": o.steps, "seed": seed}
        for task in o.tasks
        for seed in o.seeds
        for method in o.methods or METHODS[task]
    )
    for key in keys:
        if log.find(key) is not None:
            continue
        torch.manual_seed(key["seed"])
        model = copy.deepcopy(known).requires_grad_(True)
        if key["task"] == "adapters":
            model = with_adapters(model)
        order = np.random.default_rng(key["seed"]).permutation(len(text))
        began = time.perf_counter()
        losses = train(model, key["method"], o.steps, text[order[: o.steps * BATCH]])
        seconds = time.perf_counter() - began
        after = held_out(model, held)
        found = {"start": start, "loss": fmean(after), "windows": after, "train": losses}
        log.append({**key, **found, "seconds": seconds, **machine()})
        print(*key.values(), f"{found['loss']:.4f}, {start:.4f} before", flush=True)
    columns = ("task", "method", "steps", "seed", "start", "loss", "seconds")
    table = [{k: r[k] for k in columns} for r in log.runs]
    summary = {"command": "python benchmarks/finetuning/measure.py", "runs": table, **machine()}
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
