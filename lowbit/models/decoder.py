"""A Llama-shaped decoder, written plainly; parameter names are Hugging Face's Llama names.

RMSNorm (arXiv 1910.07467), rotary positions (arXiv 2104.09864, half-split layout as in Hugging
Face), SwiGLU (arXiv 2002.05202), no biases. Shapes: B sequences, T positions, V vocabulary,
C hidden size, H heads, K key/value heads, D = C / H.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowbit import UserError
from lowbit.models.interface import Features, LanguageModel


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Field names follow Hugging Face's ``LlamaConfig``. UserError for values
    that are out of range or do not fit together."""

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "tie_word_embeddings":
                ok = isinstance(value, bool)
            elif f.type == "int":
                ok = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
            else:
                ok = isinstance(value, (int, float)) and 0.0 < value < float("inf")
            if not ok:
                raise UserError(f"model config: {f.name} cannot be {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise UserError("model config: rotary positions need an even head size")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> ModelConfig:
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError("model config: fields missing or unknown")
        return cls(**values)


#: Named student sizes. Row lengths are multiples of 256 so that 256-weight ternary blocks fit.
STUDENT_SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1),
    "small": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2),
    "base": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3),
    "large": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4),
}

KV = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on x (B, T, H, D); cos and sin (T, 1, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_size = c.hidden_size // c.num_attention_heads
        kv = self.kv_heads * self.head_size
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def mix(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: KV | None
    ) -> tuple[torch.Tensor, KV]:
        """What o_proj reads, (B, T, C)."""
        b, t, c = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_size)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_size)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_size).transpose(1, 2)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        gqa = self.kv_heads != self.heads
        if past is None or t == 1:  # one query sees everything: no mask
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=gqa)
        else:
            seen = torch.ones(t, k.size(2), dtype=torch.bool, device=x.device)
            mask = seen.tril(k.size(2) - t)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return y.transpose(1, 2).reshape(b, t, c), (k, v)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: KV | None
    ) -> tuple[torch.Tensor, KV]:
        mixed, present = self.mix(x, cos, sin, past)
        return self.o_proj(mixed), present


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """What down_proj reads."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: KV | None
    ) -> tuple[torch.Tensor, KV]:
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """The body: ``model.*`` in a state dict."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class CausalLM(LanguageModel):
    """The decoder with its head: ids (B, T) -> logits (B, T, V). Its cache is a list with a pair of
    keys and values, each (B, K, T, D), for every layer."""

    cos: torch.Tensor  # (max_position_embeddings, D)
    sin: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.max_position_embeddings
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        size = config.hidden_size // config.num_attention_heads
        inverse = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(config.max_position_embeddings), inverse)  # (T, D/2)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def initialise(self, seed: int) -> CausalLM:
        """Draw weights from N(0, 1/fan_in), outputs of blocks scaled by 1/sqrt(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 1:
                    p.fill_(1.0)
                    continue
                std = p.size(1) ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= depth
                p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def output(self) -> nn.Linear | None:
        return None if self.config.tie_word_embeddings else self.lm_head

    def describe(self) -> dict:
        return self.config.to_dict()

    def features(
        self, ids: torch.Tensor, cache: list[KV] | None = None, *, keep: bool = False
    ) -> Features:
        """As the interface says; the cache is always there.

        Raises ValueError where cache and ids together pass max_position_embeddings.
        """
        start = cache[0][0].size(2) if cache else 0
        end = start + ids.size(1)
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{end} positions; this model has {self.cos.size(0)}")
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = (a[start:end, None].to(x.dtype) for a in (self.cos, self.sin))  # (T, 1, D)
        hidden, presents = [], []
        for i, layer in enumerate(self.model.layers):
            x, present = layer(x, cos, sin, cache[i] if cache else None)
            hidden.append(x)
            presents.append(present)
        return Features(self.model.norm(x), hidden, presents)

    def rows_of(self, cache: list[KV], rows: torch.Tensor) -> list[KV]:
        return [(keys[rows], values[rows]) for keys, values in cache]
