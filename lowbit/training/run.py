"""A training as it goes on, from its first step to the weights that are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from hybrid_optimization import HybridOptimizationManager
from lowbit import UserError, first_line
from lowbit.console import Waiting
from lowbit.events import tell
from lowbit.files.saved_run import Saved
from lowbit.quantization.layers import count_flips, held_layers, snapshot_codes
from lowbit.report import start_line
from lowbit.text.sampler import StratifiedSampler
from lowbit.text.typical import cluster_words
from lowbit.training.baselines import Baseline
from lowbit.training.resume import as_tensors
from lowbit.training.step import Setup, StepResult, make_manager, make_step, quant_strength
from lowbit.training.validation import Best, Reference


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
            with Waiting(f"Clustering {len(s.corpus.train):,} windows of text"):
                labels = clusterer.setup_data_clustering(s.corpus.train)
            self.clusters = s.world.first(lambda: labels)
        if self.manager:
            parts = f" with {o.data_clusters} data clusters" if o.use_clustering else ""
            if o.use_auxiliary_nn:
                parts += " and auxiliary NN guidance" if parts else " with auxiliary NN guidance"
            say(f"Initialized hybrid optimization{parts}")

        quick = s.corpus.held_out(math.ceil(o.quick_tokens / o.seq_len))
        self.start = math.nan
        with Waiting("Validating teacher and student"):
            self.reference = Reference(s.teacher, quick, s.device, s.dtype, s.world)
            if saved is None:
                self.start = self.reference.validate(s.student).loss
        self.best: Best | None = None
        if self.manager and o.qat and o.student_init == "teacher":
            # The start is good: never end behind it.
            self.best = Best(s.student, None if s.world.rank else o.output_dir)
            if saved is None:
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
            self.resumed, self.rolled_back, self._before = self.load(saved)
            self.resumed += 1
            say(f"Resumed at step {self.t} of {s.max_steps}")
        self._tell_start(say)
        self._step = make_step(s, self.optimizer, self.clusters)

    def _tell_start(self, say: Callable[[str], None]) -> None:
        """What validations can be read against. Of a run that was resumed as it was measured;
        nothing to a person where an older checkpoint does not hold it."""
        s, o = self.s, self.s.options
        kind, teacher = self.kind_of_start, self.reference.teacher_loss
        line = start_line(teacher, self.start, kind)
        tell(
            say, "start", [] if math.isnan(self.start) else [line], step=self.t,
            steps=s.max_steps, epochs=o.epochs, teacher_loss=teacher, student_loss=self.start,
            student=kind, column=self.column, unit=s.tokenizer.unit,
            windows=len(self.reference.windows), output_dir=str(o.output_dir),
        )  # fmt: skip

    @property
    def kind_of_start(self) -> str:
        """How the student was made that training begins with."""
        o = self.s.options
        if not o.qat:
            return "not yet rounded"
        if o.student_init == "random":
            return "random weights"
        return "calibrated" if o.calibrate else "rounded"

    @property
    def column(self) -> str:
        """The metric that holds a validation's loss."""
        return "val_loss_quantized" if self.s.options.qat else "val_loss"

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
            row[self.column] = found.loss
            row["val_kl"], row["val_loss_teacher"] = found.kl, self.reference.teacher_loss
            if self.best:
                self.best.see(found.loss)
        row["lr"] = float(np.mean([r.lr for r in results]))
        if self.manager:
            row["lr_multiplier"] = float(np.mean([r.control["lr_multiplier"] for r in results]))
            row["trust_radius"] = self.manager.trust_radius
            row["activation_rate"] = float(np.mean([r.control["active_share"] for r in results]))
            taken = [r.control["update_magnitude"] for r in results]
            asked = [share(t, r.control["efficiency"]) for t, r in zip(taken, results, strict=True)]
            row["step_asked"], row["step_taken"] = float(np.mean(asked)), float(np.mean(taken))
        if o.qat:
            flips = count_flips(s.student, self.codes)
            row["code_flips"] = share(sum(n for n, _ in flips), sum(of for _, of in flips))
            row |= {f"code_flips_block_{i}": share(*pair) for i, pair in enumerate(flips)}
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
        after = self.rows[-1][self.column]
        if self.best:
            behind = not after <= self.best.loss  # or not a number
            if behind and not self.s.world.rank:
                self.best.restore()
            after = self.best.loss
        if not math.isnan(self.start):
            kind = "quantized student" if self.s.options.qat else "student, not yet rounded"
            say(
                f"Validation loss of the {kind}: {self.start:.4f} before training, {after:.4f} "
                "after"
            )
        summary: dict[str, Any] = (
            self.manager.get_summary() if self.manager else {"total_steps": self.t}
        )
        summary["final_loss"] = self.rows[-1]["train_loss"]
        summary |= {"val_loss_before": self.start, "val_loss_after": after}
        summary |= {"keeps_best": self.best is not None, "start_kind": self.kind_of_start}
        if self.manager and self.s.options.use_clustering:
            s = self.s
            summary["cluster_words"] = cluster_words(
                s.corpus.train, self.clusters, s.options.data_clusters, s.tokenizer
            )
        return {**summary, "resumed": self.resumed, "rollbacks": self.rolled_back}

    # ------------------------------------------------------------------------ saved and loaded

    def about(self) -> dict[str, Any]:
        return self.s.about()

    def writers(self) -> dict[str, Callable[[Any], Any]]:
        """What writes each of a checkpoint's files."""
        student = self.s.student.state_dict()
        # What `hold` made of the teacher's embedding it will make again.
        held = {student[f"{name}.weight"].data_ptr() for name, _ in held_layers(self.s.student)}
        weights = {k: v for k, v in student.items() if v.data_ptr() not in held}
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

    def load(self, saved: Saved) -> tuple[int, int, float]:
        """Become what a checkpoint of the same run holds; how often that was resumed and rolled
        back, and its seconds. UserError where it does not fit."""
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
            self.codes = {k: v.to(s.device, copy=True) for k, v in state["codes"].items()}
            self.results = [
                StepResult(**{**r, "kl": r["kl"].numpy().copy()}) for r in state["results"]
            ]
            self.picked = [x.numpy().copy() for x in state["picked"]]
            self.rows = state["rows"]
            self.start = state["start"]
            resumed, rolled_back = (int(n) for n in state["counts"])
            seconds = float(state["seconds"])
            torch.set_rng_state(state["random"])
            for i, x in zip(range(torch.cuda.device_count()), state["random_cuda"], strict=False):
                torch.cuda.set_rng_state(x, i)
            if self.best:
                self.best.read_from(saved.folder / "best.bin", state["best"])
            return resumed, rolled_back, seconds
        except (
            KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError,
        ) as e:  # fmt: skip
            raise UserError(
                f"{saved.folder} does not fit this run: {type(e).__name__}: {first_line(e)}"
            ) from e

    def back_off(self, factor: float) -> None:
        """Go on more carefully, after a rollback."""
        self.rolled_back += 1
        if self.manager:
            self.manager.back_off(factor)


def share(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0


def mean_of(values: np.ndarray) -> float:
    """The mean of those that are numbers; of none, not a number."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
