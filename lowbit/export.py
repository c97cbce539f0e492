"""A finished student for other programs: ``apl-export student/ --to gguf``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lowbit import UserError, first_line
from lowbit.arguments import Parser
from lowbit.console import Printer
from lowbit.files.compressed import export_compressed
from lowbit.files.gguf_file import TYPES, Exported, export_gguf
from lowbit.files.packed import model_of, read_packed
from lowbit.models.transformers_lm import TransformersLM, save_folder

#: The type of a folder for transformers that holds codes.
PACKED = "packed"


def find_packed(student: str) -> Path:
    """The packed file of a student: itself, or the one in its folder. UserError for another number
    of them."""
    if not student:
        raise UserError("the student: an empty path")
    path = Path(student)
    if path.is_file():
        return path
    files = sorted(path.glob("*.npz")) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    if not path.exists():
        raise UserError(f"no such file or folder: {student}")
    what = f"{len(files)} packed students: name one" if files else "no packed student (*.npz)"
    raise UserError(f"{student} holds {what}")


def table(done: Exported) -> list[str]:
    """What each type holds, a line each, and the whole file's size."""
    lines = [f"{'type':6} {'tensors':>7} {'weights':>13} {'bytes':>12} {'bits each':>9}"]
    for kind, (tensors, weights, size) in done.parts.items():
        lines.append(f"{kind:6} {tensors:7} {weights:13,} {size:12,} {8 * size / weights:9.3f}")
    weights = sum(n for _, n, _ in done.parts.values())
    lines.append(
        f"{done.path}: {done.file_bytes:,} bytes, {4 * weights / done.file_bytes:.1f}x smaller "
        "than float32"
    )
    return lines


def export(student: str, kind: str, output: str | None, type_: str | None) -> list[str]:
    """Write a student in another form; what to tell about it."""
    packed = find_packed(student)
    if output == "":
        raise UserError("--output: an empty path")
    if kind == "gguf":
        target = Path(output) if output else packed.with_suffix(".gguf")
        done = export_gguf(read_packed(packed), target, type_)
        return [f"Low-bit weights are {done.low_bit}: {done.reason}", *table(done)]
    found = read_packed(packed)
    model = model_of(found, str(packed))
    if not isinstance(model, TransformersLM):
        raise UserError("a student of bytes has no form in transformers: its decoder is our own")
    name = "transformers-packed" if type_ == PACKED else "transformers"
    folder = Path(output) if output else packed.parent / name
    lines = []
    try:
        if type_ == PACKED:
            lines += table(export_compressed(found, model, folder))
            lines.append("Loading it needs compressed-tensors: pip install compressed-tensors")
        else:
            save_folder(folder, model, found.tokenizer["files"])
    except (OSError, UnicodeError) as e:
        raise UserError(f"cannot write {folder}: {first_line(e)}") from e
    return [*lines, f"Wrote {folder}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="apl-export", description=__doc__, allow_abbrev=False)
    parser.add_argument("student", help="a run's output folder, or its .npz file")
    parser.add_argument("--to", choices=["gguf", "hf"], required=True, help="the form")
    parser.add_argument("--output", metavar="PATH", help="default: beside the .npz")
    parser.add_argument(
        "--type",
        choices=[PACKED, *sorted(TYPES)],
        help="of the low-bit weights in GGUF (default: the fastest on CPUs that holds them exactly "
        "as they are; q2_0 is for GPUs and Macs; tq2_0 and tq1_0 pad rows with zeros), or packed: "
        "hf with codes instead of float32, for transformers with compressed-tensors",
    )
    o = parser.parse_args(argv)
    say = Printer()
    try:
        if o.type == PACKED and o.to != "hf":
            raise UserError("--type packed needs --to hf")
        if o.type in TYPES and o.to != "gguf":
            raise UserError("--type needs --to gguf, or to be packed")
        for line in export(o.student, o.to, o.output, o.type):
            say(line)
    except UserError as e:
        return e.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
