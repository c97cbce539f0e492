"""Token windows: documents -> tokens -> windows of one length, for training and validation.

Tokens are made once for a text and a tokenizer, and kept in files that are mapped into memory, so
that a text of gigabytes is never held whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import UserError
from lowbit.console import progress_bar
from lowbit.text import documents as sources
from lowbit.text.documents import Document
from lowbit.text.tokenizers import UNCOUNTED, Tokenizer

FORMAT = 2  # of the files below; another number, other files
CHARACTERS_AT_ONCE = 1 << 20  # of documents that are tokenised together
PARTS = ("train", "validation")
GLANCE = 256  # windows


@dataclass
class Corpus:
    """Token windows of one length, as (n, seq_len + 1): inputs and next-token labels. Tokens that
    no loss counts carry `tokenizers.UNCOUNTED`.

    Models read them by `take` and `held_out`: with the tokenizer's opening, where it has one, in
    place of a window's first token, which the window before has as its last label. Without it
    some models are lost: Gemma 3's loss is 4.7 instead of 3.1 nats a token.
    """

    train: np.ndarray
    validation: np.ndarray
    train_tokens: int
    validation_tokens: int
    fingerprint: str  # sha256 over all tokens of both parts, first 16 hex digits
    opening: int | None = None

    @property
    def has_chats(self) -> bool:
        """Whether some of it, as far as a glance tells, is read and not counted."""
        return bool((evenly(self.train, GLANCE) >= UNCOUNTED).any())

    def take(self, which: np.ndarray | slice) -> np.ndarray:
        """Training windows, (n, seq_len + 1)."""
        return self._opened(self.train[which])

    def held_out(self, count: int) -> np.ndarray:
        """At most ``count`` validation windows, spread evenly."""
        return self._opened(evenly(self.validation, count))

    def _opened(self, found: np.ndarray) -> np.ndarray:
        if self.opening is None:
            return found
        found = found.copy()
        found[:, 0] = self.opening
        return found


def evenly(found: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` rows, spread evenly, first and last among them."""
    if len(found) <= count:
        return found
    return found[np.linspace(0, len(found) - 1, count).astype(int)]


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Consecutive windows that share one token: (n, seq_len + 1), a read-only view."""
    if len(tokens) <= seq_len:
        return np.empty((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def load_corpus(paths: Sequence[str], seq_len: int, tokenizer: Tokenizer) -> Corpus:
    """Documents of files, of folders and of STDLIB (which is all where ``paths`` is empty) ->
    Corpus.

    Raises UserError where the text is too short for one training and one validation window.
    """
    folder, kept = cached_tokens(paths, tokenizer)
    index = json.loads((folder / "index.json").read_text("utf-8"))
    parts = [
        np.asarray(np.memmap(folder / part, index["dtype"], "r")) if index[part] else np.empty(0)
        for part in PARTS
    ]
    if not kept:  # what is mapped stays
        shutil.rmtree(folder, ignore_errors=True)
    train, validation = (windows(part, seq_len) for part in parts)
    if not len(train) or not len(validation):
        raise UserError(
            f"--data: {len(parts[0]):,} training and {len(parts[1]):,} validation tokens are too "
            f"few for windows of {seq_len} + 1; give more text or a smaller --seq_len"
        )
    for part, name in zip(PARTS, ("training", "validation"), strict=True):
        if not index["counted"][part]:
            raise UserError(
                f"--data: no token of the {name} text counts: its chats have no message whose role "
                "is assistant"
            )
    return Corpus(
        train, validation, len(parts[0]), len(parts[1]), index["fingerprint"], tokenizer.opening
    )


# ------------------------------------------------------------------------------ tokens in files


def cached_tokens(paths: Sequence[str], tokenizer: Tokenizer) -> tuple[Path, bool]:
    """The folder with the tokens of these texts, made where it is not there, and whether it is
    kept. Where nothing can be kept it is a temporary one."""
    files = sources.find_files([p for p in paths if p != sources.STDLIB])
    stdlib = not paths or sources.STDLIB in paths
    kept = sources.cache_folder() / f"tokens-{digest_of(files, stdlib, tokenizer)}"
    if sound(kept):
        return kept, True
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=kept.parent, prefix="tokens-", suffix=".part"))
    except OSError:  # a cache that can't be written only costs time
        made = Path(tempfile.mkdtemp(prefix="apl-hybrid-"))
    size = sum(path.stat().st_size for _, path in files)
    bar = progress_bar(total=size, desc="Tokenising", unit="B", unit_scale=True, delay=2)
    try:
        with bar:
            found = chain(
                sources.cached_stdlib_documents() if stdlib else (),
                sources.read_documents(files, bar.update) if files else (),
            )
            tokenise(found, tokenizer, made)
    except BaseException as e:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(e, OSError):
            raise UserError(f"--data: cannot write tokens to {made}: {e.strerror}") from e
        raise
    if made.parent != kept.parent:
        return made, False
    try:
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(made, kept)
    except OSError:  # another process was faster, or still reads what was there
        if not sound(kept):
            return made, False
        shutil.rmtree(made, ignore_errors=True)
    return kept, True


def digest_of(files: Sequence[tuple[str, Path]], stdlib: bool, tokenizer: Tokenizer) -> str:
    """Of everything that the tokens depend on."""
    key: list[Any] = [FORMAT, tokenizer.describe()]
    stats = [(name, path.resolve(), path.stat()) for name, path in files]
    key += [[name, str(path), s.st_size, s.st_mtime_ns] for name, path, s in stats]
    if stdlib:
        key.append(sources.stdlib_key())
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def sound(folder: Path) -> bool:
    """Whether a folder holds tokens as `tokenise` left them."""
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
        size = np.dtype(index["dtype"]).itemsize
        whole = all((folder / p).stat().st_size == index[p] * size for p in PARTS)
        return whole and set(PARTS) <= index["counted"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class _Tokens:
    """A file of tokens that grows."""

    def __init__(self, path: Path, separator: np.ndarray) -> None:
        self.path, self.separator = path, separator
        self.count = self.counted = 0  # tokens, and those of them that losses count
        self.file = path.open("w+b")

    def append(self, tokens: np.ndarray, after_text: bool) -> None:
        if self.count and after_text:
            self._write(self.separator.astype(tokens.dtype))
        self._write(tokens)

    def _write(self, tokens: np.ndarray) -> None:
        self.file.write(tokens.tobytes())
        self.count += len(tokens)
        self.counted += int((tokens < UNCOUNTED).sum())

    def widen(self, old: np.dtype, new: np.dtype) -> None:
        """Write again what is there, in another dtype."""
        self.file.seek(0)
        wide = self.path.with_suffix(".wide").open("w+b")
        while raw := self.file.read(1 << 24):
            wide.write(np.frombuffer(raw, old).astype(new).tobytes())
        self.file.close()
        os.replace(wide.name, self.path)
        self.file = wide


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokens of deduplicated documents as the files "train" and "validation", and last
    "index.json". Texts are separated by a blank line; chats are as their template has them."""
    stream = sources.deduplicate(documents)
    first = list(islice(stream, sources.MIN_DOCUMENTS))
    if len(first) < sources.MIN_DOCUMENTS:
        first = sources.into_sections(first)
    separator = tokenizer.encode("\n\n")
    parts = [_Tokens(folder / part, separator) for part in PARTS]
    dtype = separator.dtype
    waiting: list[tuple[float, np.ndarray, bool]] = []  # until something is held out

    def put(part: _Tokens, tokens: np.ndarray, plain: bool) -> None:
        nonlocal dtype
        if tokens.dtype.itemsize > dtype.itemsize:
            for x in parts:
                x.widen(dtype, tokens.dtype)
            dtype = tokens.dtype
        part.append(tokens.astype(dtype), plain)

    for name, tokens, plain in tokenised(chain(first, stream), tokenizer):
        digest = sources.place(name)
        if digest < sources.VALIDATION_SHARE:
            for _, earlier, kind in waiting:
                put(parts[0], earlier, kind)
            waiting = []
            put(parts[1], tokens, plain)
        elif parts[1].count:
            put(parts[0], tokens, plain)
        else:
            waiting.append((digest, tokens, plain))
    held = min(range(len(waiting)), key=lambda i: waiting[i][0]) if len(waiting) > 1 else None
    for i, (_, tokens, plain) in enumerate(waiting):
        put(parts[1 if i == held else 0], tokens, plain)

    digest_of_all = hashlib.sha256()
    for part in parts:
        part.file.seek(0)
        while raw := part.file.read(1 << 24):
            digest_of_all.update(raw)
        part.file.close()
        if part is parts[0]:
            digest_of_all.update(b"\xff")
    index: dict[str, Any] = {x.path.name: x.count for x in parts}
    index["counted"] = {x.path.name: x.counted for x in parts}
    index |= {"dtype": dtype.name, "fingerprint": digest_of_all.hexdigest()[:16]}
    (folder / "index.json").write_text(json.dumps(index), "utf-8")


def tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(name, tokens, whether it is a text and no chat) of each document, in order. Texts are
    encoded many at a time, in which a tokenizer may use several cores."""
    names: list[str] = []
    texts: list[str] = []

    def those_so_far() -> Iterator[tuple[str, np.ndarray, bool]]:
        for name, tokens in zip(names, tokenizer.encode_batch(texts), strict=True):
            yield name, tokens, True
        names.clear()
        texts.clear()

    size = 0
    for name, content in documents:
        if not isinstance(content, str):
            yield from those_so_far()
            size = 0
            yield name, tokenizer.encode_chat(name, content), False
            continue
        names.append(name)
        texts.append(content)
        size += len(content)
        if size >= CHARACTERS_AT_ONCE:
            yield from those_so_far()
            size = 0
    yield from those_so_far()
