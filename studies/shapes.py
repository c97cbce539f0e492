"""Shapes of well-known models, as their config.json gives them."""

from __future__ import annotations

from typing import Any

LLAMA, QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}
#: (kind, width, inner width, layers, heads, heads of keys, vocabulary, whether the head is the
#: embedding)
SHAPES = {
    "SmolLM2-135M": (LLAMA, 576, 1536, 30, 9, 3, 49152, True),
    "SmolLM2-360M": (LLAMA, 960, 2560, 32, 15, 5, 49152, True),
    "Qwen2.5-0.5B": (QWEN2, 896, 4864, 24, 14, 2, 151936, True),
    "TinyLlama-1.1B": (LLAMA, 2048, 5632, 22, 32, 4, 32000, False),
    "Llama-3.2-1B": (LLAMA, 2048, 8192, 16, 32, 8, 128256, True),
}


def config(name: str) -> dict[str, Any]:
    """What `transformers_lm.from_config` takes for a shape of SHAPES."""
    kind, width, inner, layers, heads, keys, vocabulary, tied = SHAPES[name]
    return {
        **kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
