"""A student as a GGUF file, which llama.cpp and what builds on it load.

Codes and scales go into the format's blocks as they are, without rounding once more:

    TQ2_0   256 weights, 2 bits each and a float16 scale: ternary, rows that 256 divides or that
            zeros make so (`lowbit.files.padding`)
    TQ1_0   the same in 1.69 bits, slower to read
    Q2_0    64 weights, 2 bits each and a float16 scale: ternary, rows that 64 divides; what GPUs
            have products for (llama.cpp since July 2026)
    Q4_0    32 weights, 4 bits each and a float16 scale: a code c is written as c + 8; also what the
            student holds in 4 bits
    Q1_0    128 weights, a bit each and a float16 scale: 1-bit, rows that 128 divides
    Q8_0    32 weights, 8 bits each and a float16 scale: what the student holds in 8 bits

(block layouts: ggml-common.h of llama.cpp). Scales of the student are bfloat16, which float16 holds
exactly from 2^-17 to 65504; smaller ones of a row become multiples of 2^-24.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowbit import UserError
from lowbit.extras import require
from lowbit.files.atomic import atomic_write
from lowbit.files.gguf_shape import add_shape, check_shape, family_of, laid_out, rope_factors
from lowbit.files.gguf_tokenizer import Vocabulary, add_tokenizer, name_for, vocabulary_of
from lowbit.files.packed import Packed, Stored
from lowbit.files.padding import Padding, padding

#: Type -> (weights a block, what it holds exactly).
TYPES = {
    "tq2_0": (256, ("ternary",)),
    "tq1_0": (256, ("ternary",)),
    "q2_0": (64, ("ternary",)),
    "q1_0": (128, ("1bit",)),
    "q4_0": (32, ("ternary", "1bit")),
}
#: general.file_type, where it has a number of its own.
FILE_TYPES = {"tq2_0": 37, "tq1_0": 36, "q4_0": 2}
#: Numbers of types that the package gguf has no name for.
NUMBERS = {"Q2_0": 42}
#: Types for which rows are padded with zeros, and how many times as many weights that may make.
PADDED = ("tq2_0", "tq1_0")
MOST_PADDING = 1.5
FLOAT16_MAX = 65504.0
LOW_BIT = ("ternary", "1bit")
#: Type of what the student holds in more bits.
HELD = {"int8": "q8_0", "int4": "q4_0"}


# ------------------------------------------------------------------------------ blocks of codes


def _scales(stored: Stored, blocks: int) -> np.ndarray:
    """Float16 scales, each block's own or the row's, as bytes (rows, blocks, 2)."""
    assert stored.scale is not None
    rows = len(stored.values)
    scale = np.broadcast_to(stored.scale.astype(np.float16), (rows, blocks))
    return np.ascontiguousarray(scale)[..., None].view(np.uint8)


def _blocks(stored: Stored, size: int) -> np.ndarray:
    return stored.values.reshape(len(stored.values), -1, size)


def q4_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) in -8..7 -> bytes (O, I / 32 * 18): entry j in the low half of byte j, entry
    j + 16 in the high half."""
    codes = (_blocks(stored, 32) + 8).astype(np.uint8)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return _joined(_scales(stored, codes.shape[1]), packed)


def q8_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) -> bytes (O, I / 32 * 34)."""
    codes = _blocks(stored, 32).astype(np.int8)
    return _joined(_scales(stored, codes.shape[1]), codes.view(np.uint8))


def q1_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) in {-1, 1} -> bytes (O, I / 128 * 18): a set bit is +1, the first the lowest."""
    bits = np.packbits(_blocks(stored, 128) > 0, axis=-1, bitorder="little")
    return _joined(_scales(stored, bits.shape[1]), bits)


def q2_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) in {-1, 0, 1} -> bytes (O, I / 64 * 18): entry 4 j + n in bits 2n and 2n + 1 of
    byte j."""
    fours = (_blocks(stored, 64) + 1).astype(np.uint8).reshape(len(stored.values), -1, 16, 4)
    packed = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    return _joined(_scales(stored, packed.shape[1]), packed)


def tq2_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) in {-1, 0, 1} -> bytes (O, I / 256 * 66): of each half of a block, entry
    j + 32 n in bits 2n and 2n + 1 of byte j."""
    codes = (_blocks(stored, 256) + 1).astype(np.uint8)
    quarters = codes.reshape(*codes.shape[:2], 2, 4, 32)
    packed = np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2)
    return _joined(packed.reshape(*codes.shape[:2], 64), _scales(stored, codes.shape[1]))


