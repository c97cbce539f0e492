"""What a conversion of models of well-known shapes will ask for, by the program's own estimate:
python benchmarks/estimates/measure.py

Shapes only, no weights. Rewrites summary.json beside this file. Needs the extra hf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.models.transformers_lm import from_config  # noqa: E402
from lowbit.training.estimate import GIB, memory_needed, weights  # noqa: E402
from studies.bench import machine  # noqa: E402

PASS = 1024  # tokens, the default on a CPU
LLAMA, QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}
#: (shape, what its config.json says): width, inner width, layers, heads, heads of keys, vocabulary,
#: whether the head is the embedding.
SHAPES = {
    "SmolLM2-135M": (LLAMA, 576, 1536, 30, 9, 3, 49152, True),
    "SmolLM2-360M": (LLAMA, 960, 2560, 32, 15, 5, 49152, True),
    "Qwen2.5-0.5B": (QWEN2, 896, 4864, 24, 14, 2, 151936, True),
    "TinyLlama-1.1B": (LLAMA, 2048, 5632, 22, 32, 4, 32000, False),
    "Llama-3.2-1B": (LLAMA, 2048, 8192, 16, 32, 8, 128256, True),
}


def main() -> None:
    table = []
    for name, (kind, width, inner, layers, heads, keys, vocabulary, tied) in SHAPES.items():
        with torch.device("meta"):
            model = from_config(
                {
                    **kind,
                    "hidden_size": width,
                    "intermediate_size": inner,
                    "num_hidden_layers": layers,
                    "num_attention_heads": heads,
                    "num_key_value_heads": keys,
                    "vocab_size": vocabulary,
                    "tie_word_embeddings": tied,
                }
            )
        trained = weights(model) - weights(model.embedding)
        gib = {
            recomputes: memory_needed(model, PASS, trained=trained, recomputes=recomputes, held=2)
            / GIB
            for recomputes in (False, True)
        }
        row = {"shape": name, "weights": weights(model), "gib": gib[False]}
        table.append({**row, "gib_activation_checkpointing": gib[True]})
        print(table[-1])
    (HERE / "summary.json").write_text(json.dumps({"shapes": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
