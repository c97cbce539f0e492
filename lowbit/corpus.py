"""Text in, token windows out: documents, split, windows and the cluster-balanced sampler.

A *document* is a named text. Documents go to training or validation by a hash of their name, so
the split does not move when documents are added, and no document is in both. Paragraphs that
occur twice are kept once, across the whole collection.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit import UserError
from lowbit.tokenizer import ByteTokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
VALIDATION_SHARE = 0.06
MIN_DOCUMENTS = 20  # with fewer, sections of the documents are split instead
SECTION_CHARS = 4000

Document = tuple[str, str]  # (name, text)


# ------------------------------------------------------------------------ reading documents


def stdlib_documents() -> list[Document]:
    """Documentation that every CPython carries: language topics and docstrings.

    Modules are parsed, never imported. Packages that are tests or not the library are left out.
    The text depends on the Python version; a run records its fingerprint.
    """
    from pydoc_data import topics

    documents = [(f"topic/{k}", v) for k, v in sorted(topics.topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in skip)
        for name in sorted(f for f in files if f.endswith(".py")):
            path = Path(folder, name)
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
            text = "\n\n".join(d for d in found if d)
            if text:
                documents.append((f"lib/{path.relative_to(root).as_posix()}", text))
    return documents


def cached_stdlib_documents() -> list[Document]:
    """`stdlib_documents`, parsed once for each interpreter (it takes seconds)."""
    root = Path(sysconfig.get_path("stdlib"))
    key = f"1 {sys.version} {root} {root.stat().st_mtime_ns}"
    name = f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base, "apl-hybrid", name)
    try:
        return [(str(n), str(t)) for n, t in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        documents = stdlib_documents()
    try:  # a cache that can't be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as f:
            json.dump(documents, f)
        os.replace(f.name, path)
    except OSError:
        pass
    return documents


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Read files and folders of .txt, .md, .py and .jsonl (a ``text`` field on each line).

    Raises UserError for a path that does not exist, is empty, binary or not UTF-8.
    """
    documents: list[Document] = []
    for given in paths:
        path = Path(given)
        if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
            raise UserError(f"--data: no such file or folder: {given}")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not files:
                raise UserError(f"--data: no {', '.join(SUFFIXES)} files under {given}")
        elif path.suffix in SUFFIXES:
            files = [path]
        else:
            raise UserError(f"--data: {given}: expected one of {', '.join(SUFFIXES)} or a folder")
        for file in files:
            documents += _read_file(file)
    if not any(text.strip() for _, text in documents):
        raise UserError(f"--data: no text in {', '.join(paths)}")
    return documents


