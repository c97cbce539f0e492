"""Text that a teacher writes itself, for users who have none (LLM-QAT, arXiv 2305.17888).

A chat model is given its template up to where the user would speak, writes the question and then
the answer (Magpie, arXiv 2406.08464); any other model goes on from its opening, or from a random
first token where it has none. Documents
are sampled from the whole distribution at temperature 1, and end where the model ends them. They
are lines of a .jsonl file, appended batch by batch: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit import UserError
from lowbit.files.atomic import prepare_folder
from lowbit.models.interface import LanguageModel
from lowbit.text.documents import cache_folder, process_folder
from lowbit.text.tokenizers import TeacherTokenizer, Tokenizer, end_ids, opened

BATCH = 32  # documents at a time
LENGTH = 512  # tokens of a document, at most
DROP_AT = 0.75  # finished documents are dropped when no larger share of a batch goes on
MARK = "\u241edocument\u241e"  # stands in a template where the user speaks


def chat_turns(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a chat template up to where the user speaks, and those between the mark that ends
    the user's turn and the model's answer; both empty where there is no such template."""
    if not isinstance(tokenizer, TeacherTokenizer) or not tokenizer.has_template:
        return [], []
    try:
        whole = tokenizer.rendered([{"role": "user", "content": MARK}], ask=True)
    except Exception:
        return [], []
    before, found, after = whole.partition(MARK)
    then = [int(i) for i in tokenizer.encode(after)]
    marks = [i for i, token in enumerate(then) if token in end_ids(tokenizer)]
    if not found or not before or not marks:
        return [], []
    return opened(tokenizer, before), then[marks[0] + 1 :]


def cached_path(model: LanguageModel, seed: int, dtype: torch.dtype | None = None) -> Path:
    """Where the text of this model, in this dtype, and seed is kept."""
    weight = model.embedding.weight.detach()[:64].to(dtype or torch.float32).float().cpu()
    key = json.dumps([model.describe(), seed, BATCH, LENGTH], sort_keys=True, default=str)
    digest = hashlib.sha256(key.encode() + weight.numpy().tobytes()).hexdigest()[:16]
    return cache_folder() / f"self-{digest}.jsonl"


@torch.no_grad()
def write_batch(
    model: LanguageModel, tokenizer: Tokenizer, generator: torch.Generator
) -> tuple[list[str], int]:
    """BATCH documents, and how many tokens they have in all."""
    device = model.embedding.weight.device
    opening, between = chat_turns(tokenizer)
    if opening:
        feed = torch.tensor([opening] * BATCH)
    elif tokenizer.opening is not None:
        feed = torch.full((BATCH, 1), tokenizer.opening)
    else:
        feed = torch.randint(model.vocab_size, (BATCH, 1), generator=generator)
    length = min(LENGTH, model.max_positions)
    ends = end_ids(tokenizer)
    documents = feed.tolist()
    turns = [2 if opening else 1] * BATCH  # that each document has yet to write
    given: list[list[int]] = [[] for _ in range(BATCH)]  # what the template writes next
    rows = list(range(BATCH))  # documents that the model goes on with
    cache = None
    for _ in range(feed.size(1), length):
        found = model.features(feed.to(device), cache, keep=True)
        cache = found.cache
        # One number a document and token, so that what is drawn does not depend on who is left.
        at = torch.rand(BATCH, 1, generator=generator, dtype=torch.float64)[rows].to(device)
        sums = model.head(found.final[:, -1]).float().softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(sums, at * sums[:, -1:], right=True)
        feed = drawn.clamp_(max=model.vocab_size - 1).cpu()
        for place, i in enumerate(rows):
            if not turns[i]:
                continue
            if given[i]:
                feed[place, 0] = given[i].pop(0)
            elif int(feed[place, 0]) in ends:
                turns[i] -= 1
                given[i] = list(between) if turns[i] else []
            documents[i].append(int(feed[place, 0]))
        left = [place for place, i in enumerate(rows) if turns[i]]
        if not left:
            break
        if len(left) <= DROP_AT * len(rows):
            kept = torch.tensor(left)
            cache = model.rows_of(cache, kept.to(device))
            feed, rows = feed[kept], [rows[place] for place in left]
    return [whole_text(tokenizer, ids) for ids in documents], sum(map(len, documents))


def whole_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """With special tokens, which `encode` reads back."""
    if isinstance(tokenizer, TeacherTokenizer):
        return tokenizer.wrapped.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids)


def written_by(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tokens: int,
    seed: int,
    progress: Callable[[int], Any] = lambda n: None,
    dtype: torch.dtype | None = None,
) -> Path:
    """A file with at least so many tokens that the model wrote; what is there is not written
    again. progress is told how many tokens came with each batch. Where it cannot be kept it is in
    a folder that goes with this process. dtype: that a copy of the model writes in, with keys and
    values in it, too, and no weights cast at every token; None: the model as it is."""
    path = cached_path(model, seed, dtype)
    try:
        prepare_folder(path.parent)
    except UserError:  # a cache that can't be written only costs time
        path = process_folder() / path.name
    try:
        sizes = finished_batches(path)
        for size in sizes:
            progress(size)
        writer = copy.deepcopy(model).to(dtype) if dtype and sum(sizes) < tokens else model
        while sum(sizes) < tokens:
            generator = torch.Generator().manual_seed(1_000_003 * seed + len(sizes))
            texts, size = write_batch(writer, tokenizer, generator)
            lines = [{"text": text, "batch": len(sizes), "tokens": size} for text in texts]
            with path.open("a", encoding="utf-8") as f:
                f.write("".join(json.dumps(x) + "\n" for x in lines))
            sizes.append(size)
            progress(size)
    except OSError as e:
        raise UserError(f"--data self: cannot write {path}: {e.strerror}") from e
    return path


def finished_batches(path: Path) -> list[int]:
    """Tokens of each whole batch of the file; a batch that was cut short is taken away."""
    if not path.exists():
        return []
    kept: list[str] = []
    sizes: list[int] = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for i in range(0, len(lines), BATCH):
        batch = lines[i : i + BATCH]
        try:
            records = [json.loads(x) for x in batch]
            whole = len(batch) == BATCH and all(r["batch"] == len(sizes) for r in records)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            path.write_text("".join(kept), "utf-8")
            break
        kept += batch
        sizes.append(int(records[0]["tokens"]))
    return sizes
