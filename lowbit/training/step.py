"""One step of a run: teacher, student, losses, gradients, optimiser."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybrid_optimization import (
    SHRINK_BELOW_PRETRAINED,
    ConstrainedOptimizer,
    HybridOptimizationManager,
    HybridTrainingConfig,
)
from lowbit import NotFinite
from lowbit.models.interface import LanguageModel, recomputed
from lowbit.options import WARMUP_FRACTION, default
from lowbit.quantization.layers import rounded_once, strength
from lowbit.text.corpus import Corpus
from lowbit.text.tokenizers import Tokenizer
from lowbit.training.baselines import Baseline
from lowbit.training.losses import (
    TopK,
    distillation_objective,
    hidden_state_loss,
    weighted_mean,
)
from lowbit.training.parallel import ALONE, World
from lowbit.training.resume import settings_of
from lowbit.training.teacher_cache import TeacherCache, most_likely
from lowbit.training.validation import autocast, batch_of, counted_tokens


@dataclass
class Setup:
    """Everything that is fixed before the first step."""

    options: argparse.Namespace
    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    teacher: LanguageModel
    student: LanguageModel
    steps_per_epoch: int
    dtype: torch.dtype | None  # that models compute in; None: float32
    world: World = ALONE
    teacher_print: str = ""  # of the weights as they were loaded
    known: TeacherCache | None = None  # of the teacher's answers, where they are kept
    more_bits: Sequence[str] = ()  # layers of the student that have more than low bits

    @property
    def lr(self) -> float:
        return self.options.lr

    @property
    def max_steps(self) -> int:
        return self.steps_per_epoch * self.options.epochs

    def about(self) -> dict[str, Any]:
        """What must be the same when the run goes on."""
        return {
            "settings": settings_of(self.options),
            "text": self.corpus.fingerprint,
            "teacher": self.teacher_print,
            "more_bits": list(self.more_bits),
        }


def make_manager(s: Setup) -> HybridOptimizationManager:
    o = s.options
    return HybridOptimizationManager(
        HybridTrainingConfig(
            use_quantization=o.qat,
            target_bits=1.58 if o.ternary else 1,
            use_clustering=o.use_clustering,
            data_clusters=o.data_clusters,
            parameter_clusters=o.param_clusters,
            use_auxiliary_nn=o.use_auxiliary_nn,
            use_matrix_geometry=o.use_matrix_geometry,
            use_trust_region=o.use_trust_region,
            initial_trust_radius=o.initial_trust_radius,
            trust_radius_adaptation=o.trust_radius_adaptation,
            base_learning_rate=s.lr,
            step_length=ConstrainedOptimizer.RELATIVE_GAIN
            * default("lr", "hybrid", o.student_init, s.tokenizer.name),
            shrink_below=HybridTrainingConfig.shrink_below
            if o.student_init == "random"
            else SHRINK_BELOW_PRETRAINED,
            max_steps=s.max_steps,
            batch_size=o.batch_size,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            warmup_fraction=WARMUP_FRACTION,
            lr_schedule=o.lr_schedule,
            decay_fraction=o.decay_fraction,
            clustering_warmup_steps=o.clustering_warmup_epochs * s.steps_per_epoch,
            seed=o.seed,
        )
    )


@dataclass
class StepResult:
    loss: float
    ce: float
    kl: np.ndarray  # (B,), nats a token
    lr: float
    seconds: float
    control: dict[str, Any] = field(default_factory=dict)  # the manager's answer, hybrid only


def quant_strength(s: Setup, t: int) -> float:
    """How far step t's forward pass rounds, 0 to 1: linear over --quant_warmup of the run."""
    return min(1.0, t / (s.options.quant_warmup * s.max_steps)) if s.options.quant_warmup else 1.0


