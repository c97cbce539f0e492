"""Shared fixtures: a tiny packed teacher and a text file."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Caches of the tests are theirs, in their processes, too.
_CACHE = tempfile.TemporaryDirectory(prefix="apl-hybrid-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# Of several workers each has a core; so have the processes that they start. (A worker inherits what
# was set for the process that started it.)
WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREADS = 1 if WORKER else min(2, os.cpu_count() or 1)
if WORKER or "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from lowbit import console  # noqa: E402
from lowbit.files.packed import save_packed  # noqa: E402
from lowbit.models.decoder import CausalLM, ModelConfig  # noqa: E402
from lowbit.options import BY_TEACHER  # noqa: E402
from lowbit.text.tokenizers import ByteTokenizer  # noqa: E402

# A shell's background jobs ignore Ctrl-C, nohup's the loss of a terminal; some tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
console.WAIT = 3600.0  # on a machine that is busy, or not: stderr is the same
# In a run of a few steps validation would take most of the time.
SHIPPED = dict(BY_TEACHER)
BY_TEACHER.update(quick_tokens=(1024, 1024), final_tokens=(2048, 2048))
torch.set_num_threads(THREADS)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


pytest_plugins = ["packing", "resuming"]  # fixtures that two files share


@pytest.fixture(autouse=True)
def _keep_denormals() -> Iterator[None]:
    """A run flushes denormals for the whole process; tests start and end without."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def whole_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs validate on as much text as those of another process."""
    for name in ("quick_tokens", "final_tokens"):
        monkeypatch.setitem(BY_TEACHER, name, SHIPPED[name])


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random teacher in the packed format, float16."""
    config = ModelConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    path = tmp_path_factory.mktemp("teacher") / "tiny.npz"
    save_packed(path, CausalLM(config).initialise(0), ByteTokenizer().describe(), plain="float16")
    return path


SUBJECTS = "the miller|an old sailor|our neighbour|the engine|every child|a grey heron|the clerk"
VERBS = "carries|remembers|repairs|counts|forgets|paints|follows|measures"
OBJECTS = "seven baskets|the narrow bridge|a letter|two lanterns|the river|a broken clock|no one"
PLACES = "before dawn|in the harbour|under the hill|on Tuesdays|without a word|by the mill"


def make_text(size: int, seed: int = 0) -> str:
    """Deterministic paragraphs of varied sentences, at least ``size`` characters."""
    rng = random.Random(seed)
    pools = [part.split("|") for part in (SUBJECTS, VERBS, OBJECTS, PLACES)]
    paragraphs: list[str] = []
    length = 0
    while length < size:
        sentences = []
        for _ in range(rng.randint(2, 6)):
            words = " ".join(rng.choice(pool) for pool in pools)
            sentences.append(f"{words[0].upper()}{words[1:]}, {rng.randint(2, 999)} times.")
        paragraphs.append(" ".join(sentences))
        length += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 KB of text in many paragraphs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(60_000), encoding="utf-8")
    return path
