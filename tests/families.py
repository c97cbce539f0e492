"""Tiny models of other projects' kinds, made on the spot with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
#: What sets a family apart, beyond SHAPE.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(tie_word_embeddings=True),
    "mistral": dict(tie_word_embeddings=False, sliding_window=8),
    "qwen2": dict(tie_word_embeddings=True, use_sliding_window=False),
    "qwen3": dict(tie_word_embeddings=False, head_dim=16),
    "smollm3": dict(tie_word_embeddings=True, no_rope_layers=[1, 0, 1]),
    "gemma": dict(head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3_text": dict(head_dim=16, sliding_window=8),
    "phi": dict(tie_word_embeddings=False, partial_rotary_factor=0.5),
    "phi3": dict(tie_word_embeddings=False),
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def tiny_net(kind: str, **changes: Any) -> Any:
    """A model of a family, weights large enough for its parts to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES[kind], **changes})
    net = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) * p.shape[1] ** -0.5)
            elif "bias" in name:
                p.copy_(torch.randn(p.shape) * 0.1)
            else:
                p.add_(torch.randn(p.shape) * 0.1)
    return net.eval()


def tiny_tokenizer(size: int = 300) -> Any:
    """Byte-level BPE with two special tokens and a chat template."""
    from conftest import make_text
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(4000)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = CHAT
    return wrapped


def tiny_folder(folder: Path, kind: str, **changes: Any) -> Path:
    """A Hugging Face folder with such a model and tokenizer."""
    tiny_net(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
