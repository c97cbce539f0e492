"""What a run settles before its first step: device and precision, defaults that depend on the
teacher, the rounded student, the files to be written, and what the run will take."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hybrid_optimization import native_bfloat16
from lowbit import UserError
from lowbit.console import Waiting, draws, progress_bar
from lowbit.models.interface import LanguageModel
from lowbit.models.student import settle_student
from lowbit.models.transformers_lm import TransformersLM
from lowbit.options import TARGET_BITS, settle_by_start, settle_by_teacher
from lowbit.quantization.calibration import calibrate
from lowbit.quantization.layers import (
    BLOCK,
    NOMINAL,
    block_layers,
    edge_layers,
    from_codes,
    quantize_model,
    sign_codes,
    ternary_codes,
)
from lowbit.quantization.precision import rounding_costs, share_of_high, with_more_bits
from lowbit.text.corpus import Corpus
from lowbit.text.self_written import written_by
from lowbit.text.tokenizers import Tokenizer
from lowbit.training.estimate import (
    BACKWARD_PASSES,
    CALIBRATION_PASSES,
    GIB,
    HEAD_PASSES,
    STEP_PASSES,
    Estimate,
    choose_passes,
    halved,
    memory_available,
    memory_needed,
    seconds_a_token,
    trained_weights,
    weights,
)
from lowbit.training.parallel import ALONE, World
from lowbit.training.teacher_cache import Record, TeacherCache, open_cache
from lowbit.training.validation import autocast, batch_of

CALIBRATION_BATCH = 8  # windows at a time
COST_TOKENS = 4096  # of text, by which matrices are weighed
#: Tokens of a forward pass: at most, as the default; and those below which it becomes slow.
PASS_TOKENS = {"cpu": (1024, 128), "cuda": (1 << 20, 2048)}


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of torch has no CUDA; use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def kept_denormals() -> Iterator[None]:
    """After it the process flushes denormals as it did before; torch does not say whether it does,
    a product does."""
    flushes = not float(torch.tensor(1e-30) * torch.tensor(1e-10))
    try:
        yield
    finally:
        torch.set_flush_denormal(flushes)


def settle(o: argparse.Namespace, teacher: LanguageModel, tokenizer: Tokenizer) -> None:
    """Fill in what depends on the teacher and on where the student starts."""
    settle_by_teacher(o, tokenizer.name)
    settle_student(o, teacher)
    settle_by_start(o, tokenizer.name)
    converts = o.student_init == "teacher" or not o.qat
    if o.calibrate and not converts:
        raise UserError("--calibrate with --qat needs --student_init teacher: nothing to round yet")
    if o.calibrate is None:
        o.calibrate = o.hybrid and converts and not o.learnable_scale
    settle_more_bits(o, teacher, tokenizer.name, converts)
    if o.cache_teacher and o.cache_teacher >= teacher.vocab_size:
        raise UserError(
            f"--cache_teacher {o.cache_teacher}: keep fewer, the vocabulary has only "
            f"{teacher.vocab_size} tokens"
        )
    settle_embedding_bits(o, teacher)


def settle_embedding_bits(o: argparse.Namespace, teacher: LanguageModel) -> None:
    """Fill in --embedding_bits: 4 where it can be, if nothing was given. UserError for a 4 that
    cannot be."""
    holds = isinstance(teacher, TransformersLM) and o.student_size == "same"
    if o.embedding_bits is None:
        o.embedding_bits = 4 if holds and teacher.hidden_size % BLOCK == 0 else 8
    elif o.embedding_bits == 4:
        if not holds:
            raise UserError(
                "--embedding_bits 4 needs a student of transformers: the plain decoder trains its "
                "embedding, in 8 bits"
            )
        refuse_rows("--embedding_bits 4", [teacher.hidden_size])


def settle_more_bits(
    o: argparse.Namespace, teacher: LanguageModel, vocabulary: str, converts: bool
) -> None:
    """Fill in --target_bits or --edge_blocks, --high_bits, and whether these are frozen;
    vocabulary: "bytes" or another."""
    widths = [m.in_features for m in block_layers(teacher).values()]
    blocks = o.student_layers or len(teacher.blocks)
    fits = o.high_bits == 8 or any(w % BLOCK == 0 for w in widths)
    if o.target_bits is None and o.edge_blocks is None and vocabulary != "bytes":
        if converts and fits:
            o.target_bits = TARGET_BITS[o.mode]
        elif blocks >= 4:  # of fewer the ends are most
            o.edge_blocks = [1, 1]
    o.edge_blocks = o.edge_blocks or [0, 0]
    o.high_bits = o.high_bits or (8 if o.target_bits is None else 4)
    trains = o.qat and o.student_init == "teacher"
    if o.freeze_high_bits is None:  # not where nothing else is left to train
        o.freeze_high_bits = trains and (o.target_bits is None or o.target_bits < o.high_bits)
    elif o.freeze_high_bits and not trains:
        raise UserError("--freeze_high_bits needs --qat and --student_init teacher")
    if sum(o.edge_blocks) >= blocks:
        first, last = o.edge_blocks
        raise UserError(f"--edge_blocks {first} {last}: of {blocks} blocks none would be left")
    if o.high_bits == 4 and any(o.edge_blocks):
        refuse_rows("--high_bits 4", widths)


def refuse_rows(flag: str, widths: Iterable[int]) -> None:
    """UserError for a row that blocks of 4-bit codes do not fill."""
    for width in widths:
        if width % BLOCK:
            raise UserError(f"{flag}: rows of {width} weights are no multiple of {BLOCK}")


def choose_dtype(device: torch.device, teacher: LanguageModel) -> torch.dtype | None:
    """bfloat16 on a GPU, and for `transformers`' models on processors that multiply it."""
    large = isinstance(teacher, TransformersLM)
    fast = device.type == "cuda" or (large and native_bfloat16(device))
    return torch.bfloat16 if fast else None


