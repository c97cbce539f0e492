"""Losses against formulas written in float64 numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from lowbit.models.interface import LanguageModel
from lowbit.training import losses
from lowbit.training.losses import distillation_terms, hidden_state_loss

# Float32 sums of 40 terms of size 10: relative errors of some 1e-6.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def naive_terms(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    s, t = student.double().numpy(), teacher.double().numpy()
    b, n = labels.shape
    hard = log_softmax(s)
    ce = -hard[np.arange(b)[:, None], np.arange(n), labels.numpy()].mean(1)
    log_p, log_q = log_softmax(t / tau), log_softmax(s / tau)
    kl = tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)
    return ce, kl


def batch(
    seed: int = 0, b: int = 3, t: int = 5, v: int = 17, spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(b, t, v, generator=g) * spread for _ in range(2))
    return student, teacher, torch.randint(v, (b, t), generator=g)


@given(
    seed=st.integers(0, 1000),
    tau=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 40)),
)
def test_terms_match_float64_formulas(seed, tau, shape) -> None:
    """Cross-entropy ignores the temperature; KL is tau^2 KL(p_tau || q_tau)."""
    args = batch(seed, *shape)
    ce, kl = distillation_terms(*args, tau)
    want_ce, want_kl = naive_terms(*args, tau)
    np.testing.assert_allclose(ce.numpy(), want_ce, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kl.numpy(), want_kl, rtol=1e-4, atol=2e-5 * tau**2)


def test_two_words_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = ln 2 - H(3/4) and CE = ln 2."""
    teacher = torch.tensor([[[0.75, 0.25]]]).log()
    ce, kl = distillation_terms(torch.zeros(1, 1, 2), teacher, torch.tensor([[1]]), 1.0)
    assert ce.item() == pytest.approx(np.log(2), rel=1e-6)
    assert kl.item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-6)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_divergence_from_itself_is_zero(tau: float) -> None:
    """KL(p, p) = 0, also where logits differ by a constant a position."""
    student, _, labels = batch(spread=10)
    shifted = student + torch.arange(5.0)[None, :, None]
    _, kl = distillation_terms(student, shifted, labels, tau)
    assert kl.abs().max() < 1e-5 * tau**2


@pytest.mark.parametrize("tau", [0.5, 2.0, 5.0])
def test_temperature_divides_logits_and_multiplies_by_its_square(tau: float) -> None:
    """KL at temperature tau of tau * logits is tau^2 times KL at temperature 1 of the logits."""
    student, teacher, labels = batch()
    _, plain = distillation_terms(student, teacher, labels, 1.0)
    _, scaled = distillation_terms(student * tau, teacher * tau, labels, tau)
    torch.testing.assert_close(scaled, plain * tau**2)


def test_gradient_keeps_its_size_at_high_temperature() -> None:
    """tau^2 makes the gradient tend to (s - t) / V, centred, instead of vanishing."""
    student, teacher, labels = batch(b=1, t=1)
    student.requires_grad_(True)
    _, kl = distillation_terms(student, teacher, labels, 1000.0)
    kl.sum().backward()
    difference = student.detach() - teacher
    want = (difference - difference.mean(-1, keepdim=True)) / student.size(-1)
    torch.testing.assert_close(student.grad, want, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("times", [2, 3])
def test_terms_do_not_depend_on_batch_or_length(times: int) -> None:
    """Repeating windows repeats the terms; repeating positions leaves them alone."""
    args = batch()
    ce, kl = distillation_terms(*args, 2.0)
    taller = [a.repeat(times, *[1] * (a.ndim - 1)) for a in args]
    longer = [a.repeat(1, times, *[1] * (a.ndim - 2)) for a in args]
    for got, want in zip(distillation_terms(*taller, 2.0), (ce, kl), strict=True):
        torch.testing.assert_close(got, want.repeat(times))
    for got, want in zip(distillation_terms(*longer, 2.0), (ce, kl), strict=True):
        torch.testing.assert_close(got, want)


def test_windows_are_independent() -> None:
    """A window's terms are the same whatever else is in the batch."""
    args = batch()
    ce, kl = distillation_terms(*args, 1.5)
    alone = distillation_terms(*(a[1:2] for a in args), 1.5)
    torch.testing.assert_close(alone[0], ce[1:2])
    torch.testing.assert_close(alone[1], kl[1:2])


def test_half_precision_logits_are_widened() -> None:
    """bfloat16 logits give float32 terms, those of the same logits in float32."""
    student, teacher, labels = batch()
    s, t = student.bfloat16(), teacher.bfloat16()
    got, want = (
        distillation_terms(*pair, labels, 2.0) for pair in ((s, t), (s.float(), t.float()))
    )
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w)


