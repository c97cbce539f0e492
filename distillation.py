"""Distil a teacher language model into a ternary (1.58-bit) or 1-bit student.

    python distillation.py --hybrid --ternary --qat --epochs 20 --save_metrics

The file reads like the run: options, text, models, training, files. A step is in
``lowbit/training/step.py``, what goes on from step to step in ``lowbit/training/run.py``; the
optimiser is ``hybrid_optimization.py``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import lowbit  # noqa: F401  (before PyTorch: how long threads that wait stay awake)

if __name__ == "__main__":  # what is imported next may take seconds, from a cold disk many
    from lowbit.console import Waiting, draws

    loading = ExitStack()
    if draws() and os.environ.get("RANK", "0") == "0" and not {"--quiet", "--json"} & {*sys.argv}:
        loading.enter_context(Waiting("Loading PyTorch"))

import torch

from lowbit import NotFinite, RunFailed, UserError
from lowbit.console import Waiting, hushed, progress_bar
from lowbit.events import Reporter, tell
from lowbit.export import export
from lowbit.extras import require
from lowbit.files.atomic import prepare_folder
from lowbit.files.checkpoint import save_float32
from lowbit.files.gguf_file import check_exportable
from lowbit.files.packed import load_packed, save_packed
from lowbit.files.saved_run import Checkpoints, Saved, locked
from lowbit.generate import generate
from lowbit.logs import LogOf, new_id, require_logs
from lowbit.models.decoder import CausalLM
from lowbit.models.student import make_student
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import TransformersLM, hold_linears, save_folder
from lowbit.options import parse_options
from lowbit.picture import Scenery, plot_metrics
from lowbit.quantization.layers import bits_of_blocks, fix_high_bits, latent
from lowbit.report import (
    epoch_line,
    summary_lines,
    talk_command,
    worse_line,
    write_csv,
)
from lowbit.signals import Stop, Stopped
from lowbit.text.corpus import Corpus, load_corpus
from lowbit.text.tokenizers import TeacherTokenizer, opened
from lowbit.training.parallel import ALONE, Lost, World
from lowbit.training.preparation import (
    cache_of,
    calibrate_student,
    choose_device,
    choose_dtype,
    choose_more_bits,
    kept_denormals,
    more_bits_line,
    output_paths,
    own_text,
    plan,
    quantize,
    settle,
)
from lowbit.training.results import tell_results, write_card
from lowbit.training.resume import (
    MAX_CONSECUTIVE_SKIPS,
    Finished,
    Keeper,
    print_of,
    refuse_others,
    refuse_unfinished,
    resume_options,
)
from lowbit.training.run import Run
from lowbit.training.step import Setup
from lowbit.training.validation import Reference

SAMPLE_PROMPT = {"byte": "Return the ", "token": "Return the"}
SAMPLE_TOKENS = {"byte": 200, "token": 60}

# ------------------------------------------------------------------------------ text and models


def set_up(
    o: argparse.Namespace,
    say: Callable[[str], None] = lambda line: None,
    *,
    claim: Callable[[], None] = lambda: None,
    more: Collection[str] | None = None,
    world: World = ALONE,
) -> Setup:
    """Load and make what a run needs. claim: called when the output folder is there and before
    anything is written to it; more: of a run whose weights are to be loaded, names of the layers
    that have more bits; world: the processes that do the same."""
    require_logs(o)
    device = world.device(choose_device(o.device))
    torch.manual_seed(o.seed)
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    with Waiting("Loading the teacher"):
        teacher, tokenizer = load_teacher(o.teacher)
    fingerprint = print_of(teacher)
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
        with Waiting("Reading the text" if paths else "Reading the standard library's text"):
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
    known = cache_of(o, teacher, corpus, fingerprint) if o.cache_teacher else None
    dtype = choose_dtype(device, teacher)
    student = make_student(o, teacher).to(device)
    if o.qat:
        same = student.describe() == teacher.describe()
        calibrates = o.calibrate and more is None
        if more is None:
            more = world.first(lambda: choose_more_bits(o, student, corpus))
            if o.target_bits is not None:
                say(more_bits_line(o, student, more))
        original = teacher if same or not calibrates else copy.deepcopy(student)
        quantize(o, student, more)
        if calibrates:
            calibrate_student(o, student, original, corpus)
        if o.freeze_high_bits:
            fix_high_bits(student)
    world.hand_out([*student.parameters(), *student.buffers()])
    if isinstance(teacher, TransformersLM) and dtype:
        hold_linears(teacher, dtype)
    per_epoch = math.ceil((o.samples_per_epoch or n) / o.batch_size)
    s = Setup(
        o, device, tokenizer, corpus, teacher, student, per_epoch, dtype, world, fingerprint,
        known, sorted(more or ()),
    )  # fmt: skip
    if world.count > 1 and world.first(s.about) != s.about():
        raise UserError("the processes read another teacher or text, or got other flags")
    return s


# ------------------------------------------------------------------------------------- the run


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
    if keeper and not (saved and keeper.checkpoints.is_newest(saved)):
        keeper.start(run)
    with (
        progress_bar(
            total=s.max_steps, initial=run.t, desc="Training", unit="step", disable=not bar
        ) as progress,
        keeper.world.stop.deferred() if keeper else nullcontext(),
    ):
        progress.set_postfix_str(f"validation {run.start:.4f}", refresh=False)
        while run.t < s.max_steps:
            result = run.step()
            progress.update()
            tell(say, "step", step=run.t, loss=result.loss, ce=result.ce, lr=result.lr)
            if run.manager and result.control["skipped"]:
                if keeper:
                    keeper.after_skip(run, result.loss, result.control["gradient_magnitude"])
                    progress.n = run.t
                elif run.skips >= MAX_CONSECUTIVE_SKIPS:
                    raise RunFailed(f"{run.skips} steps in a row were not finite")
            if run.results and run.t % s.steps_per_epoch == 0:
                row = run.end_epoch()
                if run.column in row:
                    progress.set_postfix_str(f"validation {row[run.column]:.4f}", refresh=False)
                tell(say, "epoch", [epoch_line(row["epoch"], row)], **row)
                after_epoch(run.t / s.max_steps)
            if keeper:
                keeper.after_step(run)
    if keeper:
        keeper.end()
    summary = run.finish(say)
    return run.rows, summary


def final_reference(s: Setup) -> Reference:
    """The teacher on the held-out windows that a finished student is measured on."""
    windows = s.corpus.held_out(math.ceil(s.options.final_tokens / s.options.seq_len))
    return Reference(s.teacher, windows, s.device, s.dtype)


def save(
    s: Setup, rows: list[dict[str, Any]], summary: dict[str, Any], say: Callable[[str], None]
) -> UserError | None:
    """Write the student's files, then measure the quantised student as read back from its file,
    which takes the trained one's place. Returns why its export failed, where all else is
    written."""
    o = s.options
    s.student.zero_grad(set_to_none=True)
    gc.collect()  # moments, which cycles hold: files need the memory
    paths = output_paths(o, s.student)
    reference = final_reference(s)
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
        round_at_end(s, say)
    about = {"text": s.corpus.fingerprint, "steps": s.max_steps, "seed": o.seed}
    size = save_packed(paths["packed"], s.student, vocabulary, notes=about)
    bits = bits_of_blocks(s.student)
    s.student.to("meta")  # its memory is needed to read, and to write, what the file holds
    s.student = student = load_packed(paths["packed"])[0].to(s.device).eval()
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
            scenery = Scenery(
                s.tokenizer.unit, summary["val_loss_before"], summary["start_kind"],
                summary.get("cluster_words", ()), bits,
            )  # fmt: skip
            plot_metrics(paths["picture"], rows, scenery)
        except ImportError:
            del paths["picture"]
            notes.append("No picture of the metrics: pip install matplotlib")
    quantized = reference.validate(student)
    if isinstance(student, TransformersLM):
        write_card(s, paths["transformers"], quantized, reference)
    tell_results(s, full, quantized, reference, size, say)
    unit = s.tokenizer.unit
    prompt = SAMPLE_PROMPT[unit]
    ids = generate(student, opened(s.tokenizer, prompt), SAMPLE_TOKENS[unit], seed=o.seed)
    say(f"Sample: {prompt}{s.tokenizer.decode(ids)}")
    say(
        f"Text: {s.corpus.train_tokens + s.corpus.validation_tokens:,} {unit}s, "
        f"fingerprint {s.corpus.fingerprint}"
    )
    for line in notes:
        say(line)
    chats = isinstance(s.tokenizer, TeacherTokenizer) and s.tokenizer.has_template
    talk = talk_command(paths["packed"], chats=chats, prompt=prompt)
    files = {kind: str(path) for kind, path in paths.items()}
    tell(say, "files", [f"Wrote {path}" for path in paths.values()], files=files, talk=talk)
    if chats and "self" not in o.data and not s.corpus.has_chats:
        say("It was trained on no chats; to talk to a student, add chats, or self, to --data")
    say(f"Talk to it: {talk}")
    return problem


def round_at_end(s: Setup, say: Callable[[str], None]) -> None:
    """Quantise a student that was trained in full precision."""
    o = s.options
    unrounded = copy.deepcopy(s.student)
    more = choose_more_bits(o, s.student, s.corpus)
    if o.target_bits is not None:
        say(more_bits_line(o, s.student, more))
    quantize(o, s.student, more)
    if o.calibrate:
        calibrate_student(o, s.student, unrounded, s.corpus)


def run(
    argv: Sequence[str], say: Reporter, stop: Stop, at: Callable[[str], None], world: World
) -> None:
    """The whole command. ``at`` is told what a signal, or a full disk, leaves behind from then."""
    world.join(stop)
    o, saved = parse_options(argv), None
    say.follow(o)
    if o.resume is not None:
        o, saved = world.first(lambda: resume_options(o, argv))
        say.follow(o)
    with ExitStack() as stack:
        stack.enter_context(hushed(o.quiet or o.json))

        def claim() -> None:
            stack.enter_context(locked(o.output_dir))
            if saved is None:
                refuse_unfinished(o.output_dir)
            elif not saved.there:
                raise UserError(f"--resume: the run in {o.output_dir} has just gone on; try again")

        more = saved.about.get("more_bits", []) if saved else None
        setup = set_up(o, say, claim=claim, more=more, world=world)
        if saved:
            refuse_others(saved, setup.about())
            argv = [*saved.about["command"], *argv]
            at(f"go on from the newest checkpoint with --resume {o.output_dir}")
        log_id = new_id(saved and saved.about.get("log"))
        for name in dict.fromkeys(o.log_to if not world.rank else ()):
            if name != "none":
                step = saved.about.get("step", 0) if saved else 0
                say.logs.append(stack.enter_context(closing(LogOf(name, o, log_id, step))))
        keeper = Keeper(
            Checkpoints(o.output_dir, o.keep),
            setup.steps_per_epoch,
            setup.max_steps,
            argv,
            every=o.save_every,
            say=say,
            at=at,
            world=world,
            rollbacks=saved.rollbacks if saved else 0,
            log_id=log_id,
        )
        try:
            rows, summary = train(setup, say, keeper=keeper, saved=saved)
        except NotFinite:
            if not world.rank and not keeper.checkpoints.begun:  # nothing to go on with
                keeper.checkpoints.remove()
            raise
        values = {k: v for k, v in summary.items() if k != "metrics_history"}
        tell(say, "trained", summary_lines(summary, hybrid=o.hybrid), **values)
        if line := worse_line(summary):
            tell(say, "warning", [line], warning=line)
        at(f"write the student's files with --resume {o.output_dir}")

        def save_all() -> UserError | None:
            with Waiting("Measuring and writing the student"):
                problem = save(setup, rows, summary, say)
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
        say = Reporter()
        try:
            with Stop() as stop:
                run(sys.argv[1:] if argv is None else argv, say, stop, at, world)
        except Finished as e:
            tell(say, "finished", [str(e)], text=str(e))
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
    loading.close()
    sys.exit(main())
