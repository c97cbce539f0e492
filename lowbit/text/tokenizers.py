"""Text to token ids and back: bytes, or the vocabulary that a teacher was trained with."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowbit import UserError


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    unit: str  # what a token is called in a sentence: "byte", "token"

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, unsigned integers (n,)."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text."""

    def describe(self) -> dict[str, Any]:
        """What a file needs to say so that the vocabulary can be checked, or made, on loading."""


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255: no training, nothing out of vocabulary."""

    name = "bytes"
    vocab_size = 256
    unit = "byte"

    def encode(self, text: str) -> np.ndarray:
        """Text to ids: uint8 array of shape (number of UTF-8 bytes,)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size}


class TeacherTokenizer:
    """A teacher's own tokenizer, as `transformers` loaded it.

    Text is encoded as it is, without special tokens; which there are, and the chat template, come
    along in `describe`.
    """

    name = "transformers"
    unit = "token"

    def __init__(self, wrapped: Any, vocab_size: int) -> None:
        """vocab_size: of the model, at least the tokenizer's. UserError where it is smaller."""
        special = {i for i, token in wrapped.added_tokens_decoder.items() if token.special}
        beyond = [i for i in range(vocab_size, len(wrapped)) if i not in special]
        if beyond:  # special tokens that the library adds by itself are never in a text
            raise UserError(
                f"--teacher: its tokenizer has {len(wrapped):,} tokens, its embedding only "
                f"{vocab_size:,}; they do not belong together"
            )
        self.wrapped, self.vocab_size = wrapped, vocab_size
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        ids = self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids and max(ids) >= self.vocab_size:
            token = self.wrapped.convert_ids_to_tokens(max(ids))
            raise UserError(f"the text holds {token!r}, a token that the teacher has not")
        return np.asarray(ids, dtype=self._dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return self.wrapped.decode([int(i) for i in ids], skip_special_tokens=True)

    def describe(self) -> dict[str, Any]:
        """With the text of the files that the library saves a tokenizer as."""
        return {"name": self.name, "vocab_size": self.vocab_size, "files": saved_files(self)}


def saved_files(tokenizer: TeacherTokenizer) -> dict[str, str]:
    """{name: text} of what `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.wrapped.save_pretrained(folder)
        return {p.name: p.read_text("utf-8") for p in sorted(Path(folder).iterdir())}


def odd_names(files: dict[Any, Any]) -> bool:
    """Whether these are not plain names of text files, which a folder of ours may hold."""
    return not all(
        isinstance(name, str)
        and isinstance(text, str)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
        and not name.endswith(".py")
        for name, text in files.items()
    )


def tokenizer_from(description: dict[str, Any]) -> Tokenizer:
    """Inverse of `describe`. UserError for anything else."""
    if description == ByteTokenizer().describe():
        return ByteTokenizer()
    files, size = description.get("files"), description.get("vocab_size")
    known = description.get("name") == TeacherTokenizer.name
    if not known or not isinstance(size, int) or not isinstance(files, dict) or odd_names(files):
        raise UserError(
            f"vocabulary {description.get('name')!r} of {size} is not one that can be read here"
        )
    from lowbit.models.transformers_lm import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, "utf-8")
        return TeacherTokenizer(load_tokenizer(folder), size)
