"""The decoder against an independent float64 reimplementation, and its cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import LINEAR_NAMES

from lowbit import UserError
from lowbit.models.decoder import STUDENT_SIZES, CausalLM, ModelConfig

CONFIGS = {
    "tied": dict(),
    "untied": dict(tie_word_embeddings=False),
    "grouped": dict(num_key_value_heads=2),
    "multiquery": dict(num_key_value_heads=1, rope_theta=500.0),
    "flat": dict(num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=1e-2),
}


def small(**changes) -> ModelConfig:
    values = dict(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=20,
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


def random_model(seed: int = 0, **changes) -> CausalLM:
    """Random weights everywhere, the norms' gains included."""
    model = CausalLM(small(**changes)).initialise(seed).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
    return model


def random_ids(b: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (b, t), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------- the naive reimplementation


def naive_logits(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """One sequence (T,) -> logits (T, V), with loops over positions and heads, in float64."""
    c = model.config
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}
    size = c.hidden_size // c.num_attention_heads
    group = c.num_attention_heads // c.num_key_value_heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * w[name]

    def turn(v: np.ndarray, position: int) -> np.ndarray:
        out = np.empty_like(v)
        for i in range(size // 2):
            angle = position / c.rope_theta ** (2 * i / size)
            a, b = v[i], v[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}."
        y = norm(x, p + "input_layernorm.weight")
        q, k, v = (y @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        mixed = np.zeros_like(x)
        for head in range(c.num_attention_heads):
            mine = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            for t in range(len(ids)):
                query = turn(q[t, mine], t)
                scores = np.array([query @ turn(k[s, shared], s) for s in range(t + 1)])
                weights = np.exp((scores - scores.max()) / math.sqrt(size))
                mixed[t, mine] = weights / weights.sum() @ v[: t + 1, shared]
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, p + "post_attention_layernorm.weight")
        gate = y @ w[p + "mlp.gate_proj.weight"].T
        up = y @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    head_name = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[head_name].T


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_logits_match_naive_float64(changes: dict) -> None:
    """RMSNorm, rotary, grouped attention and SwiGLU agree with loops in float64."""
    model = random_model(3, **changes)
    ids = random_ids(2, 13)
    got = model(ids).logits.numpy()
    want = np.stack([naive_logits(model, row) for row in ids.numpy()])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- cache, causality


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 4, 3], [1, 11], [11, 1], [6, 1, 1, 4]])
@torch.no_grad()
def test_cache_gives_the_full_forward(changes: dict, sizes: list[int]) -> None:
    """Reading a text in chunks with the cache equals reading it at once."""
    model = random_model(**changes)
    ids = random_ids(2, 12)
    full = model(ids)
    cache, parts, start = None, [], 0
    for size in sizes:
        out = model(ids[:, start : start + size], cache)
        cache = out.cache
        parts.append(out.logits)
        start += size
        assert cache[0][0].shape == (2, model.config.num_key_value_heads, start,
                                     24 // model.config.num_attention_heads)  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, dim=1), full.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_no_position_sees_later_ones(changes: dict) -> None:
    """Changing token t leaves the logits before t alone and moves those at t."""
    model = random_model(**changes)
    ids = random_ids(1, 10)
    before = model(ids).logits
    for t in range(10):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 31
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@torch.no_grad()
def test_rows_of_a_batch_are_independent() -> None:
    model = random_model()
    ids = random_ids(3, 8)
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_depends_on_relative_positions_only() -> None:
    """A cache of one repeated token and the same token again: every logit is the same."""
    model = random_model()
    logits = model(torch.full((1, 10), 7)).logits
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_those_after_every_block() -> None:
    """The last one, normed and through the head, is the logits."""
    model = random_model()
    out = model(random_ids(2, 5))
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 5, 24)] * 2
    assert torch.equal(model.head(model.model.norm(out.hidden_states[-1])), out.logits)