def hidden(seed: int, blocks: int = 3, b: int = 2, t: int = 4, c: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, t, c, generator=g) * 10**i for i in range(blocks)]


def test_hidden_loss_closed_forms() -> None:
    """0 for equal states; 1 for a student at 0 on average; k^2 for a relative error of k."""
    teacher = hidden(0)
    assert hidden_state_loss(teacher, teacher).tolist() == [0.0, 0.0]
    nothing = hidden_state_loss([torch.zeros_like(h) for h in teacher], teacher)
    assert nothing.mean().item() == pytest.approx(1.0, rel=1e-5)
    off = hidden_state_loss([1.5 * h for h in teacher], teacher)
    assert off.mean().item() == pytest.approx(0.25, rel=1e-5)


def test_hidden_loss_formula() -> None:
    """Mean over blocks and positions of the square error over the teacher's square."""
    student, teacher = hidden(1), hidden(2)
    want = np.mean(
        [
            (((s - t) ** 2).sum(2) / (t**2).sum(2)).mean(1)
            for s, t in ((a.double().numpy(), b.double().numpy())
                         for a, b in zip(student, teacher, strict=True))
        ],
        axis=0,
    )  # fmt: skip
    np.testing.assert_allclose(hidden_state_loss(student, teacher).numpy(), want, rtol=1e-5)


def test_hidden_loss_is_dimensionless_and_ignores_repeats() -> None:
    """A common factor, more windows or more positions change nothing."""
    student, teacher = hidden(1), hidden(2)
    want = hidden_state_loss(student, teacher)
    scaled = hidden_state_loss([7 * h for h in student], [7 * h for h in teacher])
    torch.testing.assert_close(scaled, want)
    for dims in ((2, 1, 1), (1, 3, 1)):
        got = hidden_state_loss(*([h.repeat(dims) for h in hs] for hs in (student, teacher)))
        torch.testing.assert_close(got, want.repeat(dims[0]))


def test_a_huge_token_owns_only_itself() -> None:
    """The rest of its window, and every other window, count as before."""
    student, teacher = hidden(1), hidden(2)
    want = hidden_state_loss(student, teacher)
    for h in (*student, *teacher):
        h[0, 0] *= 1e4
    got = hidden_state_loss(student, teacher)
    torch.testing.assert_close(got, want)  # 1e4 is in both


def test_hidden_loss_needs_as_many_blocks() -> None:
    """A student of another depth is a mistake, not a shorter sum."""
    with pytest.raises(ValueError, match="argument"):
        hidden_state_loss(hidden(0)[:2], hidden(0))


# --------------------------------------------------------------------------- large vocabularies


