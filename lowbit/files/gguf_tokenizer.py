"""A tokenizer as GGUF says it: byte-level BPE ("gpt2"), or SentencePiece's pieces ("llama").

Of pieces llama.cpp merges the neighbours whose piece has the best score, whatever the pair; a
tokenizer.json has a list of pairs, the first of which is merged first. Both come to the same if
every pair that makes a piece is in the list and pairs stand there piece by piece, as they do where
the list was made from SentencePiece's scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from lowbit import UserError
from lowbit.text import pre_tokenizers
from lowbit.text.pre_tokenizers import SPACE

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
PHI3 = "<|endoftext|>"  # without it llama.cpp loads no model of Phi-3's name
#: Kinds of tokens (llama.h).
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTES = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """What a tokenizer.json says."""

    whole: dict[str, Any]
    pre: str | None  # how text is cut before merges; None: pieces, nothing is cut
    opens: bool = False  # of pieces: a space is put before a text
    scores: dict[str, float] = field(default_factory=dict)  # of pieces

    @property
    def tokens(self) -> dict[str, int]:
        return self.whole["model"]["vocab"]

    @property
    def known(self) -> set[str]:
        return {*self.tokens, *(entry["content"] for entry in self.whole["added_tokens"])}

    @property
    def merges(self) -> list[list[str]]:
        found = self.whole["model"]["merges"]
        return [m.split(" ") if isinstance(m, str) else m for m in found]


def template_of(description: dict[str, Any]) -> str | None:
    """The chat template; None where there is no single one."""
    files = description["files"]
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    found = files.get("chat_template.jinja") or settings.get("chat_template")
    return found if isinstance(found, str) else None


def name_for(vocabulary: Vocabulary, description: dict[str, Any], kind: str) -> str | None:
    """The model's name in GGUF where it decides that spaces after special tokens are taken away:
    llama.cpp does that to models of the name of Phi-3, and to no others. UserError where they are
    taken away and cannot be so."""
    template = template_of(description) or ""
    taking = [
        entry
        for entry in vocabulary.whole["added_tokens"]
        if (entry.get("lstrip") or entry.get("rstrip")) and entry["content"] in template
    ]
    if not taking:
        return None
    if kind == "phi3" and not any(e.get("lstrip") for e in taking) and PHI3 in vocabulary.known:
        return "phi-3"
    raise UserError(
        f"the tokenizer takes spaces beside {taking[0]['content']} away, which cannot be said in "
        f"GGUF of a {kind}"
    )


def vocabulary_of(description: dict[str, Any]) -> Vocabulary:
    """UserError for a tokenizer that has no form in GGUF here."""
    try:
        whole = json.loads(description["files"]["tokenizer.json"])
        if whole["model"]["type"] == "BPE" and isinstance(whole["model"]["vocab"], dict):
            if whole["model"].get("byte_fallback"):
                opens = opens_with_space(whole)
                if opens is not None:
                    found = Vocabulary(whole, None, opens)
                    found.scores = scores_of(found)
                    return found
            pre = pre_tokenizers.name_of(
                whole["pre_tokenizer"], bool(whole["model"].get("ignore_merges"))
            )
            if pre is not None:
                return Vocabulary(whole, pre)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise UserError(
        "the tokenizer is not one that can be exported to GGUF here: that is byte-level BPE, "
        f"cut as {', '.join(pre_tokenizers.KNOWN)} cut, or SentencePiece's BPE"
    )


def opens_with_space(whole: dict[str, Any]) -> bool | None:
    """Whether a space is put before a text of pieces; None where more than that is done to it."""
    opens = spaces = False
    normalizer = whole.get("normalizer")
    for step in (normalizer or {}).get("normalizers", [normalizer] if normalizer else []):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            opens = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == (
            {"String": " "}, SPACE,
        ):  # fmt: skip
            spaces = True
        else:
            return None
    cut = whole.get("pre_tokenizer")
    if cut is None:
        return opens if spaces else None
    if cut["type"] == "Metaspace" and cut["replacement"] == SPACE and not cut.get("split", True):
        return opens or cut.get("prepend_scheme", "always") != "never"
    if spaces and cut["type"] == "Split" and cut["pattern"] == {"String": " "}:
        return opens  # Gemma's: no spaces are left to cut at
    return None


def scores_of(vocabulary: Vocabulary) -> dict[str, float]:
    """Scores of pieces with which llama.cpp merges as the list of pairs does: minus the place of a
    piece's first pair. ValueError where no scores do."""
    places: dict[str, list[int]] = {}
    for i, (left, right) in enumerate(vocabulary.merges):
        places.setdefault(left + right, []).append(i)
    last = -1
    for found in places.values():  # in the order of their first pairs
        if found[0] < last:
            raise ValueError("pairs of a piece stand apart")
        last = found[-1]
    tokens = vocabulary.tokens
    added = {entry["content"] for entry in vocabulary.whole["added_tokens"]}
    for piece in tokens:
        if piece in added or BYTE.fullmatch(piece):
            continue
        pairs = sum(piece[:i] in tokens and piece[i:] in tokens for i in range(1, len(piece)))
        if pairs > len(places.get(piece, ())):
            raise ValueError("a pair that makes a piece is not in the list")
    return {piece: -float(found[0]) for piece, found in places.items()}


def add_tokenizer(
    writer: Any, vocabulary: Vocabulary, description: dict[str, Any], rows: int
) -> None:
    """Vocabulary of so many rows, merges or scores, special tokens and chat template."""
    files = description["files"]
    pieces = vocabulary.pre is None
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, i in vocabulary.tokens.items():
        if i >= rows:
            continue
        tokens[i], types[i] = token, BYTES if pieces and BYTE.fullmatch(token) else NORMAL
    for entry in vocabulary.whole["added_tokens"]:
        if entry["id"] < rows:
            tokens[entry["id"]] = entry["content"]
            types[entry["id"]] = CONTROL if entry["special"] else USER
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    ids = {token: i for i, token in enumerate(tokens)}

    def special(name: str) -> int | None:
        value = settings.get(f"{name}_token")
        return ids.get(value["content"] if isinstance(value, dict) else value)

    if pieces:
        if (unknown := special("unk")) is not None:
            types[unknown] = UNKNOWN
        scores = vocabulary.scores
        lowest = -float(len(vocabulary.merges))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([scores.get(token, lowest) for token in tokens])
        writer.add_add_space_prefix(vocabulary.opens)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_token_types(types)

    for name, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        found = special(name)
        if found is not None:
            add(found)
    bos = special("bos")
    processor = vocabulary.whole.get("post_processor") or {}
    steps: list[dict[str, Any]] = next(
        (p["single"] for p in [processor, *processor.get("processors", [])] if "single" in p), []
    )
    first = next((s["SpecialToken"]["id"] for s in steps[:1] if "SpecialToken" in s), None)
    writer.add_add_bos_token(bos is not None and first is not None and ids.get(first) == bos)
    if (template := template_of(description)) is not None:
        writer.add_chat_template(template)
