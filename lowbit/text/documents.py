"""Documents: reading, deduplication, and the split into training and validation.

A *document* is a named text, or a chat. Documents go to training or validation by a hash of their
name, so the split does not move when documents are added, and no document is in both. Of fewer
than MIN_DOCUMENTS the sections are split instead, and where the hash holds none out, that with the
smallest is. Paragraphs that occur twice are kept once, across the whole collection.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lowbit import UserError, first_line
from lowbit.extras import require
from lowbit.text.tokenizers import Message

STDLIB = "stdlib"  # as a path: the documentation of the Python standard library
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
VALIDATION_SHARE = 0.06
MIN_DOCUMENTS = 20  # with fewer, sections of the documents are split instead
SECTION_CHARS = 4000

Document = tuple[str, "str | list[Message]"]  # (name, text or chat)


# ------------------------------------------------------------------------ reading documents


def stdlib_documents() -> list[Document]:
    """Documentation that every CPython carries: language topics and docstrings.

    Modules are parsed, never imported. Packages that are tests or not the library are left out.
    The text depends on the Python version; a run records its fingerprint.
    """
    from pydoc_data import topics

    documents: list[Document] = [(f"topic/{k}", v) for k, v in sorted(topics.topics.items())]
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
    """Where text is kept that takes time to make; of this process only, where nobody is at home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "apl-hybrid")
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return process_folder()


def process_folder() -> Path:
    """A temporary folder that goes with this process."""
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="apl-hybrid-")


def stdlib_key() -> str:
    """Another one, another text of `stdlib_documents`."""
    root = Path(sysconfig.get_path("stdlib"))
    return f"1 {sys.version} {root} {root.stat().st_mtime_ns}"


def cached_stdlib_documents() -> list[Document]:
    """`stdlib_documents`, parsed once for each interpreter (it takes seconds)."""
    name = f"stdlib-{hashlib.sha256(stdlib_key().encode()).hexdigest()[:16]}.json"
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


def find_files(paths: Sequence[str]) -> list[tuple[str, Path]]:
    """Files of known suffixes, as (name, path), in a fixed order. The name is relative to the
    folder that was given, so that it does not depend on where that lies or how it is spelled.
    Hidden files and folders inside it are left out.

    Raises UserError for a path that does not exist or holds no such file.
    """
    found: list[tuple[str, Path]] = []
    for given in paths:
        path = Path(given)
        if not given or not os.path.exists(path):  # unlike Path.exists, False for long names
            raise UserError(f"--data: no such file or folder: {given or '(an empty path)'}")
        if path.is_dir():
            inside = [(p.relative_to(path), p) for p in path.rglob("*") if is_text(p)]
            files = [
                (name.as_posix(), p)
                for name, p in sorted(inside)
                if not any(part.startswith(".") for part in name.parts) and p.is_file()
            ]
            if not files:
                raise UserError(f"--data: no {', '.join(SUFFIXES)} files under {given}")
        elif is_text(path):
            files = [(path.name, path)]
        else:
            raise UserError(f"--data: {given}: expected one of {', '.join(SUFFIXES)} or a folder")
        found += files
    return found


def is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_documents(
    files: Sequence[tuple[str, Path]], progress: Callable[[int], Any] = lambda n: None
) -> Iterator[Document]:
    """The documents of `find_files`' files, one after another: .txt, .md and .py are one each; of
    .jsonl (also gzipped) and .parquet each record is one, which has a ``text`` or, for a chat,
    ``messages``. progress is told the bytes of each file that was read.

    Raises UserError for a file that is binary, not UTF-8, damaged or of another form, and where
    there is no text in any.
    """
    empty = True
    for name, path in files:
        for document in _read_file(name, path):
            empty = empty and isinstance(document[1], str) and not document[1].strip()
            yield document
        progress(path.stat().st_size)
    if empty:
        raise UserError(f"--data: no text in {', '.join(str(p) for _, p in files[:3])}")


def _read_file(name: str, path: Path) -> Iterator[Document]:
    lower = path.name.lower()
    try:
        if lower.endswith(".parquet"):
            yield from _rows(name, path)
        elif lower.endswith(".jsonl"):
            with path.open("rb") as f:
                yield from _lines(name, path, f)
        elif lower.endswith(".gz"):
            with gzip.open(path, "rb") as f:
                yield from _lines(name, path, f)
        else:
            yield name, _text(path, path.read_bytes()).replace("\r\n", "\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"--data: {path} is damaged, or no gzip file") from e
    except OSError as e:
        raise UserError(f"--data: cannot read {path}: {e.strerror or first_line(e)}") from e


def _text(path: Path, raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"--data: {path} is UTF-16, not UTF-8; convert it first")
    if b"\0" in raw:
        raise UserError(f"--data: {path} is a binary file, not text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"--data: {path} is not UTF-8 (byte {e.start}); convert it first") from e


def _lines(name: str, path: Path, file: Iterable[bytes]) -> Iterator[Document]:
    for n, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(_text(path, raw))
        except (ValueError, RecursionError) as e:
            raise UserError(f"--data: {path} line {n}: expected {EXPECTED}") from e
        yield f"{name}:{n}", _content(record, f"{path} line {n}")


def _rows(name: str, path: Path) -> Iterator[Document]:
    parquet = require("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(path)
        columns = [c for c in ("messages", "text") if c in file.schema_arrow.names][:1]
        if not columns:
            raise UserError(f"--data: {path} has no column text or messages")
        n = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                n += 1
                yield f"{name}:{n}", _content(record, f"{path} row {n}")
    except (OSError, UserError):
        raise
    except Exception as e:  # the library's own errors
        raise UserError(f"--data: {path} is damaged, or no parquet file: {first_line(e)}") from e


EXPECTED = '{"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}'


def _content(record: Any, where: str) -> str | list[Message]:
    """The text or chat of one record. UserError where it has neither."""
    if not isinstance(record, dict) or not record.keys() & {"text", "messages"}:
        raise UserError(f"--data: {where}: expected {EXPECTED}")
    if "messages" not in record:
        return _sound(record["text"], f"{where}: text")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"--data: {where}: messages is not a list of messages")
    chat = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise UserError(f"--data: {where}: message {i} has no role or no content")
        chat.append(
            {k: _sound(message[k], f"{where}: {k} of message {i}") for k in ("role", "content")}
        )
    return chat


def _sound(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"--data: {what} is not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"--data: {what} holds half a surrogate pair") from e
    return value


# -------------------------------------------------------------------------------------- splitting


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Keep each paragraph's first occurrence (whitespace ignored) and each chat's; drop empty
    documents. What was seen is remembered as numbers of 64 bits."""
    seen: set[int] = set()

    def new(text: str) -> bool:
        key = hash(text)
        fresh = key not in seen
        seen.add(key)
        return fresh

    for name, content in documents:
        if not isinstance(content, str):
            if new(json.dumps(content)):
                yield name, content
            continue
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", content):
            words = " ".join(paragraph.split())
            if words and new(words):
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            yield name, "\n\n".join(paragraphs)


def into_sections(documents: Iterable[Document]) -> list[Document]:
    """Cut texts at paragraph ends into sections of about SECTION_CHARS characters."""
    sections: list[Document] = []
    for name, text in documents:
        if not isinstance(text, str):
            sections.append((name, text))
            continue
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


def place(name: str) -> float:
    """A document's place in [0, 1), by a hash of its name: below VALIDATION_SHARE it is held out
    for validation. So the split does not move when documents are added or changed."""
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32
