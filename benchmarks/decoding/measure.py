"""Decoding in llama.cpp and sizes of files: python benchmarks/decoding/measure.py [--rounds 5]

Models of random ternary weights, or of 1 bit (--one_bit), in two shapes decode as fast as trained
ones. Each is exported as a default student is (embedding and head in 8 bits, or --embedding_bits;
projections of keys, values and queries in 4 until a weight of the blocks has 2 bits in the mean, of
1-bit students 1.5), in every type that holds it, with zeros where rows of ternary weights are too
short, and in float32. All files of a shape are loaded, and take turns.
Appends one JSON line a shape to runs.jsonl beside this file and rewrites summary.json. Needs the
extras gguf and chat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.chat import open_server  # noqa: E402
from lowbit.files.gguf_file import PADDED, export_gguf  # noqa: E402
from lowbit.files.gguf_file import TYPES as ROWS  # noqa: E402
from lowbit.files.packed import Packed, Stored  # noqa: E402
from lowbit.options import TARGET_BITS  # noqa: E402
from lowbit.quantization.layers import BLOCK, NOMINAL  # noqa: E402
from lowbit.quantization.precision import with_more_bits  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.shapes import config  # noqa: E402

SHAPES = {"smollm2-135m": config("SmolLM2-135M"), "llama-1.1b": config("TinyLlama-1.1B")}
TYPES = {"ternary": ("tq2_0", "tq1_0", "q2_0", "q4_0"), "1bit": ("q1_0", "q4_0")}
PROMPT = list(range(8))
#: Matrices whose rounding costs most for their size, the dearest last.
DEAR = tuple(f"self_attn.{name}" for name in ("o_proj", "q_proj", "v_proj", "k_proj"))


def student(shape: dict[str, Any], embedding_bits: int = 4, mode: str = "ternary") -> Packed:
    """A packed student of random codes; mode: "ternary" or "1bit"."""
    rng = np.random.default_rng(0)
    width, inner, layers = (
        shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"],
    )  # fmt: skip
    kv = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    tensors: dict[str, Stored] = {}

    def codes(name: str, rows: int, columns: int, kind: str) -> None:
        top = {"ternary": 1, "1bit": 1, "int8": 127, "int4": 7}[kind]
        least = -top - (kind == "int4")
        values = rng.integers(least, top + 1, (rows, columns), dtype=np.int8)
        if kind == "1bit":
            values = np.where(values < 0, np.int8(-1), np.int8(1))
        scales = columns // BLOCK if kind == "int4" else 1
        scale = np.full((rows, scales), 2.0 ** -round(np.log2(top * columns**0.5)), np.float32)
        tensors[name] = Stored(kind, values, scale)

    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    full = "model.layers.{}.{}.weight".format
    sizes = {full(i, n): a * b for n, (a, b) in shapes.items() for i in range(layers)}
    costs = {full(i, n): DEAR.index(n) * sizes[full(i, n)] for n in DEAR for i in range(layers)}
    more = with_more_bits(costs, sizes, NOMINAL[mode], 4, TARGET_BITS[mode])
    held = f"int{embedding_bits}"
    codes("model.embed_tokens.weight", shape["vocab_size"], width, held)
    for i in range(layers):
        block = f"model.layers.{i}."
        for name, (rows, columns) in shapes.items():
            kind = "int4" if full(i, name) in more else mode
            codes(full(i, name), rows, columns, kind)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = Stored("float32", np.ones(width, np.float32))
    tensors["model.norm.weight"] = Stored("float32", np.ones(width, np.float32))
    if not shape["tie_word_embeddings"]:
        codes("lm_head.weight", shape["vocab_size"], width, held)
    values = {**shape, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
    wrapped = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    wrapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = {"tokenizer.json": wrapped.to_str()}
    return Packed({"transformers": values}, {"files": files}, {}, tensors)


def in_float32(found: Packed) -> Packed:
    tensors = {n: Stored("float32", t.weight()) for n, t in found.tensors.items()}
    return Packed(found.config, found.tokenizer, found.notes, tensors)


def tokens_a_second(server: Any, tokens: int) -> float:
    answer = server.handle_completions(
        {
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    return float(answer["timings"]["predicted_per_second"])


def measure(o: argparse.Namespace, name: str) -> dict[str, Any]:
    shape, rounds, tokens = SHAPES[name], o.rounds, o.tokens
    found = student(shape, o.embedding_bits, o.mode)
    weights = sum(t.values.size for t in found.tensors.values())
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        widths = shape["hidden_size"], shape["intermediate_size"]
        held = [t for t in TYPES[o.mode]
                if t in PADDED or not any(w % ROWS[t][0] for w in widths)]  # fmt: skip
        files = {t: Path(folder, f"{t}.gguf") for t in ("f32", *held)}
        for kind, path in files.items():
            export_gguf(in_float32(found) if kind == "f32" else found, path,
                        None if kind == "f32" else kind)  # fmt: skip
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        del found
        servers = {kind: open_server(path, 512, o.threads) for kind, path in files.items()}
        speeds: dict[str, list[float]] = {kind: [] for kind in files}
        for n in range(rounds + 1):
            for kind, server in servers.items():
                speed = tokens_a_second(server, tokens)
                if n:  # the first reads the files
                    speeds[kind].append(speed)
            print(name, n, {k: round(v[-1], 2) for k, v in speeds.items() if v}, flush=True)
        del servers
    return {
        **machine(), "shape": name, "mode": o.mode, "embedding_bits": o.embedding_bits,
        "weights": weights, "tokens": tokens, "threads": o.threads,
        "bytes": sizes, "tokens_a_second": speeds, "xllamacpp": xllamacpp.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embedding_bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--one_bit", action="store_const", dest="mode", const="1bit",
                        default="ternary")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    o = parser.parse_args()
    log = RunLog(HERE / "runs.jsonl")
    for name in o.shapes:
        log.append(measure(o, name))
    table = []
    for run in log.runs:
        base, q4_0 = run["tokens_a_second"]["f32"], run["tokens_a_second"]["q4_0"]
        for kind, speeds in run["tokens_a_second"].items():
            ratios = [a / b for a, b in zip(speeds, base, strict=True)]
            to_q4_0 = [a / b for a, b in zip(speeds, q4_0, strict=True)]
            table.append(
                {
                    "shape": run["shape"],
                    "mode": run.get("mode", "ternary"),
                    "embedding_bits": run["embedding_bits"],
                    "type": kind,
                    "tokens_a_second": statistics.median(speeds),
                    "over_f32": statistics.median(ratios),
                    "over_f32_range": [min(ratios), max(ratios)],
                    "over_q4_0": statistics.median(to_q4_0),
                    "over_q4_0_range": [min(to_q4_0), max(to_q4_0)],
                    "threads": run["threads"],
                    "rounds": len(speeds),
                    "bytes": run["bytes"][kind],
                    "smaller_than_f32": 4 * run["weights"] / run["bytes"][kind],
                }
            )
    (HERE / "summary.json").write_text(json.dumps({"runs": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
