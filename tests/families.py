"""Tiny models of other projects' kinds, made on the spot with random weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
# Rows that every type takes.
WIDE = dict(
    vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64
)  # fmt: skip
# Windows of 16 tokens, scaled positions, or layers without positions.
LONG = dict(rope_type="linear", factor=4.0, rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
SMOLLM3 = dict(num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1])
GEMMA2 = dict(
    num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=64,
    attn_logit_softcapping=5.0, final_logit_softcapping=8.0,
)  # fmt: skip
GEMMA3 = dict(
    num_hidden_layers=7, sliding_window=16, query_pre_attn_scalar=64,
    rope_parameters=dict(
        full_attention=LONG, sliding_attention=dict(rope_type="default", rope_theta=1e3)
    ),
)  # fmt: skip
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


def tiny_tokenizer(size: int = 300, opens: bool = False) -> Any:
    """Byte-level BPE with two special tokens and a chat template. opens: it puts the first of them
    before a text."""
    from conftest import make_text
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = CHAT
    return wrapped


def pieces_tokenizer(opens: bool = True, pieces: int = 200) -> Any:
    """BPE of pieces, as transformers makes it of SentencePiece's: frequent pieces, the best first,
    bytes for what has none. opens: a space is put before a text."""
    from conftest import make_text
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    text = make_text(4000).replace(" ", "\u2581")
    letters = sorted(set(text) - {"\n"})
    parts = (text[i : i + n] for n in (2, 3, 4, 5) for i in range(len(text) - n))
    counts = Counter(p for p in parts if "\n" not in p)
    known = set(letters)
    found: list[str] = []
    for piece, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0])):
        if any(piece[:i] in known and piece[i:] in known for i in range(1, len(piece))):
            found.append(piece)
            known.add(piece)
        if len(found) == pieces:
            break
    merges = [
        (p[:i], p[i:]) for p in found for i in range(1, len(p)) if p[:i] in known and p[i:] in known
    ]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *found, *letters])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if opens else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_folder(folder: Path, kind: str, **changes: Any) -> Path:
    """A Hugging Face folder with such a model and tokenizer."""
    tiny_net(kind, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(
    path: Path,
    quantization: str = "Q8_0",
    layers: int = 3,
    says: int | None = None,
    opens: bool | None = None,
) -> Path:
    """A tiny Llama as GGUF, written with the format's own library. says: how many layers it claims
    to have; opens: what it says of a token before every text."""
    import gguf

    net = tiny_net("llama", vocab_size=300, num_hidden_layers=layers)
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(says or layers)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    tokenizer = tiny_tokenizer(300)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if opens is not None:
        writer.add_add_bos_token(opens)
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    }  # fmt: skip
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for i in range(layers):
        names |= {f"model.layers.{i}.{k}.weight": f"blk.{i}.{v}.weight" for k, v in parts.items()}
    kind = gguf.GGMLQuantizationType[quantization]
    for name, value in state.items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # the llama architecture's order of rotary pairs
                rows = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)
                value = rows.swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 2:
            writer.add_tensor(names[name], gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def student(
    folder: Path, kind: str, mode: str = "ternary", cut: str = "gpt-2", bits: int = 8, **changes
) -> Path:
    """A packed student with random codes; first block, embedding and head in so many bits."""
    if kind == "qwen3":  # transformers' reader of GGUF takes no other
        changes = {"head_dim": 128, **changes}
    from lowbit.files.packed import save_packed
    from lowbit.models.transformers_lm import TransformersLM
    from lowbit.quantization.layers import edge_layers, quantize_model
    from lowbit.text import pre_tokenizers
    from lowbit.text.tokenizers import TeacherTokenizer

    net = tiny_net(kind, **{**WIDE, **changes})
    tokenizer = tiny_tokenizer(300)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.make(cut)
    tokenizer.backend_tokenizer.model.ignore_merges = cut in pre_tokenizers.WHOLE_WORDS
    model = TransformersLM(net)
    quantize_model(model, mode, more=edge_layers(model, 1), high_bits=bits, embedding_bits=bits)
    path = folder / "student.npz"
    save_packed(path, model, TeacherTokenizer(tokenizer, 320).describe())
    return path


def heard_by_engine(
    path: Path, letter: int, context: int = 256, most: int = 200
) -> Callable[[str | list[int]], dict[int, float]]:
    """What the engine says of the token after a text or after ids: {id: log-probability}, of the
    most likely ones, before the bias that makes it go on with a letter."""
    pytest.importorskip("xllamacpp")
    from lowbit.chat import open_server

    server = open_server(path, context, threads=2)

    def heard(prompt: str | list[int]) -> dict[int, float]:
        answer = server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "n_probs": most, "cache_prompt": False,
             "logit_bias": [[letter, 1000.0]]}
        )  # fmt: skip
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {x["id"]: x["logprob"] for x in top}

    return heard


def of_pieces(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> Path:
    """A student with a tokenizer of pieces."""
    from lowbit.files.packed import save_packed
    from lowbit.models.transformers_lm import TransformersLM
    from lowbit.text.tokenizers import TeacherTokenizer

    size = len(tokenizer)
    net = tiny_net(kind, **{**WIDE, "vocab_size": size, "max_position_embeddings": 512, **changes})
    path = folder / "student.npz"
    save_packed(path, TransformersLM(net), TeacherTokenizer(tokenizer, size).describe())
    return path