def tq1_0(stored: Stored) -> np.ndarray:
    """Codes (O, I) in {-1, 0, 1} -> bytes (O, I / 256 * 54), by the format's own library,
    which finds these codes again."""
    gguf = require("gguf", "gguf")
    return gguf.quants.quantize(stored.weight(), gguf.GGMLQuantizationType.TQ1_0)


def _joined(*parts: np.ndarray) -> np.ndarray:
    whole = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(whole.reshape(len(whole), -1))


ENCODERS: dict[str, Callable[[Stored], np.ndarray]] = {
    "tq2_0": tq2_0, "tq1_0": tq1_0, "q2_0": q2_0, "q1_0": q1_0, "q4_0": q4_0, "q8_0": q8_0,
}  # fmt: skip


# --------------------------------------------------------------------------------- the student


@dataclass
class Exported:
    """What became of a student's tensors: {type: (tensors, weights, bytes)}, zeros that were added
    in the bytes alone; file_bytes of all."""

    path: Path
    low_bit: str  # type of the low-bit matrices
    parts: dict[str, tuple[int, int, int]]
    reason: str  # why the low-bit type is what it is
    file_bytes: int


def choose_type(found: Packed, asked: str | None) -> tuple[str, str, Padding | None]:
    """The type of the low-bit matrices, why, and the zeros that it needs. UserError where the one
    asked for cannot be."""
    low = {n: t for n, t in found.tensors.items() if t.kind in LOW_BIT}
    kind = next((t.kind for t in low.values()), "ternary")
    widths = sorted({t.values.shape[1] for t in low.values()})
    odd = {t: [w for w in widths if w % size] for t, (size, _) in TYPES.items()}
    good = [t for t, (_, kinds) in TYPES.items() if kind in kinds]
    if asked is not None:
        if asked not in good:
            raise UserError(f"--type {asked} cannot hold {kind} weights; use {' or '.join(good)}")
        if not odd[asked]:
            return asked, "as asked", None
        size = TYPES[asked][0]
        needs = f"--type {asked} needs rows of a multiple of {size} weights"
        use = f"use {' or '.join(t for t in good if not odd[t]) or 'another student'}"
        if asked not in PADDED:
            raise UserError(f"{needs}; this model has rows of {odd[asked][0]}; {use}")
        values = found.config["transformers"]
        if not family_of(values).padded:
            raise UserError(
                f"{needs}; this {values['model_type']} has rows of {odd[asked][0]}, which are not "
                f"padded here; {use}"
            )
        zeros = padding(values, size)
        larger = zeros.growth(found)
        if larger > MOST_PADDING:
            raise UserError(
                f"{needs}; with {zeros} this model has {larger:.2f} times as many; {use}"
            )
        return asked, f"as asked, {zeros}", zeros
    best = "tq2_0" if kind == "ternary" else "q1_0"
    others = []
    if "q2_0" in good and not odd["q2_0"]:
        others.append("q2_0, for GPUs and Macs")
    if not odd[best]:
        why = f"the fastest on CPUs that holds {kind} weights exactly"
        return best, why + _ways(others), None
    if odd["q4_0"]:
        raise UserError(f"rows of {odd['q4_0'][0]} weights fit no block of GGUF (32 divide them)")
    size = TYPES[best][0]
    why = f"exact, and {best} needs rows of a multiple of {size}, not of {odd[best][0]}"
    if best in PADDED and found.of_transformers and family_of(found.config["transformers"]).padded:
        zeros = padding(found.config["transformers"], size)
        plain = sum(t.values.size * _size(t, "q4_0") for t in found.tensors.values())
        padded = sum(zeros.size(n, t) * _size(t, best) for n, t in found.tensors.items())
        if zeros.growth(found) <= MOST_PADDING and padded < plain:
            others.append(f"{best}, filled with zeros, for CPUs")
    return "q4_0", why + _ways(others, smaller=True), None


