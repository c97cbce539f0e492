"""What a run saves of itself while it goes on: folders that exist whole or not at all.

``checkpoints/`` in a run's output folder holds one folder a checkpoint, named by a serial number
and the step. Its files are written and flushed first, ``manifest.json`` with their sizes and
SHA-256 last, in a folder of another name that is then renamed: a folder without a manifest whose
sums are right does not count. Tensors are in torch's format and read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from lowbit import UserError
from lowbit.files.atomic import flushed, sync

FORMAT = "lowbit-run"
VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 20
_NAME = re.compile(r"(\d{4,18})-step-(\d{1,18})")


class _Hashed:
    """A file that sums up what is written to it, once and in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sum.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class Saved:
    """A checkpoint on disk: its folder, its manifest's ``about``, and what its files hold."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the manifest is missing or is not one of ours."""
        self.folder = folder
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MAX_MANIFEST:
                raise ValueError
            values = json.loads(path.read_text("utf-8"))
            if values["format"] != FORMAT or values["version"] != VERSION:
                raise ValueError
            self.files = {
                str(name): (int(size), str(digest))
                for name, (size, digest) in values["files"].items()
            }
            self.about: dict[str, Any] = dict(values["about"])
            if any(Path(name).name != name or "\0" in name for name in self.files):
                raise ValueError
            "".join(self.files).encode()  # ValueError for half a surrogate
        except OSError as e:
            raise UserError(f"{folder} is not a checkpoint: no {MANIFEST}") from e
        except (
            ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
        ) as e:  # fmt: skip
            raise UserError(f"{path} is damaged, or of another version") from e

    @property
    def there(self) -> bool:
        """Whether it still is."""
        return (self.folder / MANIFEST).exists()

    @property
    def rollbacks(self) -> int:
        """How many led to it."""
        number = self.about.get("rollbacks")
        return number if isinstance(number, int) and 0 <= number < 1000 else 0

    def check(self) -> None:
        """UserError where a file is not as it was written."""
        for name, (size, digest) in self.files.items():
            path = self.folder / name
            found = hashlib.sha256()
            try:
                if path.stat().st_size != size:
                    raise UserError(f"{path} is damaged: its size is not the manifest's")
                with path.open("rb") as f:
                    while part := f.read(1 << 22):
                        found.update(part)
            except OSError as e:
                raise UserError(f"cannot read {path}: {e.strerror}") from e
            if found.hexdigest() != digest:
                raise UserError(f"{path} is damaged: its checksum is not the manifest's")

    def load(self, name: str) -> Any:
        """What `torch.save` wrote under this name; tensors are mapped from the file."""
        path = self.folder / name
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # torch raises many types for damaged or hostile files
            raise UserError(f"{path} is damaged, or not of this project") from e


class Checkpoints:
    """The checkpoints of one run, newest last; of those before, ``keep`` - 1 stay."""

    def __init__(self, output_dir: str | os.PathLike, keep: int = 2) -> None:
        self.folder, self.keep = Path(output_dir) / FOLDER, keep

    def _found(self, *, every: bool = False) -> list[tuple[int, Path]]:
        """Serial numbers and folders, in order; with ``every`` those without a manifest, too."""
        try:
            names = list(self.folder.iterdir())
        except OSError:
            return []
        matches = [(_NAME.fullmatch(path.name), path) for path in names]
        found = sorted((int(m[1]), path) for m, path in matches if m)
        return [(n, path) for n, path in found if every or (path / MANIFEST).exists()]

    def __bool__(self) -> bool:
        return bool(self._found())

    @property
    def begun(self) -> bool:
        """Whether one of them is of a step after the start."""
        return any(not path.name.endswith("-step-0") for _, path in self._found())

    def save(
        self, step: int, about: dict[str, Any], writers: dict[str, Callable[[Any], Any]]
    ) -> Path:
        """Write a checkpoint; writers: file name -> what writes it to a file that it is given.
        OSError where the disk is full; the checkpoints before are then as they were."""
        self.folder.mkdir(exist_ok=True)
        last = max((n for n, _ in self._found(every=True)), default=0)
        made = Path(tempfile.mkdtemp(dir=self.folder, prefix=".part-"))
        files = {}
        try:
            for name, write in writers.items():
                with flushed(made / name) as f:
                    hashed = _Hashed(f)
                    write(hashed)
                files[name] = (hashed.size, hashed.sum.hexdigest())
            text = json.dumps(
                {"format": FORMAT, "version": VERSION, "files": files, "about": about}, indent=1
            )
            with flushed(made / MANIFEST) as f:
                f.write(text.encode())
            sync(made)
            target = self.folder / f"{last + 1:04}-step-{step}"
            os.rename(made, target)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        self._drop(self._found()[: -self.keep])
        return target

    def _drop(self, superseded: list[tuple[int, Path]]) -> None:
        """Remove these, and what a process that was killed left half-written."""
        for _, path in superseded:
            remove(path)
        for path in self.folder.glob(".part-*"):
            shutil.rmtree(path, ignore_errors=True)

    def whole(self, told: Callable[[str], None] = lambda line: None) -> Iterator[Saved]:
        """Checkpoints that are whole, newest first; ``told`` of those that are not."""
        for _, path in reversed(self._found()):
            try:
                saved = Saved(path)
                saved.check()
            except UserError as e:
                told(f"{e}; trying the checkpoint before")
            else:
                yield saved

    def is_newest(self, saved: Saved) -> bool:
        found = self._found()
        return bool(found) and found[-1][1].resolve() == saved.folder.resolve()

    def newest(self, told: Callable[[str], None] = lambda line: None) -> Saved | None:
        """The first of `whole`."""
        return next(self.whole(told), None)

    def remove(self) -> None:
        """All of them: the run's files are written."""
        self._drop(self._found(every=True))
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def remove(folder: Path) -> None:
    """A checkpoint, manifest first: what is left of it then does not count."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, the folder is this process's: UserError where a run has it already. The lock dies
    with its process. Where the system has no such locks, nothing is locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {folder}; wait for it, or give another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)
