"""Distil a teacher language model into a ternary (1.58-bit) or 1-bit student.

    python distillation.py --hybrid --ternary --qat --epochs 20 --save_metrics

The file reads like the run: options, text, models, clusters, the training step, the run, files.
What the run is made of is in ``lowbit/``; the optimiser in ``hybrid_optimization.py``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_optimization import (
    ConstrainedOptimizer,
    HybridOptimizationManager,
    HybridTrainingConfig,
)
from lowbit import RunFailed, UserError, first_line
from lowbit.console import Printer, progress_bar, sayable
from lowbit.export import export
from lowbit.extras import require
from lowbit.files.atomic import atomic_write, prepare_folder
from lowbit.files.checkpoint import save_float32
from lowbit.files.gguf_file import check_exportable
from lowbit.files.packed import load_packed, save_packed
from lowbit.files.saved_run import Checkpoints, Saved, locked
from lowbit.generate import generate
from lowbit.models.decoder import CausalLM
from lowbit.models.interface import LanguageModel, recomputed
from lowbit.models.student import make_student
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import TransformersLM, hold_linears, save_folder
from lowbit.options import (
    WARMUP_FRACTION,
    default,
    parse_options,
)
from lowbit.quantization.layers import (
    count_flips,
    latent,
    rounded_once,
    snapshot_codes,
    strength,
)
from lowbit.report import epoch_line, model_card, plot_metrics, summary_lines, write_csv
from lowbit.signals import Stop, Stopped
from lowbit.text.corpus import Corpus, load_corpus
from lowbit.text.sampler import StratifiedSampler
from lowbit.text.tokenizers import Tokenizer
from lowbit.training.baselines import Baseline
from lowbit.training.losses import distillation_objective, hidden_state_loss, weighted_mean
from lowbit.training.parallel import ALONE, Lost, World
from lowbit.training.preparation import (
    calibrate_student,
    choose_device,
    choose_dtype,
    kept_denormals,
    output_paths,
    own_text,
    plan,
    quantize,
    settle,
)
from lowbit.training.resume import (
    MAX_CONSECUTIVE_SKIPS,
    Finished,
    Keeper,
    as_tensors,
    print_of,
    refuse_others,
    refuse_unfinished,
    resume_options,
    settings_of,
)
from lowbit.training.validation import (
    Best,
    Reference,
    Validation,
    autocast,
    batch_of,
    counted_tokens,
    pick_windows,
)

SAMPLE_PROMPT = {"byte": "Return the ", "token": "Return the"}
SAMPLE_TOKENS = {"byte": 200, "token": 60}

# ------------------------------------------------------------------------------ text and models


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
            "teacher": print_of(self.teacher),
        }


def set_up(
    o: argparse.Namespace,
    say: Callable[[str], None] = lambda line: None,
    *,
    claim: Callable[[], None] = lambda: None,
    calibrates: bool = True,
    world: World = ALONE,
) -> Setup:
    """Load and make what a run needs. claim: called when the output folder is there and before
    anything is written to it; calibrates: False where the student's weights are to be loaded;
    world: the processes that do the same."""
    device = world.device(choose_device(o.device))
    torch.manual_seed(o.seed)
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    teacher, tokenizer = load_teacher(o.teacher)
    settle(o, teacher, tokenizer)
    if o.export:
        require("gguf", "gguf")
        if o.student_size != "same":
            raise UserError("--export gguf: a --student_size of ours has no form in GGUF")
        check_exportable(teacher.describe(), tokenizer.describe())
    limit = teacher.max_positions
    if o.seq_len > limit:
        raise UserError(f"--seq_len {o.seq_len}: the teacher reads at most {limit} tokens")
    if o.batch_size < world.count:
        raise UserError(f"--batch_size {o.batch_size}: fewer windows than {world.count} processes")

    def claim_folders() -> None:
        prepare_folder(o.output_dir)
        claim()
        for kind, path in output_paths(o, teacher).items():
            prepare_folder(path.parent, "--metrics_out" if o.metrics_out else "--output_dir")
            if kind == "transformers":
                prepare_folder(path)
            elif path.is_dir():
                raise UserError(f"cannot write {path}: it is a folder")

    def read_text() -> Corpus:
        paths = [own_text(o, teacher, tokenizer) if x == "self" else x for x in o.data]
        return load_corpus(paths, o.seq_len, tokenizer)

    world.first(claim_folders)
    teacher = teacher.to(device)
    corpus = world.after_first(read_text)
    n = len(corpus.train)
    if o.batch_size > n:
        raise UserError(f"--batch_size {o.batch_size}: the text has only {n} training windows")
    if o.hybrid and o.use_clustering and o.data_clusters > n:
        raise UserError(f"--data_clusters {o.data_clusters}: the text has only {n} windows")
    if o.samples_per_epoch is None:
        o.samples_per_epoch = min(o.steps_per_epoch * o.batch_size, n)
    if o.samples_per_epoch > n:
        raise UserError(f"--samples_per_epoch {o.samples_per_epoch}: the text has {n} windows")
    takes = plan(o, teacher, corpus, world)
    if takes:
        say(takes.line())
    dtype = choose_dtype(device, teacher)
    student = make_student(o, teacher).to(device)
    if o.qat:
        same = student.describe() == teacher.describe()
        calibrates = calibrates and o.calibrate
        original = teacher if same or not calibrates else copy.deepcopy(student)
        quantize(o, student)
        if calibrates:
            calibrate_student(o, student, original, corpus)
    world.hand_out([*student.parameters(), *student.buffers()])
    if isinstance(teacher, TransformersLM) and dtype:
        hold_linears(teacher, dtype)
    per_epoch = math.ceil((o.samples_per_epoch or n) / o.batch_size)
    s = Setup(o, device, tokenizer, corpus, teacher, student, per_epoch, dtype, world)
    if world.count > 1 and world.first(s.about) != s.about():
        raise UserError("the processes read another teacher or text, or got other flags")
    return s


# ------------------------------------------------------------------------------- the optimiser


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
            * default("lr", "hybrid", o.student_init),
            max_steps=s.max_steps,
            batch_size=o.batch_size,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            warmup_fraction=WARMUP_FRACTION,
            lr_schedule=o.lr_schedule,
            clustering_warmup_steps=o.clustering_warmup_epochs * s.steps_per_epoch,
            seed=o.seed,
        )
    )


# ------------------------------------------------------------------------------- training step


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

    def one_pass(windows: np.ndarray, weights: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Add the gradients of the mean of these windows' objectives times their weights (B,).
        Returns each window's objective, cross-entropy and KL, (B,) each."""
        inputs, labels = batch_of(windows, s.device)
        factors = torch.from_numpy(weights).float().to(s.device)

        with autocast(s.device, s.dtype):
            with torch.no_grad():
                target = s.teacher.features(inputs)
            with recomputed(s.student.blocks if o.activation_checkpointing else ()):
                out = s.student.features(inputs)
            objective, ce, kl = distillation_objective(
                s.student,
                s.teacher,
                out.final,
                target.final,
                labels,
                factors,
                o.alpha,
                o.temperature,
            )
        each = (o.alpha * ce + (1 - o.alpha) * kl).detach()
        if hidden_weight:
            hint = hidden_state_loss(out.hidden_states, target.hidden_states, labels)
            objective = objective + hidden_weight * weighted_mean(hint, factors)
            each = each + hidden_weight * hint.detach()
        objective.backward()
        return each, ce.detach(), kl.detach().float()

    def step(t: int, indices: np.ndarray) -> StepResult:
        started = time.perf_counter()
        windows = s.corpus.train[indices]
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
                found.append(one_pass(windows[part], factors))
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
            raise RunFailed("the loss is not finite; use a smaller --lr, or --hybrid")
        seconds = time.perf_counter() - started
        return StepResult(loss, float(weighted_mean(ce, of_tokens)), kls, lr, seconds, control)

    return step


