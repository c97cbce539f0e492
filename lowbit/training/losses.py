"""Distillation losses. Shapes: B windows, T positions, V vocabulary, C hidden size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowbit.models.interface import LanguageModel

LOGITS_AT_ONCE = 1 << 23  # of each model: 32 MiB in float32, which caches hold in part
IGNORED = -100  # the label of a token that no loss counts, as in torch


def window_means(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Means of (B, T) over the tokens that count; 0 for a window without any: (B,)."""
    counted = labels != IGNORED
    return torch.where(counted, values, 0).sum(1) / counted.sum(1).clamp_min(1)


def distillation_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) twice and labels (B, T) -> (cross-entropy, KL), each (B,), nats a token.

    KL = tau^2 sum_v p_tau log(p_tau / q_tau), p the teacher (Hinton et al., arXiv 1503.02531,
    section 2; tau^2 keeps the gradient's size). Means over positions whose label is not IGNORED,
    so neither depends on T. Where p is 0 (a logit of -inf masks a token) a term of KL is 0.
    """
    log_q = F.log_softmax(student.float(), dim=-1)
    ce = -log_q.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    if temperature != 1.0:
        log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).masked_fill(p == 0, 0).sum(-1)
    return window_means(ce, labels), window_means(kl, labels) * temperature**2


def hidden_state_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over blocks and tokens of ||h_s - h_t||^2 / ||h_t||^2, hidden states (B, T, C) -> (B,);
    over tokens whose label is not IGNORED where labels (B, T) are given.

    FitNets' hint loss (arXiv 1412.6550) after every block, made dimensionless token by token: the
    first tokens' massive activations (arXiv 2402.17762) would own a common denominator.
    """
    if labels is None:
        labels = torch.zeros(teacher[0].shape[:2], device=teacher[0].device)
    terms = [
        window_means(
            (s.float() - t.float()).square().sum(-1)
            / t.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny),
            labels,
        )
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean(dim=0)


# --------------------------------------------------------------------------- large vocabularies


def soft_target_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 logits (N, V) of student and teacher, and labels (N,) -> CE and KL of each token,
    (N,) each, and the derivative (N, V) of alpha CE + (1 - alpha) KL by the student's logits.

    `distillation_terms` has the definitions, but here every label is a token: a caller gives those
    that are IGNORED another, and no weight.

    With p and q the softmax of teacher and student at temperature tau, KL = tau^2 (sum_v p (z_t -
    z_s) / tau - lse(z_t / tau) + lse(z_s / tau)), whose derivative is tau (q - p). Written
    out, this passes over N x V numbers a few times, autograd many. Destroys its arguments.
    """
    rows = torch.arange(len(labels), device=labels.device)
    level = torch.logsumexp(student, -1)
    ce = level - student[rows, labels]
    hard = torch.softmax(student, -1) if alpha and temperature != 1.0 else None
    if temperature != 1.0:
        student, teacher = student.div_(temperature), teacher.div_(temperature)
        level = torch.logsumexp(student, -1)
    p = torch.softmax(teacher, -1)
    q = torch.softmax(student, -1)
    most = p.argmax(-1)  # lse(z_t) from one entry: log p_v = z_v - lse
    level_t = teacher[rows, most] - p[rows, most].log()
    gap = teacher.sub_(student)
    difference = torch.linalg.vecdot(p, gap)
    # -inf and NaN of a token that the teacher masks, where p is 0, count 0. A GPU is not asked.
    if gap.device.type != "cpu" or not bool(torch.isfinite(difference).all()):
        difference = torch.linalg.vecdot(p, gap.nan_to_num_(0.0, torch.inf, 0.0))
    kl = (temperature**2) * (difference - level_t + level)
    soft = (1 - alpha) * temperature
    slope = q if temperature == 1.0 else q.mul_(soft)  # at 1 both terms pull by q
    if hard is not None:
        slope.add_(hard, alpha=alpha)
    slope.add_(p, alpha=-soft)
    slope[rows, labels] -= alpha
    return ce, kl, slope


@dataclass
class TopK:
    """Of each token's next one the K most likely ids, (..., K), and the natural logs of their
    probabilities at the temperature of the loss, (..., K)."""

    ids: torch.Tensor
    log_p: torch.Tensor


def top_k_terms(
    student: torch.Tensor, teacher: TopK, labels: torch.Tensor, alpha: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`soft_target_terms` where K of the teacher's probabilities, at this temperature, are known,
    (N, K): all other tokens count as one, with what is left of either distribution. That KL is
    never more than the whole one, and 0 only where the K and the rest agree.

    With r the rest, its derivative is tau (q_v - p_v) for the K and tau q_v (1 - p_r / q_r) for
    the others. Destroys the student's logits.
    """
    rows = torch.arange(len(labels), device=labels.device)
    log_q = torch.log_softmax(student, -1)
    ce = -log_q[rows, labels]
    hard = log_q.exp() if alpha and temperature != 1.0 else None
    if temperature != 1.0:
        log_q = torch.log_softmax(student.div_(temperature), -1)
    tiny = torch.finfo(torch.float32).tiny
    p = teacher.log_p.exp()
    p_rest = (1 - p.sum(-1)).clamp_min(0)
    gap = (teacher.log_p - log_q.gather(-1, teacher.ids)).nan_to_num_(0.0, torch.inf, 0.0)
    q = log_q.exp_()
    theirs = q.gather(-1, teacher.ids)
    q.scatter_(-1, teacher.ids, 0)
    q_rest = q.sum(-1).clamp_min(tiny)  # no difference of numbers near 1
    of_rest = p_rest * (p_rest.clamp_min(tiny).log() - q_rest.log())
    kl = (temperature**2) * (torch.linalg.vecdot(p, gap) + of_rest)
    soft = (1 - alpha) * temperature
    hard_here = alpha if hard is None else 0.0  # at temperature 1 both terms pull by q
    slope = q.mul_((soft * (1 - p_rest / q_rest) + hard_here).unsqueeze(-1))
    slope.scatter_(-1, teacher.ids, theirs * (soft + hard_here) - soft * p)
    if hard is not None:
        slope.add_(hard, alpha=alpha)
    slope[rows, labels] -= alpha
    return ce, kl, slope


def multiplied(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A head in the dtype in which autocast multiplies it, which would be copied for each chunk."""
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind):
        return weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _ChunkedObjective(torch.autograd.Function):
    """sum_i weights_i (alpha CE_i + (1 - alpha) KL_i) over N tokens, with its gradients taken in
    the forward pass, chunk by chunk, so that logits of one chunk exist at a time (as in Liger,
    arXiv 2410.10989). Also CE and KL of each token, without gradients."""

    @staticmethod
    def forward(ctx, final, weight, bias, student, terms, weights, alpha, chunk):
        needed = ctx.needs_input_grad[:3]
        d_final = torch.empty_like(final) if needed[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None
        ces, kls = [], []
        head = multiplied(weight, bias)
        for start in range(0, len(final), chunk):
            part = slice(start, start + chunk)
            leaves = [
                x.detach().requires_grad_(n) if x is not None else None
                for x, n in zip((final[part], *head), needed, strict=True)
            ]
            with torch.enable_grad():
                logits = student(*leaves)
            ours = logits.detach().to(torch.float32, copy=True)
            ce, kl, slope = terms(part, ours)
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            if wanted:
                slope = slope.mul_(weights[part, None]).to(logits.dtype)
                grads = iter(torch.autograd.grad(logits, wanted, slope))
                if d_final is not None:
                    d_final[part] = next(grads)
                if d_weight is not None:
                    d_weight += next(grads)
                if d_bias is not None:
                    d_bias += next(grads)
            ces.append(ce)
            kls.append(kl)
        ctx.save_for_backward(d_final, d_weight, d_bias)
        ce, kl = torch.cat(ces), torch.cat(kls)
        ctx.mark_non_differentiable(ce, kl)
        return ((alpha * ce + (1 - alpha) * kl) * weights).sum(), ce, kl

    @staticmethod
    def backward(ctx, grad, *_):
        found = [None if x is None else x * grad for x in ctx.saved_tensors]
        return (*found, None, None, None, None, None)


#: Some of the tokens, and the student's logits there -> what `soft_target_terms` returns.
Terms = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def terms_of(
    teacher: LanguageModel,
    target: torch.Tensor | TopK,
    labels: torch.Tensor,
    alpha: float,
    temperature: float,
) -> Terms:
    """By the teacher's logits, or by what is known of them; labels (N,)."""
    if isinstance(target, TopK):
        ids, log_p = target.ids.flatten(0, 1), target.log_p.flatten(0, 1)
        return lambda part, ours: top_k_terms(
            ours, TopK(ids[part], log_p[part]), labels[part], alpha, temperature
        )
    read, head = target.flatten(0, 1), multiplied(*teacher.head_parameters())

    def terms(part: slice, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        theirs = teacher.logits(read[part], *head).to(torch.float32, copy=True)
        return soft_target_terms(ours, theirs, labels[part], alpha, temperature)

    return terms


def chunked_objective(
    student: LanguageModel,
    teacher: LanguageModel,
    final: torch.Tensor,
    target: torch.Tensor | TopK,
    labels: torch.Tensor,
    weights: torch.Tensor,
    alpha: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`distillation_terms` where logits of all tokens would be large.

    final and target: what the heads of student and teacher read, (B, T, C), or of the teacher its
    most likely tokens at this temperature, (B, T, K); labels (B, T), IGNORED where a token does not
    count; weights (B,). Returns mean_b weights_b (alpha CE_b + (1 - alpha) KL_b), with gradients,
    and CE and KL, (B,) each, without. At most LOGITS_AT_ONCE logits of each model exist at a time.
    """
    weight, bias = student.head_parameters()
    counted = labels != IGNORED
    share = weights.float() / (counted.sum(1).clamp_min(1) * len(labels))
    each = (share[:, None] * counted).flatten()
    total, ce, kl = _ChunkedObjective.apply(
        final.flatten(0, 1),
        weight,
        bias,
        student.logits,
        terms_of(teacher, target, labels.clamp_min(0).flatten(), alpha, temperature),
        each,
        alpha,
        max(1, LOGITS_AT_ONCE // student.vocab_size),
    )
    ce, kl = (window_means(x.view(labels.shape), labels) for x in (ce, kl))
    return total, ce, kl


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values.mean() if weights is None else (values * weights).mean()


def distillation_objective(
    student: LanguageModel,
    teacher: LanguageModel,
    final: torch.Tensor,
    target: torch.Tensor | TopK,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    alpha: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(objective, CE (B,), KL (B,)) as of `chunked_objective`, or the same from whole logits where
    these are few and the teacher's are at hand; CE and KL then carry gradients. weights (B,), of
    windows: None for all 1."""
    if isinstance(target, TopK) or labels.numel() * student.vocab_size > LOGITS_AT_ONCE:
        ones = torch.ones(len(labels), device=labels.device) if weights is None else weights
        return chunked_objective(student, teacher, final, target, labels, ones, alpha, temperature)
    with torch.no_grad():
        wanted = teacher.head(target)
    ce, kl = distillation_terms(student.head(final), wanted, labels, temperature)
    return weighted_mean(alpha * ce + (1 - alpha) * kl, weights), ce, kl
