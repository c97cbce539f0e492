"""How GGUF says a model's shape, and how its tensors lie there.

llama.cpp has a program for each architecture, and some of a model's numbers are constants of that
program. A configuration with other numbers is refused, for the engine would compute something else
and say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit import UserError
from lowbit.extras import require
from lowbit.files.packed import Stored
from lowbit.files.padding import head_shape


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of a kind of model (``model_type``)."""

    architecture: str  # its name in GGUF
    rotary_pairs: bool = False  # rows of queries and keys: of each head pair by pair
    norms_add: float = 0.0  # to the weights of norms
    activation: str = "silu"
    full_every: int = 0  # every n-th layer sees all positions, the others a window; 0: no windows
    padded: bool = True  # zeros may fill its rows


LLAMA = Family("llama", rotary_pairs=True)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "smollm3": Family("smollm3", rotary_pairs=True),
    "gemma": Family("gemma", norms_add=1.0, activation="gelu_pytorch_tanh", padded=False),
    "gemma2": Family(
        "gemma2", norms_add=1.0, activation="gelu_pytorch_tanh", full_every=2, padded=False
    ),
    "gemma3_text": Family(
        "gemma3", norms_add=1.0, activation="gelu_pytorch_tanh", full_every=6, padded=False
    ),
    "phi": Family("phi2", activation="gelu_new", padded=False),
    "phi3": Family("phi3", padded=False),
}
#: Of SmolLM3, every fourth layer has no rotary positions.
UNROTATED_EVERY = 4


def family_of(config: dict[str, Any]) -> Family:
    """UserError for a kind of model that was not tried."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"a model of type {kind!r} cannot be exported to GGUF here; tried are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def check_shape(config: dict[str, Any]) -> None:
    """UserError for what llama.cpp computes otherwise than transformers does."""
    family = family_of(config)
    heads, _, size = head_shape(config)
    widths = (config["hidden_size"], config["intermediate_size"], heads * size)
    if odd := [n for n in widths if n % 32]:
        raise UserError(f"rows of {odd[0]} weights fit no block of GGUF (32 divide them)")
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        raise refused(config, f"activation {activation!r}", family.activation)
    layers = config["num_hidden_layers"]
    if family.full_every:
        every = _every(family.full_every, layers, "sliding_attention", "full_attention")
        if config.get("layer_types") not in (None, every):
            raise refused(
                config, "order of layers", f"a window in all but each {family.full_every}th"
            )
        if not config.get("sliding_window"):
            raise refused(config, "attention", "with windows")
        caps = [f"{name}_logit_softcapping" for name in ("attn", "final")]
        if config["model_type"] == "gemma2" and not all(config.get(name) for name in caps):
            raise refused(config, "attention or head", "whose logits are capped")
        if config["model_type"] == "gemma3_text" and config.get(caps[0]):
            raise refused(config, "attention", "whose logits have no cap")
        if config.get("query_pre_attn_scalar", size) != attention_size(config):
            raise refused(config, "scale of attention", f"that of {attention_size(config)}")
    if config["model_type"] == "smollm3" and config.get("no_rope_layers") != _every(
        UNROTATED_EVERY, layers, 1, 0
    ):
        raise refused(config, "no_rope_layers", f"every {UNROTATED_EVERY}th without positions")
    if config.get("use_bidirectional_attention"):
        raise refused(config, "attention to what follows", "attention to what went before")
    rope_of(config)


def refused(config: dict[str, Any], what: str, expected: str) -> UserError:
    return UserError(
        f"this {config['model_type']} cannot be exported to GGUF here: llama.cpp knows another "
        f"{what} ({expected})"
    )


def _every(n: int, count: int, usual: Any, nth: Any) -> list[Any]:
    return [usual if (i + 1) % n else nth for i in range(count)]


def attention_size(config: dict[str, Any]) -> float:
    """By whose root llama.cpp divides attention: a head's size, but of Gemma's largest models,
    which it knows by their layers, the hidden size over the heads."""
    heads, _, size = head_shape(config)
    largest = {"gemma2": 46, "gemma3_text": 62}.get(config["model_type"])
    return config["hidden_size"] // heads if config["num_hidden_layers"] == largest else size


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary positions, of layers without a window. UserError for a scaling that
    is not written here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ["default", "linear"]
    if family_of(config).architecture == "llama":  # the others read no factors
        known.append("llama3")
    if kind not in known:
        raise UserError(f"rotary positions of type {kind!r} cannot be exported to GGUF here")
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**rope, "rope_type": kind, "rope_theta": float(theta)}


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What Llama 3 divides each rotary frequency by, float32 (head size / 2,); None where nothing
    is divided."""
    if rope_of(config)["rope_type"] != "llama3":
        return None
    transformers = require("transformers", "hf")
    values = dict(config)
    shape = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    initial = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled = initial(shape, "cpu")[0].double().numpy()
    size = head_shape(config)[2]
    plain = rope_of(config)["rope_theta"] ** (-np.arange(0, size, 2) / size)
    return (plain / scaled).astype(np.float32)


def add_shape(writer: Any, gguf: Any, config: dict[str, Any]) -> None:
    """The architecture's numbers."""
    family = family_of(config)
    heads, key_heads, size = head_shape(config)
    window = config.get("sliding_window")
    context = config["max_position_embeddings"]
    if window and not family.full_every:  # llama.cpp gives this architecture no windows
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])

    rope = rope_of(config)
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(size * part))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if family.full_every:
        writer.add_sliding_window(window)
        near = (config.get("rope_parameters") or {}).get("sliding_attention", rope)
        writer.add_rope_freq_base_swa(near["rope_theta"])
    caps: dict[str, Callable[[float], None]] = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }
    for name, add in caps.items():
        if config.get(name):
            add(config[name])


def laid_out(name: str, stored: Stored, config: dict[str, Any]) -> Stored:
    """A tensor as its architecture has it."""
    family = family_of(config)
    if family.norms_add and name.endswith("norm.weight"):
        return Stored(stored.kind, stored.values + np.float32(family.norms_add), stored.scale)
    heads, key_heads, _ = head_shape(config)
    parts = {"q_proj": heads, "k_proj": key_heads}
    count = next((n for part, n in parts.items() if f".{part}." in name), None)
    if not family.rotary_pairs or count is None:
        return stored

    def moved(x: np.ndarray) -> np.ndarray:
        halves = x.reshape(count, 2, len(x) // count // 2, *x.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))

    scale = stored.scale
    if scale is not None and len(scale) > 1:
        scale = moved(scale)
    return Stored(stored.kind, moved(stored.values), scale)