# ------------------------------------------------------------------------------------- the run


class Run:
    """A training as it goes on: all that its next step depends on, and what it has to tell.

    A checkpoint holds the student's weights, the optimiser (with the auxiliary network, clusters
    and regions), the sampler, random states, the metrics and the best weights seen.
    """

    def __init__(
        self,
        s: Setup,
        say: Callable[[str], None],
        *,
        cluster_batches: bool = False,
        saved: Saved | None = None,
    ) -> None:
        o = s.options
        self.s, self.t = s, 0
        self.clusters = self.everything = np.zeros(len(s.corpus.train), dtype=int)
        self.manager = make_manager(s) if o.hybrid else None
        clustered = cluster_batches or (self.manager is not None and o.use_clustering)
        if clustered and saved is None:
            clusterer = self.manager or make_manager(s)
            labels = clusterer.setup_data_clustering(s.corpus.train)
            self.clusters = s.world.first(lambda: labels)
        if self.manager:
            parts = f" with {o.data_clusters} data clusters" if o.use_clustering else ""
            if o.use_auxiliary_nn:
                parts += " and auxiliary NN guidance" if parts else " with auxiliary NN guidance"
            say(f"Initialized hybrid optimization{parts}")

        quick = pick_windows(s.corpus.validation, math.ceil(o.quick_tokens / o.seq_len))
        self.reference = Reference(s.teacher, quick, s.device, s.dtype, s.world)
        self.best: Best | None = None
        self.start = math.nan
        if self.manager and o.qat and o.student_init == "teacher":
            # The start is good: never end behind it.
            self.best = Best(s.student, None if s.world.rank else o.output_dir)
            if saved is None:
                self.start = self.reference.validate(s.student).loss
                self.best.see(self.start)
        baseline = None if self.manager else Baseline(o, s.student, s.max_steps)
        self.baseline = baseline
        self.optimizer: HybridOptimizationManager | Baseline = self.manager or baseline  # type: ignore
        self._sample_by(self.everything)
        self.codes = snapshot_codes(s.student) if saved is None else {}
        self.results: list[StepResult] = []  # of the epoch so far
        self.picked: list[np.ndarray] = []  # its windows
        self.rows: list[dict[str, Any]] = []
        self.resumed = self.rolled_back = 0
        self._before = 0.0  # seconds, of the processes before this one
        self._started = time.perf_counter()
        if saved is not None:
            self.load(saved)
            self.resumed += 1
            say(f"Resumed at step {self.t} of {s.max_steps}")
        self._step = make_step(s, self.optimizer, self.clusters)

    def _sample_by(self, labels: np.ndarray) -> None:
        self.balanced = labels is self.clusters and bool(labels.any())
        self.sampler = StratifiedSampler(labels, self.s.options.batch_size, self.s.options.seed)

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    @property
    def skips(self) -> int:
        return self.manager.consecutive_skips if self.manager else 0

    def step(self) -> StepResult:
        """One training step."""
        s, o = self.s, self.s.options
        epoch, place = divmod(self.t, s.steps_per_epoch)
        if not place and epoch == o.clustering_warmup_epochs and self.clusters.any():
            self._sample_by(self.clusters)
        left = (o.samples_per_epoch or len(s.corpus.train)) - place * o.batch_size
        indices = self.sampler.next_batch(min(o.batch_size, left))
        self.results.append(self._step(self.t, indices))
        self.picked.append(indices)
        self.t += 1
        return self.results[-1]

    def end_epoch(self) -> dict[str, Any]:
        """Validate where it is due; the epoch's metrics, a row of the CSV."""
        s, o, results = self.s, self.s.options, self.results
        epoch = self.t // s.steps_per_epoch - 1
        finite = [r for r in results if math.isfinite(r.loss)]
        row: dict[str, Any] = {"epoch": epoch, "step": self.t}
        row["train_loss"] = float(np.mean([r.loss for r in finite])) if finite else math.nan
        row["train_ce"] = float(np.mean([r.ce for r in finite])) if finite else math.nan
        kl = np.concatenate([r.kl for r in results])
        row["train_kl"] = mean_of(kl)
        if (epoch + 1) % o.eval_every == 0 or epoch + 1 == o.epochs:
            with self.baseline.averaged() if self.baseline else nullcontext():
                found = self.reference.validate(s.student)
            row["val_loss_quantized" if o.qat else "val_loss"] = found.loss
            row["val_kl"], row["val_loss_teacher"] = found.kl, self.reference.teacher_loss
            if self.best:
                self.best.see(found.loss)
        row["lr"] = float(np.mean([r.lr for r in results]))
        if self.manager:
            row["lr_multiplier"] = float(np.mean([r.control["lr_multiplier"] for r in results]))
            row["trust_radius"] = self.manager.trust_radius
            row["activation_rate"] = float(np.mean([r.control["active_share"] for r in results]))
        if o.qat:
            row["code_flips"] = count_flips(s.student, self.codes)
            row["quant_strength"] = quant_strength(s, self.t - 1)
        if self.manager and o.use_clustering:
            where = self.clusters[np.concatenate(self.picked)]
            for k in range(o.data_clusters):
                mine = kl[where == k]
                row[f"kl_cluster_{k}"] = mean_of(mine) if len(mine) else ""
        row["median_step_seconds"] = float(np.median([r.seconds for r in results]))
        row["seconds"] = self.seconds
        self.rows.append(row)
        self.results, self.picked = [], []
        return row

    def finish(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Give the student the weights to be kept, of several processes the first's; the run's
        summary."""
        if self.baseline:
            self.baseline.use_averaged()
        if self.best:
            if self.rows[-1]["val_loss_quantized"] > self.best.loss and not self.s.world.rank:
                self.best.restore()
            say(
                f"Validation loss of the quantized student: {self.start:.4f} before training, "
                f"{self.best.loss:.4f} after"
            )
        summary = self.manager.get_summary() if self.manager else {"total_steps": self.t}
        summary["final_loss"] = self.rows[-1]["train_loss"]
        return {**summary, "resumed": self.resumed, "rollbacks": self.rolled_back}

    # ------------------------------------------------------------------------ saved and loaded

    def about(self) -> dict[str, Any]:
        return self.s.about()

    def writers(self) -> dict[str, Callable[[Any], Any]]:
        """What writes each of a checkpoint's files."""
        student = self.s.student
        frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
        weights = {k: v for k, v in student.state_dict().items() if v.data_ptr() not in frozen}
        state = {
            "t": self.t,
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "balanced": self.balanced,
            "clusters": self.clusters,
            "codes": self.codes,
            "results": [vars(r) for r in self.results],
            "picked": self.picked,
            "rows": self.rows,
            "start": self.start,
            "best": self.best.loss if self.best else math.nan,
            "counts": [self.resumed, self.rolled_back],
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.s.device.type == "cuda" else [],
        }
        found: dict[str, Callable[[Any], Any]] = {
            "student.pt": lambda f: torch.save(weights, f),
            "state.pt": lambda f: torch.save(as_tensors(state), f),
        }
        if self.best:
            found["best.bin"] = self.best.write_to
        return found

    def load(self, saved: Saved) -> None:
        """Become what a checkpoint of the same run holds. UserError where it does not fit."""
        s = self.s
        weights, state = saved.load("student.pt"), saved.load("state.pt")
        try:
            unknown = s.student.load_state_dict(weights, strict=False).unexpected_keys
            if unknown:
                raise KeyError(unknown[0])
            self.t = int(state["t"])
            if self.manager:
                self.manager.load_state_dict(state["optimizer"], s.student)
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            self.clusters = state["clusters"].numpy().copy()
            self._sample_by(self.clusters if state["balanced"] else self.everything)
            self.sampler.load_state_dict(state["sampler"])
            self.codes = {k: v.clone() for k, v in state["codes"].items()}
            self.results = [
                StepResult(**{**r, "kl": r["kl"].numpy().copy()}) for r in state["results"]
            ]
            self.picked = [x.numpy().copy() for x in state["picked"]]
            self.rows = state["rows"]
            self.start = state["start"]
            self.resumed, self.rolled_back = state["counts"]
            self._before, self._started = state["seconds"], time.perf_counter()
            torch.set_rng_state(state["random"])
            for i, x in zip(range(torch.cuda.device_count()), state["random_cuda"], strict=False):
                torch.cuda.set_rng_state(x, i)
            if self.best:
                self.best.read_from(saved.folder / "best.bin", state["best"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as e:
            raise UserError(
                f"{saved.folder} does not fit this run: {type(e).__name__}: {first_line(e)}"
            ) from e
        self._step = make_step(s, self.optimizer, self.clusters)

    def back_off(self, factor: float) -> None:
        """Go on more carefully, after a rollback."""
        self.rolled_back += 1
        if self.manager:
            self.manager.back_off(factor)


def mean_of(values: np.ndarray) -> float:
    """The mean of those that are numbers; of none, not a number."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def train(
    s: Setup,
    say: Callable[[str], None],
    *,
    cluster_batches: bool = False,
    bar: bool = True,
    after_epoch: Callable[[float], None] = lambda share: None,
    keeper: Keeper | None = None,
    saved: Saved | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All epochs. Returns the metric rows (one an epoch) and the summary.

    cluster_batches gives a run without --hybrid the cluster-balanced batches (for comparisons);
    bar shows progress on stderr; after_epoch is told what share of the run is done; keeper saves
    the run as it goes on; saved: a checkpoint to go on from.
    """
    run = Run(s, say, cluster_batches=cluster_batches, saved=saved)
    if keeper and saved is None:
        keeper.start(run)
    with (
        progress_bar(total=s.max_steps, initial=run.t, unit="step", disable=not bar) as progress,
        keeper.stop.deferred() if keeper else nullcontext(),
    ):
        while run.t < s.max_steps:
            result = run.step()
            progress.update()
            if run.manager and result.control["skipped"]:
                if keeper:
                    keeper.after_skip(run, result.loss, result.control["gradient_magnitude"])
                    progress.n = run.t
                elif run.skips >= MAX_CONSECUTIVE_SKIPS:
                    raise RunFailed(f"{run.skips} steps in a row were not finite")
            if run.results and run.t % s.steps_per_epoch == 0:
                row = run.end_epoch()
                say(epoch_line(row["epoch"], row))
                after_epoch(run.t / s.max_steps)
            if keeper:
                keeper.after_step(run)
    summary = run.finish(say)
    return run.rows, summary


def save(s: Setup, rows: list[dict[str, Any]], say: Callable[[str], None]) -> UserError | None:
    """Write the student's files, then measure the quantised student as read back from its file.
    Returns why its export failed, where all else is written."""
    o = s.options
    s.student.zero_grad(set_to_none=True)
    gc.collect()  # moments, which cycles hold: files need the memory
    paths = output_paths(o, s.student)
    windows = pick_windows(s.corpus.validation, math.ceil(o.final_tokens / o.seq_len))
    reference = Reference(s.teacher, windows, s.device, s.dtype)
    with latent(s.student):
        full = reference.validate(s.student)
    vocabulary = s.tokenizer.describe()
    if not math.isfinite(full.loss):
        raise RunFailed("the student's loss is not finite; use a smaller --lr, or --hybrid")
    if isinstance(s.student, CausalLM):
        state = {
            k: v
            for k, v in s.student.state_dict().items()
            if not k.endswith(("weight_scale", "base_scale"))
        }
        save_float32(paths["float32"], s.student.config, state, vocabulary)
    if not o.qat:
        unrounded = copy.deepcopy(s.student)
        quantize(o, s.student)
        if o.calibrate:
            calibrate_student(o, s.student, unrounded, s.corpus)
    about = {"text": s.corpus.fingerprint, "steps": s.max_steps, "seed": o.seed}
    size = save_packed(paths["packed"], s.student, vocabulary, notes=about)
    student = load_packed(paths["packed"])[0].to(s.device).eval()
    if isinstance(student, TransformersLM):
        save_folder(paths["transformers"], student, vocabulary["files"])
    notes: list[str] = []  # to be told after the losses
    problem: UserError | None = None
    if "gguf" in paths:
        try:
            notes += export(str(paths["packed"]), "gguf", str(paths["gguf"]), None)
        except UserError as e:  # all else is written and told first
            problem = e
            del paths["gguf"]
    if o.save_metrics:
        write_csv(paths["metrics"], rows)
        try:
            plot_metrics(paths["picture"], rows, s.tokenizer.unit)
        except ImportError:
            del paths["picture"]
            notes.append("No picture of the metrics: pip install matplotlib")
    quantized = reference.validate(student)
    teacher, unit = reference.teacher_loss, s.tokenizer.unit

    def share(x: Validation) -> str:
        return f"{100 * (x.loss / teacher - 1):+.1f}% against the teacher"

    measured_on = f"{len(windows)} windows of {o.seq_len} held-out {unit}s"
    if isinstance(student, TransformersLM):
        losses = {
            "teacher": f"{teacher:.4f}",
            "student": f"{quantized.loss:.4f} +- {quantized.error:.4f}",
            "KL to the teacher": f"{quantized.kl:.4f}",
        }
        name, print_ = Path(o.teacher).name, s.corpus.fingerprint
        card = model_card(name, o.mode, s.max_steps, print_, losses, measured_on)
        atomic_write(paths["transformers"] / "README.md", lambda f: f.write(sayable(card).encode()))
    say(f"Validation loss, nats a {unit} ({measured_on}):")
    say(f"  teacher              {teacher:.4f}")
    say(
        f"  student, quantized   {quantized.loss:.4f} +- {quantized.error:.4f} "
        f"({share(quantized)}; KL to the teacher {quantized.kl:.4f})"
    )
    say(f"  student, latent fp32 {full.loss:.4f} ({share(full)})")
    say(
        f"Size: {size.file_bytes:,} bytes packed, {size.float32_bytes:,} in float32: "
        f"{size.ratio:.1f}x smaller; {size.linear_bits:.3f} bits a linear weight, scales "
        f"included; the embedding is held in {o.embedding_bits} bits"
    )
    if isinstance(student, TransformersLM):
        first, last = o.blocks_8bit
        parts = [f"{k} {n:,} weights, {b:,} bytes" for k, (n, b) in size.parts.items()]
        held = (
            "int8: embedding, head, " if o.embedding_bits == 8 else "int4: embedding, head; int8: "
        )
        say(f"Stored as: {'; '.join(parts)}; {held}{first} + {last} blocks")
    prompt = SAMPLE_PROMPT[unit]
    ids = generate(student, s.tokenizer.encode(prompt), SAMPLE_TOKENS[unit], seed=o.seed)
    say(f"Sample: {prompt}{s.tokenizer.decode(ids)}")
    say(
        f"Text: {s.corpus.train_tokens + s.corpus.validation_tokens:,} {unit}s, "
        f"fingerprint {s.corpus.fingerprint}"
    )
    for line in [*notes, *(f"Wrote {path}" for path in paths.values())]:
        say(line)
    return problem


def run(
    argv: Sequence[str], say: Printer, stop: Stop, at: Callable[[str], None], world: World
) -> None:
    """The whole command. ``at`` is told what a signal, or a full disk, leaves behind from then."""
    world.join(stop)
    o, saved = parse_options(argv), None
    if o.resume is not None:
        o, saved = world.first(lambda: resume_options(o, argv))
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(locked(o.output_dir))
            if saved is None:
                refuse_unfinished(o.output_dir)

        setup = set_up(o, say, claim=claim, calibrates=saved is None, world=world)
        if saved:
            refuse_others(saved, setup.about())
            argv = saved.about["command"]
        keeper = Keeper(
            Checkpoints(o.output_dir, o.keep),
            stop,
            setup.steps_per_epoch,
            setup.max_steps,
            argv,
            every=o.save_every,
            say=say,
            world=world,
        )
        at(f"go on from the newest checkpoint with --resume {o.output_dir}")
        try:
            rows, summary = train(setup, say, keeper=keeper, saved=saved)
        except RunFailed:
            if not keeper.checkpoints.begun:  # nothing to go on with
                keeper.checkpoints.remove()
            raise
        for line in summary_lines(summary, hybrid=o.hybrid):
            say(line)
        at(f"write the student's files with --resume {o.output_dir}")

        def save_all() -> UserError | None:
            problem = save(setup, rows, say)
            keeper.checkpoints.remove()
            return problem

        problem = world.first(save_all)
    if problem:
        raise problem


@kept_denormals()
def main(argv: list[str] | None = None) -> int:
    left = "no file was written"

    def at(what: str) -> None:
        nonlocal left
        left = what

    world = World.of(os.environ)
    with world.quiet():
        say = Printer()
        try:
            with Stop() as stop:
                run(sys.argv[1:] if argv is None else argv, say, stop, at, world)
        except Finished as e:
            say(str(e))
        except Lost as e:
            return world.leave(e.code, f"error: {e}; {left}", lost=True)
        except UserError as e:
            return world.leave(e.code, f"error: {e}")
        except OSError as e:
            line = f"error: cannot write {e.filename or ''}: {e.strerror or e}; {left}"
            return world.leave(1, line)
        except (Stopped, KeyboardInterrupt) as e:
            line = "" if getattr(e, "told", False) else f"interrupted; {left}"
            return world.leave(getattr(e, "code", 130), line)
        except SystemExit as e:  # argparse has told why
            world.leave(int(e.code or 0))
            raise
        return world.leave(0)


if __name__ == "__main__":
    sys.exit(main())
