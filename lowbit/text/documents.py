"""Documents: reading, deduplication, and the split into training and validation.

A *document* is a named text. Documents go to training or validation by a hash of their name, so
the split does not move when documents are added, and no document is in both. Paragraphs that
occur twice are kept once, across the whole collection.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lowbit import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")
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


def cache_folder() -> Path:
    """Where text is kept that takes time to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "apl-hybrid")


def cached_stdlib_documents() -> list[Document]:
    """`stdlib_documents`, parsed once for each interpreter (it takes seconds)."""
    root = Path(sysconfig.get_path("stdlib"))
    key = f"1 {sys.version} {root} {root.stat().st_mtime_ns}"
    name = f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    path = cache_folder() / name
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
    """Read files and folders of .txt, .md, .py and .jsonl (a ``text`` field on each line), the
    last also gzipped.

    Raises UserError for a path that does not exist, is empty, binary or not UTF-8.
    """
    documents: list[Document] = []
    for given in paths:
        path = Path(given)
        if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
            raise UserError(f"--data: no such file or folder: {given}")
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not files:
                raise UserError(f"--data: no {', '.join(SUFFIXES)} files under {given}")
        elif path.name.endswith(SUFFIXES):
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
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"--data: {path} is damaged, or no gzip file") from e
    except OSError as e:
        raise UserError(f"--data: cannot read {path}: {e.strerror}") from e
    if b"\0" in raw:
        raise UserError(f"--data: {path} is a binary file, not text")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"--data: {path} is not UTF-8 (byte {e.start}); convert it first") from e
    if path.suffix not in (".jsonl", ".gz"):
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


# -------------------------------------------------------------------------------------- splitting


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
