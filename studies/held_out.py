"""Models on windows that nobody was trained on, text by text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.models.interface import LanguageModel
from lowbit.text.corpus import evenly, load_corpus
from lowbit.text.tokenizers import Tokenizer
from lowbit.training.validation import Reference


def spread(path: str | Path, tokenizer: Tokenizer, windows: int, length: int) -> np.ndarray:
    """Windows (windows, length + 1) that lie evenly over a text."""
    corpus = load_corpus([str(path)], length, tokenizer)
    return corpus.take(evenly(np.arange(len(corpus.train)), windows))


def validated(references: Mapping[str, Reference], model: LanguageModel) -> dict[str, Any]:
    """Of each text how many windows, the teacher's loss, the model's with its standard error, and
    its KL to the teacher, nats a token."""
    rows = {}
    for text, reference in references.items():
        found = reference.validate(model)
        rows[text] = {
            "windows": len(reference.windows),
            "teacher": reference.teacher_loss,
            "loss": found.loss,
            "loss_error": found.error,
            "kl": found.kl,
        }
    return rows
