"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
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


def atomic_write(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> Path:
    """Write a temporary file beside ``path``, flush it to disk, then rename it over ``path``.

    write is given the file; its ``name`` is for those who open it themselves.
    """
    target = Path(path)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(fd)
    try:
        with open(name, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
