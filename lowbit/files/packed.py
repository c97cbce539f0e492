"""The packed file: one .npz for a whole model, readable with nothing but numpy and this page.

Members: ``header`` (JSON as uint8), and one stream for each encoding that occurs, holding the
tensors of that encoding one after another in header order:

    ternary   uint8    5 codes a byte, code + 1 as base-3 digits, first code least significant;
                       each tensor starts a new byte
    1bit      uint8    8 codes a byte, 1 for +1, first code least significant, likewise
    int8      int8     8-bit codes
    int4      uint8    2 codes a byte, code + 8 in four bits, the first code in the lower half; rows
                       are multiples of 32
    float16, float32   plain values
    scales    uint16   bfloat16 bits; one a row or one a tensor for ternary, 1bit and int8; of int4
                       one for 32 consecutive codes of a row, which may be negative

and, where the vocabulary is a teacher's own, ``tokenizer``: {file name: text} as JSON in uint8. The
header's config is that of the plain decoder, or {"transformers": the library's own}. Its version is
2 where int4 occurs and 1 elsewhere: readers of version 1 know no int4.

Streams are deflated, which brings ternary codes close to their entropy; scales and tokenizer of a
megabyte or more are in bzip2, which makes them a fifth smaller. zip's CRC-32 guards each. Nothing
is pickled.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from lowbit import UserError
from lowbit.files.atomic import atomic_write
from lowbit.files.checkpoint import build_model, read_config
from lowbit.models.interface import LanguageModel
from lowbit.models.transformers_lm import build_transformers
from lowbit.quantization.layers import BLOCK, HELD_CODES, QATLinear, held_layers, low_bit_layers

FORMAT = "lowbit-packed"
VERSION = 2
MAX_HEADER = 1 << 20
MAX_TOKENIZER = 1 << 26
MAX_WEIGHTS = 1 << 33
MAX_RATIO = 400  # of a model's float32 weights, or its tokenizer, to the file
ALWAYS_ROOM = 1 << 26  # bytes that a file of any size may take
STREAM_DTYPES = {
    "ternary": np.uint8,
    "1bit": np.uint8,
    "int8": np.int8,
    "int4": np.uint8,
    "float16": np.float16,
    "float32": np.float32,
    "scales": np.uint16,
}
IN_BZIP2, LARGE = ("scales", "tokenizer"), 1 << 20  # bytes
CODED = ("ternary", "1bit", "int8", "int4")
CODES_A_BYTE = {"ternary": 5, "1bit": 8, "int4": 2}  # one of the others

_POWERS = 3 ** np.arange(5)
_TRITS = (np.arange(243)[:, None] // _POWERS % 3 - 1).astype(np.int8)  # (243, 5)


# --------------------------------------------------------------------------------- bits and trits


def pack_ternary(codes: np.ndarray) -> np.ndarray:
    """Codes in {-1, 0, 1}, any shape -> uint8 (ceil(n / 5),); the last byte is padded with 0.
    ValueError for other codes; the other functions that pack raise it, too."""
    flat = np.asarray(codes).ravel()
    if not np.isin(flat, (-1, 0, 1)).all():
        raise ValueError("ternary codes are -1, 0 and 1")
    digits = np.zeros(-(-flat.size // 5) * 5, np.uint8)
    digits[: flat.size] = flat.astype(np.int8) + 1
    digits[flat.size :] = 1
    return (digits.reshape(-1, 5) @ _POWERS).astype(np.uint8)


def unpack_ternary(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of `pack_ternary`: int8 (count,). Raises ValueError for a byte above 242, a wrong
    length, or padding that is not 0."""
    if packed.size != -(-count // 5):
        raise ValueError(f"{packed.size} bytes cannot hold {count} ternary codes")
    if packed.size and packed.max() > 242:
        raise ValueError("a byte above 242 is not five ternary codes")
    codes = _TRITS[packed].ravel()
    if codes[count:].any():
        raise ValueError("padding after the last ternary code")
    return codes[:count]


def pack_bits(codes: np.ndarray) -> np.ndarray:
    """Codes in {-1, 1}, any shape -> uint8 (ceil(n / 8),)."""
    flat = np.asarray(codes).ravel()
    if not np.isin(flat, (-1, 1)).all():
        raise ValueError("1-bit codes are -1 and 1")
    return np.packbits(flat > 0, bitorder="little")


def unpack_bits(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of `pack_bits`: int8 (count,). ValueError for a wrong length or padding bits."""
    if packed.size != -(-count // 8):
        raise ValueError(f"{packed.size} bytes cannot hold {count} 1-bit codes")
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise ValueError("padding after the last 1-bit code")
    return bits[:count].astype(np.int8) * 2 - 1


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """An even number of codes in -8..7, any shape -> uint8 (n / 2,)."""
    flat = np.asarray(codes).ravel()
    if not np.isin(flat, np.arange(-8, 8)).all():
        raise ValueError("4-bit codes are whole numbers from -8 to 7")
    low, high = (flat.astype(np.int8) + 8).astype(np.uint8).reshape(-1, 2).T
    return low | high << 4


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Inverse of `pack_nibbles`: int8 (count,). ValueError for a wrong length."""
    if 2 * packed.size != count:
        raise ValueError(f"{packed.size} bytes cannot hold {count} 4-bit codes")
    return np.stack((packed & 15, packed >> 4), axis=1).ravel().astype(np.int8) - 8


PACK = {"ternary": pack_ternary, "1bit": pack_bits, "int4": pack_nibbles}
UNPACK = {"ternary": unpack_ternary, "1bit": unpack_bits, "int4": unpack_nibbles}


# ------------------------------------------------------------------------------------- the writer


@dataclass
class SizeReport:
    """Bytes and weights of a packed file. linear_bits: bits a ternary or 1-bit weight, its share
    of scales included, after compression. parts: weights and compressed bytes of each encoding,
    scales apart."""

    file_bytes: int
    float32_bytes: int
    linear_weights: int
    linear_bits: float
    parts: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        return self.float32_bytes / self.file_bytes


def encode_model(model: LanguageModel, plain: str = "float32") -> tuple[list[dict], dict]:
    """Tensors of a model -> (header entries, {stream: list of arrays}).

    Layers of `lowbit.quantization` give codes and scales; everything else is stored as ``plain``.
    Of weights that are tied the first name is stored.
    """
    coded = {f"{name}.weight": m for name, m in low_bit_layers(model.stored)}
    held = {f"{name}.weight": bits for name, bits in held_layers(model.stored)}
    streams: dict[str, list[np.ndarray]] = {}
    entries = []
    seen: set[int] = set()
    for name, tensor in model.stored.state_dict().items():
        if name.endswith((".weight_scale", ".base_scale")):
            continue  # part of the layer's scale
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        entry: dict = {"name": name, "shape": list(tensor.shape)}
        layer = coded.get(name)
        if layer is None and name not in held:
            entry["encoding"] = plain
            array = tensor.detach().cpu().numpy()
            array = array.astype(STREAM_DTYPES[plain]).ravel()
            if not np.isfinite(array).all():
                raise UserError(f"cannot pack {name}: a value is not finite in {plain}")
            streams.setdefault(plain, []).append(array)
        else:
            bits = held.get(name, 8)
            codes, scale = HELD_CODES[bits](tensor) if layer is None else layer.codes_and_scale()
            kind = layer.mode if isinstance(layer, QATLinear) else f"int{bits}"
            if not bool(torch.isfinite(tensor).all() & torch.isfinite(scale).all()):
                raise UserError(f"cannot pack {name}: a weight or scale is not finite")
            entry["encoding"], entry["scales"] = kind, scale.numel()
            array = codes.cpu().numpy().astype(np.int8)
            streams.setdefault(kind, []).append(PACK.get(kind, np.ravel)(array))
            halves = scale.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
            streams.setdefault("scales", []).append(halves.ravel())
        entries.append(entry)
    return entries, streams


def as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)


def save_packed(
    path: str | os.PathLike,
    model: LanguageModel,
    tokenizer: dict,
    *,
    plain: str = "float32",
    notes: dict | None = None,
) -> SizeReport:
    """Write the file, whole or not at all, and say how large it became.

    tokenizer: what its `describe` gives; plain: "float32" or "float16", of tensors without codes;
    notes: whatever JSON can say, kept in the header. UserError for a value that is not finite,
    OSError where the file cannot be written.
    """
    entries, streams = encode_model(model, plain)
    files = tokenizer.get("files")
    tokenizer = {k: v for k, v in tokenizer.items() if k != "files"}
    header = {
        "format": FORMAT,
        "version": VERSION if "int4" in streams else 1,
        "config": model.describe(),
        "tokenizer": tokenizer,
        "tensors": entries,
        "notes": notes or {},
    }
    members: dict[str, np.ndarray] = {"header": as_bytes(header)}
    if files is not None:
        members["tokenizer"] = as_bytes(files)
    members.update({k: np.concatenate(v) for k, v in streams.items()})
    atomic_write(path, lambda f: write_members(f, members))
    with zipfile.ZipFile(path) as z:
        sizes = {i.filename.removesuffix(".npy"): i.compress_size for i in z.infolist()}
    weights = {k: sum(math.prod(e["shape"]) for e in entries if e["encoding"] == k) for k in CODED}
    linear = weights["ternary"] + weights["1bit"]
    scale_counts = [(e["encoding"], e.get("scales", 0)) for e in entries]
    low = sum(n for k, n in scale_counts if k in ("ternary", "1bit"))
    share = low / max(1, sum(n for _, n in scale_counts))
    stored = sizes.get("ternary", 0) + sizes.get("1bit", 0) + sizes.get("scales", 0) * share
    total = sum(math.prod(e["shape"]) for e in entries)
    counts = {k: sum(math.prod(e["shape"]) for e in entries if e["encoding"] == k) for k in streams}
    counts["scales"] = sum(n for _, n in scale_counts)
    return SizeReport(
        Path(path).stat().st_size,
        4 * total,
        linear,
        8 * stored / linear if linear else 0.0,
        {k: (n, sizes[k]) for k, n in counts.items() if k in sizes},
    )


def write_members(file: IO[bytes], members: dict[str, np.ndarray]) -> None:
    """The zip of a packed file, as `np.savez_compressed` writes it but for IN_BZIP2."""
    with zipfile.ZipFile(file, "w") as z:
        for name, array in members.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed: equal files for equal models
            large = name in IN_BZIP2 and array.nbytes >= LARGE
            info.compress_type = zipfile.ZIP_BZIP2 if large else zipfile.ZIP_DEFLATED
            with z.open(info, "w", force_zip64=True) as f:
                np.lib.format.write_array(f, array, allow_pickle=False)


# ------------------------------------------------------------------------------------- the reader


@dataclass
class Stored:
    """A tensor as the file holds it: values, int8 codes of its shape or plain float32, and of codes
    the scales (rows, 1), (1, 1) or, of int4, (rows, n / 32) float32."""

    kind: str
    values: np.ndarray
    scale: np.ndarray | None = None

    def weight(self) -> np.ndarray:
        if self.scale is None:
            return self.values
        values = self.values.reshape(self.scale.size, -1).astype(np.float32)
        values *= self.scale.reshape(-1, 1)
        return values.reshape(self.values.shape)


@dataclass
class Packed:
    config: dict
    tokenizer: dict
    notes: dict
    tensors: dict[str, Stored]

    @property
    def of_transformers(self) -> bool:
        return isinstance(self.config, dict) and "transformers" in self.config


def load_packed(path: str | os.PathLike) -> tuple[LanguageModel, dict, dict]:
    """(model with dequantised float32 weights, tokenizer description, notes).

    Raises UserError for whatever is not a sound file of this format.
    """
    found = read_packed(path)
    return model_of(found, str(path)), found.tokenizer, found.notes


def model_of(found: Packed, origin: str) -> LanguageModel:
    """The model with dequantised float32 weights. UserError where the tensors are not its own."""
    state = {name: torch.from_numpy(t.weight()) for name, t in found.tensors.items()}
    if found.of_transformers:
        return build_transformers(found.config["transformers"], state, origin)
    return build_model(read_config(found.config, origin), state, origin)


def read_packed(path: str | os.PathLike) -> Packed:
    """What the file holds, tensor by tensor.

    Sizes are checked against the header before anything of that size is read, and the header's
    against the file's: deflate makes gigabytes of equal weights from kilobytes, which training
    never leaves. Even binary weights are a 32nd of float32 and hardly compress, so MAX_RATIO is ten
    times what is written here, and what stays below ALWAYS_ROOM may be anything. Raises UserError
    for whatever is not a sound file of this format.
    """
    try:
        with zipfile.ZipFile(path) as z:
            return _read(z, str(path))
    except UserError:
        raise
    except Exception as e:  # zip, zlib, bzip2, JSON, numpy and key errors of damaged files
        if isinstance(e, OSError) and e.errno is not None:  # bzip2's has none
            raise UserError(f"cannot read {path}: {e.strerror}") from e
        raise UserError(f"{path} is damaged, or not a packed model: {e}") from e


def _read(z: zipfile.ZipFile, origin: str) -> Packed:
    infos = {i.filename: i for i in z.infolist()}
    room = max(ALWAYS_ROOM, MAX_RATIO * os.stat(origin).st_size)
    known = {f"{k}.npy" for k in (*STREAM_DTYPES, "header", "tokenizer")}
    if len(infos) != len(z.infolist()) or not set(infos) <= known or "header.npy" not in infos:
        raise UserError(f"{origin}: not a packed model (its members are not the format's)")
    if infos["header.npy"].file_size > MAX_HEADER:
        raise UserError(f"{origin}: header too large")
    header = json.loads(_member(z, "header", np.uint8, None).tobytes())
    version = header.get("version")
    if header.get("format") != FORMAT or version not in (1, VERSION):
        raise UserError(
            f"{origin}: format {header.get('format')!r} version {version!r}, "
            f"expected {FORMAT} 1 or {VERSION}"
        )
    tokenizer = header["tokenizer"]
    if not isinstance(tokenizer, dict) or not isinstance(header["notes"], dict):
        raise UserError(f"{origin}: tokenizer or notes missing")
    beside = {"header.npy"} | ({"tokenizer.npy"} & set(infos))
    if "tokenizer.npy" in beside:
        if infos["tokenizer.npy"].file_size > min(MAX_TOKENIZER, room):
            raise UserError(f"{origin}: tokenizer too large")
        text = _member(z, "tokenizer", np.uint8, None, MAX_TOKENIZER).tobytes()
        tokenizer = {**tokenizer, "files": json.loads(text)}

    plan: dict[str, int] = {}
    total = 0
    for entry in header["tensors"]:
        kind, shape = entry["encoding"], entry["shape"]
        if kind not in STREAM_DTYPES or kind == "scales" or (kind == "int4" and version == 1):
            raise UserError(f"{origin}: unknown encoding {kind!r}")
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in shape):
            raise UserError(f"{origin}: bad shape {shape} of {entry['name']}")
        count = math.prod(shape)
        total += count
        plan[kind] = plan.get(kind, 0) + -(-count // CODES_A_BYTE.get(kind, 1))
        if kind in CODED:
            fits = len(shape) == 2 and entry["scales"] in (1, shape[0])
            if kind == "int4":
                fits = len(shape) == 2 and entry["scales"] * BLOCK == count and not shape[1] % BLOCK
            if not fits:
                raise UserError(f"{origin}: scales of {entry['name']} do not fit its shape")
            plan["scales"] = plan.get("scales", 0) + entry["scales"]
    if total > MAX_WEIGHTS or {f"{k}.npy" for k in plan} | beside != set(infos):
        raise UserError(f"{origin}: streams do not match the header")
    for kind, count in plan.items():
        nbytes = count * np.dtype(STREAM_DTYPES[kind]).itemsize
        if not nbytes <= infos[f"{kind}.npy"].file_size <= nbytes + 1024:
            raise UserError(f"{origin}: stream {kind} has the wrong length")
    if 4 * total > room:
        raise UserError(f"{origin}: {total:,} weights are more than a file of this size can hold")
    streams = {k: _member(z, k, STREAM_DTYPES[k], n) for k, n in plan.items()}

    cursors = dict.fromkeys(streams, 0)

    def take(kind: str, n: int) -> np.ndarray:
        cursors[kind] += n
        return streams[kind][cursors[kind] - n : cursors[kind]]

    tensors: dict[str, Stored] = {}
    for entry in header["tensors"]:
        kind, shape = entry["encoding"], entry["shape"]
        count = math.prod(shape)
        if kind in CODED:
            values = take(kind, -(-count // CODES_A_BYTE.get(kind, 1)))
            codes = (UNPACK[kind](values, count) if kind in UNPACK else values).reshape(shape)
            bits = take("scales", entry["scales"]).astype(np.uint32) << 16
            scale = bits.view(np.float32).reshape(-1, shape[1] // BLOCK if kind == "int4" else 1)
            if not np.isfinite(scale).all() or (kind != "int4" and (scale < 0).any()):
                raise UserError(f"{origin}: a scale of {entry['name']} is negative or not finite")
            found = Stored(kind, codes, scale)
        else:
            found = Stored(kind, take(kind, count).reshape(shape).astype(np.float32))
        if not isinstance(entry["name"], str) or entry["name"] in tensors:
            raise UserError(f"{origin}: tensor {entry['name']} occurs twice, or is no name")
        tensors[entry["name"]] = found
    return Packed(header["config"], tokenizer, header["notes"], tensors)


def _member(
    z: zipfile.ZipFile, name: str, dtype: type, count: int | None, limit: int = MAX_HEADER
) -> np.ndarray:
    with z.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, found = read(f)
        if found != np.dtype(dtype) or len(shape) != 1 or (count is not None and shape != (count,)):
            raise ValueError(f"member {name}: {found} of shape {shape}")
        limit = limit if count is None else count * found.itemsize
        data = f.read(limit + 1)
        if len(data) != shape[0] * found.itemsize:
            raise ValueError(f"member {name}: wrong length")
        return np.frombuffer(data, found)