def quantize(o: argparse.Namespace, student: LanguageModel, more: Collection[str]) -> None:
    """Exchange a float student's layers for those that round; ``more``: of `choose_more_bits`."""
    quantize_model(
        student,
        o.mode,
        learnable_scale=o.learnable_scale,
        more=more,
        high_bits=o.high_bits,
        embedding_bits=o.embedding_bits,
    )


def some_text(o: argparse.Namespace, corpus: Corpus, tokens: int) -> np.ndarray:
    """Training windows of the seed's choice, of at least so many tokens where there are."""
    order = np.random.default_rng(o.seed).permutation(len(corpus.train))
    return corpus.take(order[: math.ceil(tokens / o.seq_len)])


def choose_more_bits(o: argparse.Namespace, student: LanguageModel, corpus: Corpus) -> list[str]:
    """Names of the float student's layers that get --high_bits. UserError where none can."""
    if o.target_bits is None:
        return edge_layers(student, *o.edge_blocks)
    layers = block_layers(student)
    fit = {n: m for n, m in layers.items() if o.high_bits == 8 or not m.in_features % BLOCK}
    if not fit:
        refuse_rows("--high_bits 4", (m.in_features for m in layers.values()))
    device = student.embedding.weight.device
    codes_of = ternary_codes if o.mode == "ternary" else sign_codes
    with torch.no_grad():
        changes = {
            n: (from_codes(*codes_of(m.weight)) - m.weight).bfloat16() for n, m in fit.items()
        }
    windows = batch_of(some_text(o, corpus, COST_TOKENS), device)[0].split(1)
    large = isinstance(student, TransformersLM)
    bar = partial(progress_bar, desc="Weighing matrices", unit="window")
    with (
        autocast(device, choose_dtype(device, student) if large else None),
        nullcontext() if draws() else Waiting("Weighing matrices"),
    ):
        generator = torch.Generator().manual_seed(o.seed)
        costs = rounding_costs(student, windows, changes, generator, progress=bar)
    sizes = {n: m.weight.numel() for n, m in layers.items()}
    return sorted(with_more_bits(costs, sizes, NOMINAL[o.mode], o.high_bits, o.target_bits))


def more_bits_line(o: argparse.Namespace, student: LanguageModel, more: Collection[str]) -> str:
    """What `choose_more_bits` chose, for a person."""
    layers = block_layers(student)
    sizes = {n: m.weight.numel() for n, m in layers.items()}
    share = sum(sizes[n] for n in more) / sum(sizes.values())
    mean = o.high_bits * share + NOMINAL[o.mode] * (1 - share)
    kinds = Counter(n.rpartition(".")[2] for n in more).most_common()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
    return (
        f"{len(more)} of {len(layers)} matrices have {o.high_bits} bits, {mean:.2f} a weight in "
        f"the mean: {listed}"
    )


def calibrate_student(
    o: argparse.Namespace, student: LanguageModel, original: LanguageModel, corpus: Corpus
) -> None:
    """Round a student that holds the original's weights, by windows of the seed's choice."""
    device = student.embedding.weight.device
    ids = batch_of(some_text(o, corpus, o.calibration_tokens), device)[0]
    batches = [*ids.split(CALIBRATION_BATCH)]
    large = isinstance(student, TransformersLM)
    with autocast(device, choose_dtype(device, original) if large else None):
        bar = partial(progress_bar, desc="Calibrating", unit="block")
        # Of a large model a block takes many seconds, and lines of a bar are a minute apart.
        with nullcontext() if draws() else Waiting("Calibrating"):
            calibrate(student, original, batches, progress=bar)


