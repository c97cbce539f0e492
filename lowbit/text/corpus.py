"""Token windows: documents -> tokens -> windows of one length, for training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit import UserError
from lowbit.text import documents as sources
from lowbit.text.documents import Document
from lowbit.text.tokenizers import Tokenizer


@dataclass
class Corpus:
    """Token windows of one length, as (n, seq_len + 1): inputs and next-token labels."""

    train: np.ndarray
    validation: np.ndarray
    train_tokens: int
    validation_tokens: int
    fingerprint: str  # sha256 over all tokens of both parts, first 16 hex digits


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.encode("\n\n".join(text for _, text in documents))


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Consecutive windows that share one token: (n, seq_len + 1), a read-only view."""
    if len(tokens) <= seq_len:
        return np.empty((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def load_corpus(paths: Sequence[str], seq_len: int, tokenizer: Tokenizer) -> Corpus:
    """Documents (the standard library's documentation where ``paths`` is empty) -> Corpus.

    Raises UserError where the text is too short for one training and one validation window.
    """
    documents = sources.deduplicate(
        sources.read_documents(paths) if paths else sources.cached_stdlib_documents()
    )
    if len(documents) < sources.MIN_DOCUMENTS:
        documents = sources.into_sections(documents)
    train_docs, validation_docs = sources.split(documents)
    train, validation = (token_stream(d, tokenizer) for d in (train_docs, validation_docs))
    corpus = Corpus(
        windows(train, seq_len),
        windows(validation, seq_len),
        len(train),
        len(validation),
        hashlib.sha256(train.tobytes() + b"\xff" + validation.tobytes()).hexdigest()[:16],
    )
    if not len(corpus.train) or not len(corpus.validation):
        raise UserError(
            f"--data: {len(train):,} training and {len(validation):,} validation tokens are too "
            f"few for windows of {seq_len} + 1; give more text or a smaller --seq_len"
        )
    return corpus
