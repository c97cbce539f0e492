"""A small packed student, for the tests of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.files.packed import save_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import quantize_model
from lowbit.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer().describe()
SMALL = ModelConfig(
    vocab_size=30, hidden_size=18, intermediate_size=26, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def small_model(mode: str, learnable: bool, **changes) -> CausalLM:
    """A quantised model whose latents, gains and scales have moved since conversion."""
    model = CausalLM(ModelConfig(**{**SMALL.to_dict(), **changes})).initialise(0).eval()
    quantize_model(model, mode, learnable_scale=learnable)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
            p.add_(0.05 * p.abs().mean() * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "small.npz"
    save_packed(path, small_model("ternary", False), TOKENIZER)
    return path


def members_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as z:
        return {k: z[k] for k in z.files}