def make_step(
    s: Setup, optimizer: HybridOptimizationManager | Baseline, clusters: np.ndarray
) -> Callable[[int, np.ndarray], StepResult]:
    """The function that does one training step on the windows of the given indices."""
    o = s.options
    manager = None if isinstance(optimizer, Baseline) else optimizer
    same_blocks = (
        len(s.student.blocks) == len(s.teacher.blocks)
        and s.student.hidden_size == s.teacher.hidden_size
    )
    hidden_weight = o.hidden_weight if same_blocks else 0.0

    def asked(inputs: torch.Tensor) -> TopK:
        final = s.teacher.features(inputs).final
        return most_likely(s.teacher, final, o.cache_teacher, o.temperature)

    def one_pass(
        indices: np.ndarray, windows: np.ndarray, weights: np.ndarray
    ) -> tuple[torch.Tensor, ...]:
        """Add the gradients of the mean of these windows' objectives times their weights (B,).
        Returns each window's objective, cross-entropy and KL, (B,) each."""
        inputs, labels = batch_of(windows, s.device)
        factors = torch.from_numpy(weights).float().to(s.device)

        with autocast(s.device, s.dtype):
            target: torch.Tensor | TopK
            with torch.no_grad():
                if s.known:
                    target, hints = s.known.of(indices, inputs, asked), []
                else:
                    found = s.teacher.features(inputs)
                    target, hints = found.final, found.hidden_states
            with recomputed(s.student.blocks if o.activation_checkpointing else ()):
                out = s.student.features(inputs)
            objective, ce, kl = distillation_objective(
                s.student,
                s.teacher,
                out.final,
                target,
                labels,
                factors,
                o.alpha,
                o.temperature,
            )
        each = (o.alpha * ce + (1 - o.alpha) * kl).detach()
        if hidden_weight:
            hint = hidden_state_loss(out.hidden_states, hints, labels)
            objective = objective + hidden_weight * weighted_mean(hint, factors)
            each = each + hidden_weight * hint.detach()
        objective.backward()
        return each, ce.detach(), kl.detach().float()

    def step(t: int, indices: np.ndarray) -> StepResult:
        started = time.perf_counter()
        windows = s.corpus.take(indices)
        counts = counted_tokens(windows)
        share = counts / max(1, counts.sum())  # every counted token weighs the same
        weights = share.copy()
        if manager and manager.config.use_clustering:
            weights *= manager.cluster_rates(t)[clusters[indices]]
        # Of several processes each has its part of the sum that the batch's mean is.
        mine, own = s.world.part(len(indices))
        s.student.zero_grad(set_to_none=True)
        found = []
        with strength(s.student, quant_strength(s, t)), rounded_once(s.student):
            for i in range(mine.start, mine.stop, o.micro_batch_size):
                part = slice(i, min(i + o.micro_batch_size, mine.stop))
                factors = weights[part] * len(weights[part]) * own
                found.append(one_pass(indices[part], windows[part], factors))
        here = torch.stack([torch.cat(x) for x in zip(*found, strict=True)])
        each, ce, kl = s.world.gather(here, len(indices))
        s.world.sum_up([p.grad for p in s.student.parameters() if p.grad is not None])
        if o.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(s.student.parameters(), o.max_grad_norm)

        # What the host reads, it reads after it has launched the step: reading waits for a GPU.
        of_tokens = torch.from_numpy(share * len(share)).float().to(s.device)
        mean = weighted_mean(each, of_tokens)
        control: dict[str, Any] = {}
        if isinstance(optimizer, Baseline):
            lr = optimizer.step(t)
        else:
            control = optimizer.optimization_step(s.student, mean, None, cluster_id=-1, step=t)
            lr = control["learning_rate"]
        loss, kls = float(mean), kl.cpu().numpy()
        kls[counts == 0] = np.nan
        if manager:
            manager.observe_clusters(clusters[indices], kls)
        elif not math.isfinite(loss):
            raise NotFinite("the loss is not finite; use a smaller --lr, or --hybrid")
        seconds = time.perf_counter() - started
        return StepResult(loss, float(weighted_mean(ce, of_tokens)), kls, lr, seconds, control)

    return step