@torch.no_grad()
def test_too_many_positions_raise() -> None:
    """max_position_embeddings counts the cache as well."""
    model = random_model()
    out = model(random_ids(1, 20))
    with pytest.raises(ValueError, match="21 positions"):
        model(random_ids(1, 21))
    with pytest.raises(ValueError, match="21 positions"):
        model(random_ids(1, 1), out.cache)


# ------------------------------------------------------------------------------- names, config


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_are_hugging_faces(tied: bool) -> None:
    """Exactly the names and shapes of a LlamaForCausalLM checkpoint without biases."""
    want = {"model.embed_tokens.weight": (31, 24), "model.norm.weight": (24,)}
    if not tied:
        want["lm_head.weight"] = (31, 24)
    for i in range(2):
        p = f"model.layers.{i}."
        want |= {
            p + "self_attn.q_proj.weight": (24, 24),
            p + "self_attn.k_proj.weight": (12, 24),
            p + "self_attn.v_proj.weight": (12, 24),
            p + "self_attn.o_proj.weight": (24, 24),
            p + "mlp.gate_proj.weight": (40, 24),
            p + "mlp.up_proj.weight": (40, 24),
            p + "mlp.down_proj.weight": (24, 40),
            p + "input_layernorm.weight": (24,),
            p + "post_attention_layernorm.weight": (24,),
        }
    model = CausalLM(small(num_key_value_heads=2, tie_word_embeddings=tied))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == want
    linear = {k.split(".")[-2] for k, v in want.items() if len(v) == 2}
    assert linear - {"embed_tokens", "lm_head"} == set(LINEAR_NAMES)


def test_initialise_is_seeded_and_scaled() -> None:
    """Same seed, same weights; deviation 1/sqrt(fan_in), outputs of blocks by 1/sqrt(2 L)."""
    config = ModelConfig(num_hidden_layers=2)
    a, b, c = (CausalLM(config).initialise(s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    for name, value in a.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value))
            continue
        want = value.size(1) ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1)
        assert value.std().item() == pytest.approx(want, rel=0.02), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=0), "hidden_size cannot be 0"),
        (dict(hidden_size=-4), "hidden_size cannot be -4"),
        (dict(vocab_size=2**31), "vocab_size cannot be"),
        (dict(num_hidden_layers=1.0), "num_hidden_layers cannot be 1.0"),
        (dict(num_hidden_layers=True), "num_hidden_layers cannot be True"),
        (dict(vocab_size="31"), "vocab_size cannot be '31'"),
        (dict(rope_theta=math.nan), "rope_theta cannot be nan"),
        (dict(rope_theta=math.inf), "rope_theta cannot be inf"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps cannot be 0.0"),
        (dict(rms_norm_eps=None), "rms_norm_eps cannot be None"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings cannot be 1"),
        (dict(hidden_size=26), "hidden_size 26 is not a multiple of num_attention_heads 4"),
        (dict(hidden_size=20), "even head size"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    ],
)
def test_config_errors(changes: dict, message: str) -> None:
    """Every impossible shape is refused by the name of its field."""
    with pytest.raises(UserError) as e:
        small(**changes)
    assert message in str(e.value)


def test_config_round_trip() -> None:
    config = small(num_key_value_heads=2, rope_theta=123.5)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("damage", ["missing", "unknown", "list", "none"])
def test_config_from_dict_wants_exactly_the_fields(damage: str) -> None:
    values: object = {
        "missing": {k: v for k, v in small().to_dict().items() if k != "rope_theta"},
        "unknown": small().to_dict() | {"bias": True},
        "list": list(small().to_dict()),
        "none": None,
    }[damage]
    with pytest.raises(UserError, match="fields missing or unknown"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("size", STUDENT_SIZES)
def test_named_sizes_are_valid(size: str) -> None:
    """Every named size is a config whose rows fit 256-weight blocks."""
    config = ModelConfig(**STUDENT_SIZES[size])
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
