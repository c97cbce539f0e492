"""What llama.cpp's own few-bit types make of SmolLM2, without training, and what a student is:
python benchmarks/llama_types/measure.py [--student STUDENT.npz] [--target_bits 2.5 --folder FOLDER]
[--types q2_k ...]

Every matrix of the blocks is quantised by ggml's own code, with the importance of its inputs on
training text, and read back; the losses are on windows that nobody read before. Appends one JSON
line a model to runs.jsonl beside this file or in --folder (what is there is not run again) and
rewrites summary.json. Needs the extras gguf and chat.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sklearn
import torch
import xllamacpp
from gguf import GGMLQuantizationType as Type

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.models.interface import LanguageModel, noted  # noqa: E402
from lowbit.models.teacher import load_teacher  # noqa: E402
from lowbit.models.transformers_lm import TransformersLM, clone  # noqa: E402
from lowbit.options import parse_options  # noqa: E402
from lowbit.quantization.layers import block_layers, hold  # noqa: E402
from lowbit.text.corpus import load_corpus  # noqa: E402
from lowbit.training.preparation import (  # noqa: E402
    choose_dtype,
    choose_more_bits,
    settle,
    some_text,
)
from lowbit.training.validation import Reference, batch_of  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.held_out import spread, validated  # noqa: E402

WINDOWS = 32
GROUP = 256  # weights that share scales, in these types
TYPES = ("q4_0", "q3_k", "q2_k", "iq3_xxs", "iq2_xxs", "iq2_xs")
DEAR = Type.Q4_0  # of the matrices that a student has in 4 bits


def ggml() -> Any:
    """ggml's quantiser, out of xllamacpp's extension."""
    path = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    floats = ctypes.POINTER(ctypes.c_float)
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats,
    ]  # fmt: skip
    return function


def rounded(weight: torch.Tensor, power: torch.Tensor, kind: Type, quantize: Any) -> torch.Tensor:
    """A matrix (O, I) as ggml rounds it; power (I,): mean square of its inputs. Rows that groups
    do not fill are joined to longer ones that they do."""
    rows, width = weight.shape
    joined = GROUP // np.gcd(GROUP, width)
    assert rows % joined == 0
    source = np.ascontiguousarray(weight.float().numpy()).reshape(rows // joined, joined * width)
    importance = np.ascontiguousarray(np.tile(power.float().numpy(), joined))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((len(source), source.shape[1] // block * size), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    written = quantize(
        int(kind), source.ctypes.data_as(floats), raw.ctypes.data, 0, *source.shape,
        importance.ctypes.data_as(floats),
    )  # fmt: skip
    assert written == raw.nbytes
    return torch.from_numpy(gguf.quants.dequantize(raw, kind)).view(rows, width)


@torch.no_grad()
def input_powers(model: TransformersLM, batches: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean square over tokens of each column that a layer of the blocks reads."""
    sums: dict[str, torch.Tensor] = {}
    for ids in batches:
        with noted(block_layers(model), lambda inputs, _: squares(inputs[0])) as found:
            model.features(ids)
        sums = {n: sums.get(n, 0) + s for n, s in found.items()}
    return {n: s / sum(ids.numel() for ids in batches) for n, s in sums.items()}


def squares(x: torch.Tensor) -> torch.Tensor:
    """(B, T, I) -> (I,), float64: sums over tokens."""
    return x.flatten(0, -2).double().square().sum(0)


def summarise(folder: Path, log: RunLog) -> None:
    (folder / "summary.json").write_text(
        json.dumps({"models": log.runs, **machine()}, indent=1) + "\n"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, help="a student of 140 steps")
    parser.add_argument("--target_bits", default="2", help="of the student")
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=TYPES)
    o = parser.parse_args()
    device = torch.device("cpu")
    teacher, tokenizer = load_teacher("smollm2")[:2]
    assert isinstance(teacher, TransformersLM)
    words = ["--hybrid", "--ternary", "--qat", "--teacher", "smollm2"]
    run = parse_options([*words, "--target_bits", o.target_bits])
    settle(run, teacher, tokenizer)
    corpus = load_corpus([], run.seq_len, tokenizer)
    code = Path(sklearn.__file__).parent
    texts = {
        "documentation": corpus.held_out(WINDOWS),
        "source code": spread(code, tokenizer, WINDOWS, run.seq_len),
    }
    dtype = choose_dtype(device, teacher)
    references = {n: Reference(teacher, w, device, dtype) for n, w in texts.items()}
    o.folder.mkdir(exist_ok=True)
    log = RunLog(o.folder / "runs.jsonl")

    def measure(key: dict[str, Any], model: LanguageModel, **more: Any) -> None:
        rows = validated(references, model)
        log.append({**key, **more, "texts": rows, **machine()})
        print(key, more, {n: (round(r["loss"], 3), round(r["kl"], 3)) for n, r in rows.items()})

    if o.student and not log.find({"model": "student"}):
        measure({"model": "student"}, load_teacher(str(o.student))[0])

    if not o.types:
        summarise(o.folder, log)
        return
    dear = choose_more_bits(run, teacher, corpus)
    ids = batch_of(some_text(run, corpus, run.calibration_tokens), device)[0]
    powers = input_powers(teacher, ids.split(8))
    originals, quantize = block_layers(teacher), ggml()
    sizes = {n: m.weight.numel() for n, m in originals.items()}
    for name in o.types:
        if log.find({"model": name, "dear_in_4_bits": False}):
            continue
        model = clone(teacher).requires_grad_(False)
        hold(model.embedding, 4)
        layers, bits = block_layers(model), {}
        parts = {False: (Type[name.upper()], list(layers)), True: (DEAR, dear)}
        for kept, (kind, names) in parts.items():  # the second changes what the first made
            if kept and kind == parts[False][0]:
                continue
            began = time.perf_counter()
            block, size = gguf.GGML_QUANT_SIZES[kind]
            for n in names:
                layers[n].weight.copy_(rounded(originals[n].weight, powers[n], kind, quantize))
                bits[n] = 8 * size / block
            mean = sum(bits[n] * sizes[n] for n in sizes) / sum(sizes.values())
            key = {"model": name, "dear_in_4_bits": kept}
            measure(key, model, bits=mean, seconds=time.perf_counter() - began)
    summarise(o.folder, log)


if __name__ == "__main__":
    main()