def output_paths(o: argparse.Namespace, teacher: LanguageModel) -> dict[str, Path]:
    """The files that the run will write, by what they hold. teacher: or a student of its kind."""
    folder = Path(o.output_dir)
    kind = ("ternary_1.58bit" if o.ternary else "1bit") + ("_qat" if o.qat else "")
    if isinstance(teacher, TransformersLM) and o.student_size == "same":
        paths = {"transformers": folder / "transformers"}
    else:
        paths = {"float32": folder / "student_fp32.pth"}
    paths["packed"] = folder / f"student_quantized_{kind}.npz"
    if "gguf" in o.export:
        paths["gguf"] = paths["packed"].with_suffix(".gguf")
    if o.save_metrics:
        paths["metrics"] = Path(o.metrics_out) if o.metrics_out else folder / "student_metrics.csv"
        paths["picture"] = paths["metrics"].with_suffix(".png")
    return paths


def own_text(o: argparse.Namespace, teacher: LanguageModel, tokenizer: Tokenizer) -> str:
    """The path of text that the teacher wrote."""
    device = teacher.embedding.weight.device
    dtype = choose_dtype(device, teacher)
    large = isinstance(teacher, TransformersLM)
    bar = progress_bar(total=o.self_tokens, desc="The teacher writes", unit="token")
    with bar, autocast(device, None if large else dtype):
        own = dtype if large else None
        return str(written_by(teacher, tokenizer, o.self_tokens, o.seed, bar.update, own))


def cache_of(
    o: argparse.Namespace, teacher: LanguageModel, corpus: Corpus, fingerprint: str
) -> TeacherCache:
    """Where --cache_teacher keeps what a teacher, whose weights have this fingerprint, says of the
    text. UserError where the disk is too small."""
    record = Record(o.seq_len, o.cache_teacher, teacher.vocab_size, o.temperature)
    windows = len(corpus.train)
    device = teacher.embedding.weight.device
    about = [fingerprint, corpus.fingerprint, corpus.opening, device.type]
    about += [str(choose_dtype(device, teacher)), windows]
    return open_cache(record, min(windows, o.epochs * (o.samples_per_epoch or windows)), about)


def plan(
    o: argparse.Namespace, teacher: LanguageModel, corpus: Corpus, world: World = ALONE
) -> Estimate | None:
    """Settle how a step is cut into passes, by the memory that is free; what the run will take,
    where the teacher is one of `transformers`'. UserError where memory is too short."""
    if not isinstance(teacher, TransformersLM):
        o.micro_batch_size = min(o.micro_batch_size or o.batch_size, o.batch_size)
        o.activation_checkpointing = bool(o.activation_checkpointing)
        return None
    device = teacher.embedding.weight.device
    dtype = choose_dtype(device, teacher)
    held = dtype.itemsize if dtype else 4
    share = (o.student_layers or len(teacher.blocks)) / len(teacher.blocks)
    if o.freeze_high_bits and o.target_bits is not None:
        share *= 1 - share_of_high(NOMINAL[o.mode], o.high_bits, o.target_bits)
    trained = trained_weights(teacher, share)
    # The teacher is in memory already. Processes on CPUs share theirs.
    sharers = world.beside if device.type == "cpu" else 1
    available = memory_available(device) / sharers + 4 * weights(teacher)

    def needed(windows: int, recomputes: bool) -> float:
        return memory_needed(
            teacher, windows * o.seq_len, trained=trained, recomputes=recomputes, held=held
        )

    most, few = (max(1, n // o.seq_len) for n in PASS_TOKENS[device.type])
    if o.micro_batch_size is not None:
        sizes = [min(o.micro_batch_size, o.batch_size)]
    else:
        sizes = halved(min(most, o.batch_size))
    o.micro_batch_size, o.activation_checkpointing = world.first(
        lambda: choose_passes(
            sizes, few, o.activation_checkpointing, lambda *choice: needed(*choice) <= available
        )
    )

    ids = batch_of(corpus.take(slice(o.micro_batch_size)), device)[0]
    with Waiting("Measuring what a pass takes"), autocast(device, dtype):
        of_blocks, of_head = seconds_a_token(teacher, ids)
    windows_in_all = o.epochs * (o.samples_per_epoch or len(corpus.train))
    of_step = (STEP_PASSES + o.activation_checkpointing) * of_blocks + HEAD_PASSES * of_head
    seconds = windows_in_all * o.seq_len * of_step / world.count
    if o.target_bits is not None:
        seconds += COST_TOKENS * (BACKWARD_PASSES * of_blocks + HEAD_PASSES * of_head)
    if o.calibrate:
        seconds += o.calibration_tokens * CALIBRATION_PASSES * of_blocks
    memory = needed(o.micro_batch_size, o.activation_checkpointing)
    if memory > available:
        raise UserError(
            f"--teacher {o.teacher}: the run needs about {memory / GIB:.1f} GiB of memory, "
            f"{available / GIB:.1f} are free; a smaller --seq_len or --student_layers needs less"
        )
    return Estimate(memory, available, seconds)
