"""A student in llama.cpp against the same student in torch:
python benchmarks/engine/measure.py student/ [--windows 8] [--types q4_0]

Exports the student of a run to GGUF, in a process of its own (seconds, peak memory), and compares
on held-out windows of the standard library's documentation: the perplexity of both, position by
position, and the text that both continue five prompts with, 32 tokens, always the most likely one.
Appends one JSON line a type to runs.jsonl beside this file and rewrites summary.json. Needs the
extras gguf and chat.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.chat import open_server  # noqa: E402
from lowbit.export import find_packed  # noqa: E402
from lowbit.generate import generate  # noqa: E402
from lowbit.models.teacher import load_teacher  # noqa: E402
from lowbit.text.corpus import load_corpus  # noqa: E402
from lowbit.text.tokenizers import opened  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.commands import measured  # noqa: E402

PROMPTS = (
    "The capital of France is",
    "Return a list of",
    "Once upon a time",
    "This module provides",
    "To open a file,",
)
TOKENS = 32


def engine_losses(server: Any, ids: list[int]) -> np.ndarray:
    """-log p of each token but the first, (T - 1,): every one is forced by a bias, and reported
    before it. NaN where the engine reports none, which is after half a character."""
    losses = []
    for k in range(1, len(ids)):
        answer = server.handle_completions(
            {
                "prompt": ids[:k],
                "max_tokens": 1,
                "n_probs": 1,
                "logit_bias": [[ids[k], 1e5]],
                "cache_prompt": True,
            }
        )
        found = (answer["choices"][0]["logprobs"] or {}).get("content") or []
        right = found and found[0]["id"] == ids[k]
        losses.append(-found[0]["logprob"] if right else math.nan)
    return np.array(losses)


def engine_text(server: Any, ids: list[int]) -> str:
    answer = server.handle_completions(
        {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    )
    return str(answer["choices"][0]["text"])


def same_start(a: str, b: str) -> int:
    """Characters until the first difference."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def exported(packed: Path, kind: str, path: Path) -> dict[str, Any]:
    words = ["-m", "lowbit.export", str(packed), "--to", "gguf", "--type", kind]
    return measured([*words, "--output", str(path)], output=None)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--types", nargs="+", default=["q4_0"])
    o = parser.parse_args()
    packed = find_packed(o.student)
    log = RunLog(HERE / "runs.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        # First: a child's peak counts what its parent holds when it is started.
        paths = {kind: Path(folder, f"{kind}.gguf") for kind in o.types}
        made = {kind: exported(packed, kind, path) for kind, path in paths.items()}
        model, tokenizer = load_teacher(str(packed))
        windows = load_corpus([], 256, tokenizer).held_out(o.windows).astype(np.int64)
        logits = [model(torch.from_numpy(w[None, :-1])).logits[0].double() for w in windows]
        ours = np.stack(
            [
                -x.log_softmax(-1).gather(-1, torch.from_numpy(w[1:, None]))[:, 0].numpy()
                for x, w in zip(logits, windows, strict=True)
            ]
        )
        texts = {
            p: tokenizer.decode(generate(model, opened(tokenizer, p), TOKENS, temperature=0))
            for p in PROMPTS
        }
        for kind, path in paths.items():
            server = open_server(path, 512, threads=2)
            theirs = np.stack([engine_losses(server, w.tolist()) for w in windows])
            both = np.isfinite(theirs)
            ratio = math.exp(theirs[both].mean() - ours[both].mean())
            greedy = {}
            for prompt, text in texts.items():
                found = engine_text(server, opened(tokenizer, prompt))
                greedy[prompt] = {"ours": text, "engine": found, "same": same_start(text, found)}
            log.append(
                {
                    "student": packed.name,
                    "type": kind,
                    "positions": int(both.sum()),
                    "left_out": int((~both).sum()),
                    "loss_ours": float(ours[both].mean()),
                    "loss_engine": float(theirs[both].mean()),
                    "perplexity_ratio": ratio,
                    "gap_error": float((theirs - ours)[both].std() / math.sqrt(both.sum())),
                    "bytes": path.stat().st_size,
                    "export_seconds": made[kind]["seconds"],
                    "export_peak_bytes": made[kind]["peak_rss_bytes"],
                    "printed": made[kind]["printed"],
                    "greedy": greedy,
                    "xllamacpp": xllamacpp.__version__,
                    **machine(),
                }
            )
            print(kind, ratio, {p: x["same"] for p, x in greedy.items()}, flush=True)
    table = [{k: v for k, v in r.items() if k not in ("greedy", "printed")} for r in log.runs]
    (HERE / "summary.json").write_text(json.dumps({"runs": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
