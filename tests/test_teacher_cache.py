"""A teacher's most likely tokens: the objective that they give, the file that keeps them, and runs
that use it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import UserError
from lowbit.training import preparation
from lowbit.training.losses import TopK, soft_target_terms, top_k_terms
from lowbit.training.run import Run
from lowbit.training.teacher_cache import Record, TeacherCache, most_likely, open_cache
from tests.resuming import SMALL, outcome, run

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
N, V = 6, 30


def drawn(seed: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of student and teacher, and labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, N, V, generator=generator)
    return student, teacher, torch.randint(0, V, (N,), generator=generator)


def known_of(teacher: torch.Tensor, kept: int, temperature: float) -> TopK:
    log_p, ids = torch.log_softmax(teacher / temperature, -1).topk(kept, -1)
    return TopK(ids, log_p)


def lumped(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, V) -> of the named ids and of all others together, (N, K + 1)."""
    p = log_p.exp()
    named = p.gather(-1, ids)
    rest = p.scatter(-1, ids, 0).sum(-1, keepdim=True)
    return torch.cat((named, rest), -1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kept", [1, 4, V - 1])
def test_values_and_derivatives_are_those_of_the_lumped_distributions(kept, alpha, temperature):
    """Against autograd through the definition in float64."""
    student, teacher, labels = drawn(0)
    known = known_of(teacher, kept, temperature)
    z = student.double().requires_grad_()
    q = lumped(torch.log_softmax(z / temperature, -1), known.ids)
    p = lumped(torch.log_softmax(teacher.double() / temperature, -1), known.ids)
    kl = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (alpha * ce + (1 - alpha) * kl).sum().backward()

    found = top_k_terms(student.clone(), known, labels, alpha, temperature)
    assert torch.allclose(found[0].double(), ce, **CLOSE)
    assert torch.allclose(found[1].double(), kl, **CLOSE)
    assert torch.allclose(found[2].double(), z.grad, **CLOSE)


def test_of_all_tokens_but_one_it_is_the_whole_objective():
    student, teacher, labels = drawn(1)
    found = top_k_terms(student.clone(), known_of(teacher, V - 1, 1.0), labels, 0.4, 1.0)
    for ours, whole in zip(
        found, soft_target_terms(student, teacher, labels, 0.4, 1.0), strict=True
    ):
        assert torch.allclose(ours, whole, **CLOSE)


@given(st.integers(0, 10_000), st.integers(1, V - 1), st.floats(0.1, 20))
def test_never_more_than_the_whole_divergence(seed, kept, spread):
    """To lump outcomes cannot raise KL (the log-sum inequality), nor make it negative."""
    student, teacher, labels = drawn(seed, spread)
    known = known_of(teacher, kept, 1.0)
    kl = top_k_terms(student.clone(), known, labels, 0.5, 1.0)[1]
    whole = soft_target_terms(student, teacher, labels, 0.5, 1.0)[1]
    room = 1e-4 * (1 + whole.abs())
    assert bool((kl <= whole + room).all())
    assert bool((kl >= -room).all())


def test_a_teacher_that_masks_tokens_and_a_student_that_is_certain():
    """Probabilities of 0 count 0; where the student leaves nothing to the rest, all is finite."""
    student, teacher, labels = drawn(2)
    teacher[:, 3:] = -torch.inf
    known = known_of(teacher, 5, 1.0)
    for z in (student, 1e4 * student):
        for found in top_k_terms(z.clone(), known, labels, 0.0, 1.0):
            assert bool(torch.isfinite(found).all())


class Teacher(torch.nn.Module):
    """Of what its head reads, as much of a model as `most_likely` needs."""

    vocab_size = V

    def head_parameters(self):
        return torch.eye(V), None

    def logits(self, x, weight, bias):
        return x @ weight


def test_the_most_likely_tokens_in_chunks(monkeypatch):
    monkeypatch.setattr("lowbit.training.teacher_cache.LOGITS_AT_ONCE", 2 * V)
    teacher = drawn(3)[1]
    found = most_likely(Teacher(), teacher.view(2, N // 2, V), 7, 2.0)
    known = known_of(teacher, 7, 2.0)
    assert torch.equal(found.ids.flatten(0, 1), known.ids)
    assert torch.allclose(found.log_p.flatten(0, 1), known.log_p, **CLOSE)


# ------------------------------------------------------------------------------------- the file

RECORD = Record(seq_len=5, kept=3, vocab_size=1 << 20, temperature=1.0)


def answers(inputs: torch.Tensor) -> TopK:
    """By the inputs alone, as a teacher's are."""
    ids = inputs[..., None] + torch.arange(3)
    return TopK(ids, -0.5 * ids.float())


def asks_nobody(inputs: torch.Tensor) -> TopK:
    raise AssertionError("the teacher was asked again")


@pytest.fixture
def filled(tmp_path) -> tuple[TeacherCache, torch.Tensor]:
    """A cache of windows 0 to 7, and their inputs; the second half was asked for first."""
    cache = TeacherCache(tmp_path / "known.bin", RECORD)
    inputs = torch.arange(40).view(8, 5) * 1000
    for part in (slice(4, 8), slice(0, 4)):
        cache.of(np.arange(8)[part], inputs[part], answers)
    return cache, inputs


def test_what_was_asked_once_is_known(filled, tmp_path):
    """By this process and by the next one, in any order, to the bit."""
    order = np.array([7, 0, 3, 3])
    for cache in (filled[0], TeacherCache(tmp_path / "known.bin", RECORD)):
        found = cache.of(order, filled[1][order], asks_nobody)
        expected = answers(filled[1][order])
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.log_p, expected.log_p)


@given(st.data())
def test_a_damaged_record_is_made_again(data):
    ids = np.arange(15).reshape(5, 3)
    raw = bytearray(RECORD.packed(ids, -ids / 7))
    assert len(raw) == RECORD.size
    assert RECORD.unpacked(bytes(raw)) is not None
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert RECORD.unpacked(bytes(raw)) is None
    assert RECORD.unpacked(bytes(raw[:place])) is None
    assert RECORD.unpacked(bytes(len(raw))) is None


def test_only_the_damaged_window_is_asked_for(filled):
    cache, inputs = filled
    with cache.path.open("r+b") as f:
        f.seek(2 * RECORD.size + 9)
        f.write(b"\xff")
    asked = []

    def ask(some):
        asked.append(some.clone())
        return answers(some)

    found = cache.of(np.arange(8), inputs, ask)
    assert [x.tolist() for x in asked] == [inputs[2:3].tolist()]
    assert torch.equal(found.ids, answers(inputs).ids)


def test_a_full_disk_costs_time_only(filled, monkeypatch):
    cache, inputs = filled

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        found = cache.of(np.array([9, 1]), inputs[:2], answers)
        assert torch.equal(found.ids[0], answers(inputs[:1]).ids[0])
    assert cache.asked == 8 + 2


def test_a_disk_that_is_too_small_is_told_before(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"--cache_teacher 3: needs .* GB in .* are free"):
        open_cache(RECORD, 1 << 50, ["any"])


# ---------------------------------------------------------------------------------------- runs

KEPT = [*SMALL, "--hybrid", "--ternary", "--qat", "--calibrate=false", "--save_metrics"]


@pytest.fixture
def caches(monkeypatch) -> list[TeacherCache]:
    """Those that runs open."""
    found: list[TeacherCache] = []
    original = preparation.open_cache

    def opened(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(preparation, "open_cache", opened)
    return found


def test_a_second_run_asks_nothing_and_ends_the_same(
    tiny_teacher, text_file, tmp_path, caches, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*KEPT, "--teacher", str(tiny_teacher), "--data", str(text_file)]
    for folder in ("first", "second"):
        assert run(tmp_path / folder, *flags, "--cache_teacher", "8") == 0
    assert caches[0].asked > 0
    assert caches[1].asked == 0
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")
    # Another number of tokens is another file; another seed uses what it finds.
    assert run(tmp_path / "third", *flags, "--cache_teacher", "9") == 0
    assert caches[2].asked == caches[0].asked
    assert run(tmp_path / "fourth", *flags, "--cache_teacher", "8", "--seed", "1") == 0
    assert caches[3].path == caches[0].path


def test_all_tokens_but_one_train_as_all_do(tiny_teacher, text_file, tmp_path, monkeypatch):
    """The whole command, where nothing is lost: losses agree to rounding."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*KEPT, "--teacher", str(tiny_teacher), "--data", str(text_file)]
    assert run(tmp_path / "plain", *flags, "--hidden_weight", "0") == 0
    assert run(tmp_path / "kept", *flags, "--cache_teacher", "255") == 0
    rows = [outcome(tmp_path / x)["student_metrics.csv"] for x in ("plain", "kept")]
    for plain, kept in zip(*rows, strict=True):
        assert float(kept["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=1e-3)
        assert float(kept["train_kl"]) == pytest.approx(float(plain["train_kl"]), rel=2e-2)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--hidden_weight", "0.5"], "--cache_teacher contradicts --hidden_weight"),
        (
            ["--cache_teacher", "256"],
            "--cache_teacher 256: keep fewer, the vocabulary has only",
        ),
    ],
)
def test_contradictions(tiny_teacher, text_file, tmp_path, capsys, flags, told):
    words = [*KEPT, "--teacher", str(tiny_teacher), "--data", str(text_file)]
    assert run(tmp_path / "out", *words, "--cache_teacher", "4", *flags) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_step_runs_the_teacher_where_all_is_known(
    monkeypatch, tiny_teacher, text_file, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*KEPT, "--teacher", str(tiny_teacher), "--data", str(text_file)]
    assert run(tmp_path / "first", *flags, "--cache_teacher", "8") == 0
    original = Run.step
    taken = []

    def step(self):
        with monkeypatch.context() as patch:
            for name in ("features", "head", "logits"):
                patch.setattr(self.s.teacher, name, asks_nobody)
            result = original(self)
        taken.append(result.loss)
        return result

    monkeypatch.setattr(Run, "step", step)
    assert run(tmp_path / "second", *flags, "--cache_teacher", "8") == 0
    assert len(taken) == 9