def _read_file(path: Path) -> list[Document]:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"--data: cannot read {path}: {e.strerror}") from e
    if b"\0" in raw:
        raise UserError(f"--data: {path} is a binary file, not text")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"--data: {path} is not UTF-8 (byte {e.start}); convert it first") from e
    if path.suffix != ".jsonl":
        return [(str(path), text)]
    documents = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            value = record["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f'--data: {path} line {n}: expected {{"text": "..."}}') from e
        if not isinstance(value, str):
            raise UserError(f"--data: {path} line {n}: text is not a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(f"--data: {path} line {n}: text holds half a surrogate pair") from e
        documents.append((f"{path}:{n}", value))
    return documents


# -------------------------------------------------------------------------- splitting, windows


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Keep each paragraph's first occurrence (whitespace ignored); drop empty documents."""
    seen: set[str] = set()
    kept = []
    for name, text in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            kept.append((name, "\n\n".join(paragraphs)))
    return kept


def into_sections(documents: Iterable[Document]) -> list[Document]:
    """Cut documents at paragraph ends into sections of about SECTION_CHARS characters."""
    sections = []
    for name, text in documents:
        part: list[str] = []
        size = n = 0
        paragraphs = [
            p[i : i + SECTION_CHARS]
            for p in text.split("\n\n")
            for i in range(0, len(p), SECTION_CHARS)
        ]
        for paragraph in paragraphs:
            part.append(paragraph)
            size += len(paragraph)
            if size >= SECTION_CHARS:
                sections.append((f"{name}#{n}", "\n\n".join(part)))
                part, size, n = [], 0, n + 1
        if part:
            sections.append((f"{name}#{n}", "\n\n".join(part)))
    return sections


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, validation), by a hash of each name; at least one document in validation."""
    digest = [int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) / 2**32 for n, _ in documents]
    held = {i for i, x in enumerate(digest) if x < VALIDATION_SHARE}
    if not held and len(documents) > 1:
        held = {int(np.argmin(digest))}
    return (
        [d for i, d in enumerate(documents) if i not in held],
        [d for i, d in enumerate(documents) if i in held],
    )


@dataclass
class Corpus:
    """Token windows of one length, as (n, seq_len + 1) uint8: inputs and next-token labels."""

    train: np.ndarray
    validation: np.ndarray
    train_tokens: int
    validation_tokens: int
    fingerprint: str  # sha256 over all tokens of both parts, first 16 hex digits


def token_stream(documents: Iterable[Document], tokenizer: ByteTokenizer) -> np.ndarray:
    return tokenizer.encode("\n\n".join(text for _, text in documents))


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Consecutive windows that share one token: (n, seq_len + 1)."""
    n = (len(tokens) - 1) // seq_len
    if n <= 0:
        return np.empty((0, seq_len + 1), tokens.dtype)
    starts = np.arange(n)[:, None] * seq_len
    return tokens[starts + np.arange(seq_len + 1)]


def load_corpus(paths: Sequence[str], seq_len: int, tokenizer: ByteTokenizer) -> Corpus:
    """Documents (the standard library's documentation where ``paths`` is empty) -> Corpus.

    Raises UserError where the text is too short for one training and one validation window.
    """
    documents = deduplicate(read_documents(paths) if paths else cached_stdlib_documents())
    if len(documents) < MIN_DOCUMENTS:
        documents = into_sections(documents)
    train_docs, validation_docs = split(documents)
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


# ---------------------------------------------------------------------------------- sampling


class StratifiedSampler:
    """Batches in which every cluster has its share, without replacement, resumable.

    Each cluster is walked in its own random order. The places of a batch go to clusters in
    proportion to their sizes; what rounding takes from a cluster in one batch it gets in a later
    one (error diffusion), so the objective stays the plain mean over windows while the
    between-cluster variance of a batch is removed. A cluster that is used up is reshuffled.
    After n places each of K clusters has had its share of n, give or take 1 - 1 / (2K - 2): every
    place goes to the cluster that would soonest pass this bound (Tijdeman, The chairman
    assignment problem, 1980).

    labels: cluster of each window, shape (n,). One cluster for all is plain shuffling.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int) -> None:
        self.members = [np.flatnonzero(labels == k) for k in np.unique(labels)]
        self.share = np.array([len(m) for m in self.members]) / len(labels)
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)
        self.credit = np.zeros(len(self.members))
        self.orders = [self.rng.permutation(m) for m in self.members]
        self.cursors = [0] * len(self.members)

    def next_batch(self, size: int | None = None) -> np.ndarray:
        """Indices of the next windows, shape (size,), the batch size by default."""
        size = self.batch_size if size is None else size
        slack = 1 / max(2, 2 * len(self.members) - 2)
        counts = np.zeros(len(self.members), int)
        for _ in range(size):
            self.credit += self.share
            time_left = (1 - slack - self.credit) / self.share
            k = np.argmin(np.where(self.credit >= slack - 1e-9, time_left, np.inf))
            self.credit[k] -= 1
            counts[k] += 1
        batch = np.concatenate([self._take(k, n) for k, n in enumerate(counts)])
        return self.rng.permutation(batch)

    def _take(self, k: int, n: int) -> np.ndarray:
        parts = []
        while n:
            part = self.orders[k][self.cursors[k] : self.cursors[k] + n]
            parts.append(part)
            n -= len(part)
            self.cursors[k] += len(part)
            if self.cursors[k] == len(self.orders[k]):
                self.orders[k] = self.rng.permutation(self.members[k])
                self.cursors[k] = 0
        return np.concatenate(parts) if parts else np.empty(0, int)

    def state_dict(self) -> dict:
        return {
            "rng": self.rng.bit_generator.state,
            "credit": self.credit.tolist(),
            "orders": [o.tolist() for o in self.orders],
            "cursors": list(self.cursors),
        }

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.credit = np.array(state["credit"])
        self.orders = [np.array(o, int) for o in state["orders"]]
        self.cursors = list(state["cursors"])
