"""Sampling from a model: ``python -m lowbit.generate student/student_quantized_....npz``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch

from lowbit import UserError
from lowbit.arguments import COUNT, Parser, number, words
from lowbit.console import Printer
from lowbit.models.interface import LanguageModel
from lowbit.models.teacher import load_teacher
from lowbit.text.tokenizers import opened

MOST_LIKELY = 1e-6  # temperatures below it take the most likely token; quotients would overflow


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Sequence[int] | np.ndarray,
    *,
    temperature: float = 0.7,
    top_k: int = 40,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """prompt: ids (n,), n >= 1 -> new ids without end, sampled with a key/value cache.

    temperature 0 (or below MOST_LIKELY) takes the most likely token. Of the top_k most likely ones
    those are drawn from that come before their probabilities add up to top_p (nucleus sampling,
    arXiv 1904.09751). Where the positions run out, the newer half of the text is read again.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    limit = model.max_positions
    text = [int(i) for i in prompt]
    cache, held, feed = None, 0, text[-limit // 2 :]
    while True:
        if held + len(feed) > limit:
            cache, held, feed = None, 0, text[-limit // 2 :]
        found = model.features(torch.tensor([feed], device=device), cache, keep=True)
        logits = model.head(found.final[0, -1]).float().cpu()
        cache, held = found.cache, held + len(feed)
        if temperature < MOST_LIKELY:
            choice = int(logits.argmax())
        else:
            top = torch.topk(logits / temperature, min(top_k, logits.numel()))
            chances = top.values.softmax(-1)
            if top_p < 1:
                chances[1:][chances.cumsum(-1)[:-1] >= top_p] = 0
            choice = int(top.indices[torch.multinomial(chances, 1, generator=generator)])
        text.append(choice)
        feed = [choice]
        yield choice


def generate(
    model: LanguageModel,
    prompt: Sequence[int] | np.ndarray,
    count: int,
    *,
    temperature: float = 0.7,
    top_k: int = 40,
    seed: int = 0,
) -> list[int]:
    """``count`` ids of `stream`."""
    new = stream(model, prompt, temperature=temperature, top_k=top_k, seed=seed)
    return list(islice(new, count))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lowbit.generate", description=__doc__)
    parser.add_argument("model", help="a student's .npz or .pth, or anything --teacher takes")
    parser.add_argument("--prompt", type=words, default="Return ", help="text to continue")
    parser.add_argument("--tokens", type=COUNT, default=300, help="tokens to add (default 300)")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.7, help="0 = most likely (default 0.7)"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    args = parser.parse_args(argv)
    try:
        if not args.prompt:
            raise UserError("--prompt: give at least one character")
        model, tokenizer = load_teacher(args.model)
    except UserError as e:
        return e.tell()
    ids = generate(
        model,
        opened(tokenizer, args.prompt),
        args.tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    Printer()(args.prompt + tokenizer.decode(ids))
    return 0


if __name__ == "__main__":
    sys.exit(main())
