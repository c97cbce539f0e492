"""Text to token ids and back: bytes, or the vocabulary that a teacher was trained with."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowbit import UserError, first_line

#: Marks, in ids of 32 bits, a token that is read but that no loss counts.
UNCOUNTED = np.uint32(1 << 31)

Message = dict[str, str]  # role, content


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    unit: str  # what a token is called in a sentence: "byte", "token"

    @property
    def opening(self) -> int | None:
        """The id with which every text began that the model was trained on."""

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, unsigned integers (n,)."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""

    def encode_chat(self, name: str, messages: Sequence[Message]) -> np.ndarray:
        """A chat as the model's template has it, to ids uint32 (n,), with `UNCOUNTED` in all but
        the assistant's tokens. UserError, which names the document, where that cannot be."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text."""

    def describe(self) -> dict[str, Any]:
        """What a file needs to say so that the vocabulary can be checked, or made, on loading."""


class ByteTokenizer:
    """UTF-8 bytes as token ids 0..255: no training, nothing out of vocabulary."""

    name = "bytes"
    vocab_size = 256
    unit = "byte"
    opening: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """Text to ids: uint8 array of shape (number of UTF-8 bytes,)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_chat(self, name: str, messages: Sequence[Message]) -> np.ndarray:
        raise UserError(f"--data: {name} is a chat; that needs a teacher with a chat template")

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size}


class TeacherTokenizer:
    """A teacher's own tokenizer, as `transformers` loaded it.

    Text is encoded as it is, without special tokens (`opened` and `Corpus` put the opening where it
    belongs); which there are, and the chat template, come along in `describe`.
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
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        found = self.wrapped(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._checked(ids) for ids in found]

    def _checked(self, ids: Sequence[int]) -> np.ndarray:
        if ids and max(ids) >= self.vocab_size:
            token = self.wrapped.convert_ids_to_tokens(max(ids))
            raise UserError(f"the text holds {token!r}, a token that the teacher has not")
        return np.asarray(ids, dtype=self._dtype)

    def encode_chat(self, name: str, messages: Sequence[Message]) -> np.ndarray:
        if not self.has_template:
            raise UserError(f"--data: {name} is a chat, but the teacher has no chat template")
        if not self.wrapped.is_fast:
            raise UserError(f"--data: {name} is a chat; that needs a tokenizer.json of the teacher")
        try:
            text = self.rendered(messages)
            spans = self._answers(name, text, messages)
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"--data: {name}: the teacher's chat template refuses: {first_line(e)}"
            ) from e
        found = self.wrapped(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = self._checked(found["input_ids"]).astype(np.uint32)
        starts = np.array([start for start, _ in found["offset_mapping"]])
        counted = np.zeros(len(ids), bool)
        for start, end in spans:
            counted |= (start <= starts) & (starts < end)
        return np.where(counted, ids, ids | UNCOUNTED)

    @cached_property
    def opening(self) -> int | None:
        bos = opening_of(self.wrapped)
        return bos if bos is not None and bos < self.vocab_size else None

    @property
    def has_template(self) -> bool:
        return bool(self.wrapped.chat_template)

    def rendered(self, messages: Sequence[Message], ask: bool = False) -> str:
        """A chat as text; with ``ask`` up to where the assistant would speak. A template may ask
        for anything, and raise anything."""
        return self.wrapped.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )

    def _answers(self, name: str, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Where in a chat's text the assistant speaks, with the mark that ends its turn: from where
        it is asked to, to the end of the chat with its answer. Where a template later drops part
        of an answer, to the mark after what is left."""
        spans = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.rendered(messages[:n], True), self.rendered(messages[: n + 1])
            start = len(before)
            end = len(after.rstrip()) if text.startswith(after) else -1
            if end < 0:
                content = message["content"].strip()
                at = text.find(content, start)
                mark = self.end_of_turn or ""
                end = at + len(content) + len(mark) * text.startswith(mark, at + len(content))
                end = end if at >= 0 else -1
            if not text.startswith(before) or end < start:
                raise UserError(
                    f"--data: {name}: the teacher's chat template changes what message {n + 1} "
                    "says, so its tokens cannot be told from the others"
                )
            spans.append((start, end))
        return spans

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that the chat template puts after what the assistant says."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u241e"}]
        try:
            rest = self.rendered(turns).partition("\u241e")[2]
        except Exception:
            return None
        special = [t.content for t in self.wrapped.added_tokens_decoder.values() if t.special]
        found = [(rest.find(t), t) for t in special if t in rest]
        return min(found)[1] if found else None

    def decode(self, ids: Iterable[int]) -> str:
        return self.wrapped.decode([int(i) for i in ids], skip_special_tokens=True)

    def describe(self) -> dict[str, Any]:
        """With the text of the files that the library saves a tokenizer as."""
        return {"name": self.name, "vocab_size": self.vocab_size, "files": saved_files(self)}


def opening_of(wrapped: Any) -> int | None:
    """The beginning of text that a tokenizer of transformers puts before a text by itself."""
    ids, bos = wrapped("a", verbose=False)["input_ids"], wrapped.bos_token_id
    return bos if ids[:1] == [bos] else None


def opened(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that a model is to go on from, with its opening."""
    ids = [int(i) for i in tokenizer.encode(text)]
    first = tokenizer.opening
    return ids if first is None or ids[:1] == [first] else [first, *ids]


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end what a model says: its end of text, and of a turn in a chat."""
    if not isinstance(tokenizer, TeacherTokenizer):
        return set()
    wrapped, turn = tokenizer.wrapped, tokenizer.end_of_turn
    ids = {wrapped.eos_token_id, wrapped.convert_tokens_to_ids(turn) if turn else None}
    return {i for i in ids if i is not None}


def saved_files(tokenizer: TeacherTokenizer) -> dict[str, str]:
    """{name: text} of what `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.wrapped.save_pretrained(folder)
        return {p.name: p.read_text("utf-8") for p in sorted(Path(folder).iterdir()) if p.is_file()}


def odd_names(files: dict[Any, Any]) -> bool:
    """Whether these are not plain names of text files, which a folder of ours may hold."""
    return not all(
        isinstance(name, str)
        and isinstance(text, str)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name)
        and not name.endswith(".py")
        and not re.search("[\ud800-\udfff]", text)  # which UTF-8 does not have
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