def _size(stored: Stored, low_bit: str) -> float:
    """Bytes of a weight of a tensor in the file, scales included."""
    gguf = require("gguf", "gguf")
    label = "F32" if stored.scale is None else HELD.get(stored.kind, low_bit).upper()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[label]]
    return size / block


def _ways(types: list[str], smaller: bool = False) -> str:
    """What else the file could be made of."""
    if not types:
        return ""
    return f" ({'smaller: ' if smaller else ''}lowbit.export --type {', or '.join(types)})"


def export_gguf(found: Packed, path: str | os.PathLike, kind: str | None = None) -> Exported:
    """Write a packed student as GGUF, whole or not at all.

    kind: one of TYPES; None chooses. UserError where the architecture, the tokenizer or a scale
    cannot be said in GGUF, or the file cannot be written.
    """
    gguf = require("gguf", "gguf")
    vocabulary = check_exportable(found.config, found.tokenizer)
    chosen, reason, zeros = choose_type(found, kind)
    writer = gguf.GGUFWriter(None, family_of(found.config["transformers"]).architecture)
    parts = fill(writer, gguf, found, vocabulary, chosen, zeros)

    def write(f: IO[bytes]) -> None:
        writer.write_header_to_file(Path(f.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    try:
        target = atomic_write(path, write)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    low = any(t.kind in LOW_BIT for t in found.tensors.values())
    name = chosen.upper() if low else "none"
    return Exported(target, name, parts, reason, target.stat().st_size)


def check_exportable(config: dict[str, Any], tokenizer: dict[str, Any]) -> Vocabulary:
    """UserError for a model or a tokenizer that GGUF cannot hold, before anything is trained.
    Returns the tokenizer's vocabulary."""
    if "transformers" not in config:
        raise UserError(
            "a student of bytes has no form in GGUF: its vocabulary is not one that engines know"
        )
    check_shape(config["transformers"])
    vocabulary = vocabulary_of(tokenizer)
    name_for(vocabulary, tokenizer, config["transformers"]["model_type"])
    return vocabulary


def fill(
    writer: Any,
    gguf: Any,
    found: Packed,
    vocabulary: Vocabulary,
    chosen: str,
    zeros: Padding | None,
) -> dict[str, tuple[int, int, int]]:
    """Everything that the file says. Returns what `Exported` says of the tensors."""
    config = zeros.config if zeros else found.config["transformers"]
    add_shape(writer, gguf, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if chosen in FILE_TYPES:
        writer.add_file_type(FILE_TYPES[chosen])
    rows = found.tensors["model.embed_tokens.weight"].values.shape[0]
    add_tokenizer(writer, vocabulary, found.tokenizer, rows)
    if (name := name_for(vocabulary, found.tokenizer, config["model_type"])) is not None:
        writer.add_name(name)

    architecture = getattr(gguf.MODEL_ARCH, family_of(config).architecture.upper())
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    if (factors := rope_factors(found.config["transformers"])) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    parts: dict[str, tuple[int, int, int]] = {}
    for name, stored in found.tensors.items():
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise UserError(f"tensor {name} has no name in GGUF")
        held = laid_out(name, zeros(name, stored) if zeros else stored, config)
        array, label = encoded(name, held, chosen)
        if label == "F32":
            writer.add_tensor(named, array)
        else:  # of unsigned bytes the package would ask its own table for the shape
            raw = NUMBERS.get(label) or gguf.GGMLQuantizationType[label]
            writer.add_tensor(named, array.view(np.int8), held.values.shape, raw)
        tensors, weights, size = parts.get(label, (0, 0, 0))
        parts[label] = (tensors + 1, weights + stored.values.size, size + array.nbytes)
    return parts


def encoded(name: str, stored: Stored, chosen: str) -> tuple[np.ndarray, str]:
    """A tensor's bytes, and the name of their type."""
    if stored.scale is None:
        return stored.values, "F32"
    largest = np.abs(stored.scale).max()
    if largest > FLOAT16_MAX:
        raise UserError(f"{name}: a scale of {largest:g} is beyond float16")
    if stored.kind == "int4" and (stored.scale.astype(np.float16) != stored.scale).any():
        raise UserError(f"{name}: a scale is too small for float16 to hold exactly")
    kind = HELD.get(stored.kind, chosen)
    return ENCODERS[kind](stored), kind.upper()