class Head(LanguageModel):
    """A head with a bias, and a cap on its logits, and nothing else."""

    def __init__(self, vocabulary: int, size: int, cap: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size, self.cap, self.asked, self.seen = vocabulary, cap, [], []
        self.layer = nn.Linear(size, vocabulary)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def head_parameters(self):
        return self.layer.weight, self.layer.bias

    def logits(self, x, weight, bias):
        self.asked.append(x.numel() // x.size(-1))
        self.seen.append(weight)
        return torch.tanh(super().logits(x, weight, bias) / self.cap) * self.cap


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_objective_in_chunks_is_the_objective(monkeypatch, alpha, temperature):
    """Values and gradients of final states, weight and bias, against autograd in float64."""
    b, t, c, v = 3, 7, 5, 40
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * v)
    student, teacher = Head(v, c, 5.0, 0), Head(v, c, 3.0, 1)
    generator = torch.Generator().manual_seed(2)
    final = torch.randn(b, t, c, generator=generator).requires_grad_()
    target = torch.randn(b, t, c, generator=generator)
    labels = torch.randint(0, v, (b, t), generator=generator)
    weights = torch.tensor([0.5, 1.0, 2.0])
    total, ce, kl = losses.distillation_objective(
        student, teacher, final, target, labels, weights, alpha, temperature
    )
    (3.0 * total).backward()
    assert max(student.asked) == max(teacher.asked) == 4
    assert not ce.requires_grad
    assert not kl.requires_grad

    exact, x, ce64, kl64 = in_float64(student, teacher, final, target, labels, temperature)
    objective = ((alpha * ce64 + (1 - alpha) * kl64) * weights).mean()
    (3.0 * objective).backward()
    assert torch.allclose(total.double(), objective, **CLOSE)
    assert_same(student, final, ce, kl, exact, x, ce64, kl64)


def test_heads_are_cast_for_all_chunks_at_once(monkeypatch):
    """Under autocast, with the values and gradients of a cast for every chunk."""
    b, t, c, v = 2, 6, 5, 40
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * v)
    generator = torch.Generator().manual_seed(2)
    final, target = torch.randn(2, b, t, c, generator=generator)
    labels = torch.randint(0, v, (b, t), generator=generator)
    found, once = [], losses.multiplied
    for cast in (once, lambda weight, bias: (weight, bias)):
        monkeypatch.setattr(losses, "multiplied", cast)
        student, teacher = Head(v, c, 5.0, 0), Head(v, c, 3.0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            parts = losses.chunked_objective(
                student, teacher, final, target, labels, torch.ones(b), 0.5, 1.0
            )
        parts[0].backward()
        found.append([*parts, *(p.grad for p in student.parameters())])
        dtypes = {x.dtype for x in student.seen + teacher.seen}
        places = {x.data_ptr() for x in student.seen}
        if cast is once:
            assert dtypes == {torch.bfloat16}
            assert len(places) == 1
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32


def in_float64(student, teacher, final, target, labels, temperature):
    """A copy of the student, what its head reads, and CE and KL (B,) of it by their definitions."""
    exact = copy.deepcopy(student).double()
    exact.zero_grad()
    x = final.detach().double().requires_grad_()
    with torch.no_grad():
        wanted = teacher.double().head(target.double())
    return exact, x, *reference_terms(exact.head(x), wanted, labels, temperature)


def assert_same(student, final, ce, kl, exact, x, ce64, kl64):
    """Values of each window, and gradients of the objective."""
    assert torch.allclose(ce.double(), ce64, **CLOSE)
    assert torch.allclose(kl.double(), kl64, **CLOSE)
    assert torch.allclose(final.grad.double(), x.grad, **CLOSE)
    for got, want in zip(student.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(got.grad.double(), want.grad, **CLOSE)


def reference_terms(student, teacher, labels, temperature):
    """CE and KL (B,) by their definitions, p log p being 0 at 0."""
    ce = -torch.log_softmax(student, -1).gather(-1, labels[..., None])[..., 0].mean(1)
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    terms = p * (torch.where(p > 0, p, 1).log() - torch.where(p > 0, q, 1).log())
    return ce, temperature**2 * terms.sum(-1).mean(1)


class Masked(Head):
    """A head whose first ``masked`` tokens cannot be."""

    masked = 0

    def logits(self, x, weight, bias):
        first = torch.arange(self.vocab_size) < self.masked
        return super().logits(x, weight, bias).masked_fill(first, -torch.inf)


@pytest.mark.parametrize("of_student", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("at_once", [4 * 40, 1 << 23])
def test_tokens_that_the_teacher_masks_count_nothing(monkeypatch, at_once, temperature, of_student):
    """Values and gradients, whole and in chunks, against float64: a logit of -inf is a term of 0,
    whether the student's is finite there or not."""
    b, t, c, v = 3, 7, 5, 40
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    student, teacher = Masked(v, c, 5.0, 0), Masked(v, c, 3.0, 1)
    student.masked, teacher.masked = of_student, 5
    generator = torch.Generator().manual_seed(2)
    final = torch.randn(b, t, c, generator=generator).requires_grad_()
    target = torch.randn(b, t, c, generator=generator)
    labels = torch.randint(5, v, (b, t), generator=generator)
    total, ce, kl = losses.distillation_objective(
        student, teacher, final, target, labels, None, 0.3, temperature
    )
    total.backward()

    exact, x, ce64, kl64 = in_float64(student, teacher, final, target, labels, temperature)
    (0.3 * ce64 + 0.7 * kl64).mean().backward()
    assert_same(student, final, ce, kl, exact, x, ce64, kl64)


@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_a_token_that_only_the_student_masks_is_infinitely_far(monkeypatch, at_once):
    """Told as inf, not as a number, nor as NaN."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    student, teacher = Masked(40, 5, 5.0, 0), Masked(40, 5, 3.0, 1)
    student.masked = 5
    final = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 3), 9)
    _, _, kl = losses.distillation_objective(student, teacher, final, final, labels, None, 0.5, 1.0)
    assert torch.isposinf(kl).all()


def test_few_logits_are_taken_whole():
    student, teacher = Head(40, 5, 5.0, 0), Head(40, 5, 3.0, 1)
    final, labels = torch.randn(2, 6, 5), torch.zeros(2, 6, dtype=torch.long)
    losses.distillation_objective(student, teacher, final, final, labels, None, 0.5, 1.0)
    assert student.asked == [12]
