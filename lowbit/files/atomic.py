"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lowbit import UserError


def prepare_folder(folder: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """Make the folder and try a file in it. Raises UserError where that fails."""
    path = Path(folder)
    try:
        os.fspath(path).encode()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise UserError(f"{flag}: cannot write to {folder}: {e.strerror}") from e
    except UnicodeEncodeError as e:  # which libraries that write into it do not take
        raise UserError(f"{flag}: {folder}: the name is not UTF-8; use another") from e
    return path


class _Raw(io.FileIO):
    """A file that remembers why it could not be written: some writers make of a full disk an error
    of their own."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as e:
            self.failed = e
            raise


@contextlib.contextmanager
def flushed(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to be written, which is on the disk afterwards. OSError where it cannot be, whatever
    the writer makes of it."""
    raw = _Raw(path, "wb")
    f: Any = io.BufferedWriter(raw)
    try:
        yield f
        f.flush()
        os.fsync(f.fileno())
    except Exception as e:
        if raw.failed and e is not raw.failed:
            raise raw.failed from e
        raise
    finally:
        with contextlib.suppress(OSError):
            f.close()


def sync(folder: Path) -> None:
    """Flush a folder's names to disk, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> Path:
    """Write a temporary file beside ``path``, flush it to disk, rename it over ``path``, and flush
    the folder's names.

    write is given the file; its ``name`` is for those who open it themselves.
    """
    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(fd)
    try:
        with flushed(name) as f:
            write(f)
        allow_as_usual(name)
        os.replace(name, target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return target


def allow_as_usual(path: str | os.PathLike) -> None:
    """Give a file the permissions that open() would have made it with: tempfile, and safetensors,
    make files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
