"""What a finished student is said to be: in the run's last lines, and on its model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowbit.console import sayable
from lowbit.events import tell
from lowbit.files.atomic import atomic_write
from lowbit.files.packed import SizeReport
from lowbit.models.transformers_lm import TransformersLM
from lowbit.report import model_card
from lowbit.training.step import Setup
from lowbit.training.validation import Reference, Validation


def measured_on(s: Setup, reference: Reference) -> str:
    """On what the losses were measured, in words."""
    return f"{len(reference.windows)} windows of {s.options.seq_len} held-out {s.tokenizer.unit}s"


def write_card(s: Setup, folder: Path, quantized: Validation, reference: Reference) -> None:
    """The model card of a folder for transformers."""
    o = s.options
    losses = {
        "teacher": f"{reference.teacher_loss:.4f}",
        "student": f"{quantized.loss:.4f} +- {quantized.error:.4f}",
        "KL to the teacher": f"{quantized.kl:.4f}",
    }
    card = model_card(
        Path(o.teacher).name, o.mode, s.max_steps, s.corpus.fingerprint, losses,
        measured_on(s, reference),
    )  # fmt: skip
    atomic_write(folder / "README.md", lambda f: f.write(sayable(card).encode()))


def tell_results(
    s: Setup,
    full: Validation,
    quantized: Validation,
    reference: Reference,
    size: SizeReport,
    say: Callable[[str], None],
) -> None:
    """Losses and bytes of the finished student; full: its unrounded weights'."""
    o, teacher = s.options, reference.teacher_loss

    def share(x: Validation) -> str:
        return f"{100 * (x.loss / teacher - 1):+.1f}% against the teacher"

    tell(
        say,
        "summary",
        [
            f"Validation loss, nats a {s.tokenizer.unit} ({measured_on(s, reference)}):",
            f"  teacher              {teacher:.4f}",
            f"  student, quantized   {quantized.loss:.4f} +- {quantized.error:.4f} "
            f"({share(quantized)}; KL to the teacher {quantized.kl:.4f})",
            f"  student, latent fp32 {full.loss:.4f} ({share(full)})",
        ],
        teacher_loss=teacher,
        student_loss=quantized.loss,
        student_error=quantized.error,
        student_kl=quantized.kl,
        latent_loss=full.loss,
        windows=len(reference.windows),
        packed_bytes=size.file_bytes,
        float32_bytes=size.float32_bytes,
        linear_bits=size.linear_bits,
        fingerprint=s.corpus.fingerprint,
    )
    say(
        f"Size: {size.file_bytes:,} bytes packed, {size.float32_bytes:,} in float32: "
        f"{size.ratio:.1f}x smaller; {size.linear_bits:.3f} bits a "
        f"{'ternary' if o.ternary else '1-bit'} weight, scales included; the embedding is held in "
        f"{o.embedding_bits} bits"
    )
    if isinstance(s.student, TransformersLM):
        parts = [f"{k} {n:,} weights, {b:,} bytes" for k, (n, b) in size.parts.items()]
        held = f"embedding and head in {o.embedding_bits} bits"
        if o.target_bits is None:
            first, last = o.edge_blocks
            held += f", the first {first} and the last {last} blocks in {o.high_bits}"
        say(f"Stored as: {'; '.join(parts)}; {held}")
