"""Zeros that make a model's rows multiples of a block, and leave what it computes as it is.

The hidden and the intermediate size grow at their ends. Heads of queries are added to every group
that shares a head of keys, or heads of keys with their groups, whichever is less: query head h uses
head of keys h // (heads of a group) before and after. What is added reads and writes only zeros, so
it stays zero. Norms divide by the root of a mean, which n zeros among N make smaller: with their
weights times r = sqrt((N - n) / N) and eps times r^2 they are what they were. The norms of Qwen3's
queries and keys are of a head, which does not grow, but have the same eps: of those, a head with
mean square s is longer by a factor of at most 1 + eps / 2 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.files.packed import Packed, Stored

#: Part of a name -> what its rows and its columns are; the bias of a matrix is as its rows.
AXES = {
    "embed_tokens": ("", "hidden"), "lm_head": ("", "hidden"),
    "q_proj": ("queries", "hidden"), "k_proj": ("keys", "hidden"), "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "queries"), "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"), "down_proj": ("hidden", "inner"),
    "input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",), "norm": ("hidden",),
}  # fmt: skip


def head_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, and a head's size."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, size


def axes_of(name: str) -> tuple[str, ...]:
    return AXES.get(name.split(".")[-2:][0], ())


@dataclass
class Padding:
    """The padded model's config, and of each kind of axis where entries go and its new length."""

    config: dict[str, Any]
    axes: dict[str, tuple[np.ndarray, int]]

    def size(self, name: str, stored: Stored) -> int:
        """Weights of a tensor that is padded."""
        size = stored.values.size
        for kind, n in zip(axes_of(name), stored.values.shape, strict=False):
            size = size // n * (self.axes[kind][1] if kind else n)
        return size

    def __str__(self) -> str:
        rows = {k: (len(places), n) for k, (places, n) in self.axes.items() if k != "keys"}
        grown = dict.fromkeys(f"{a} padded to {b}" for a, b in rows.values() if a < b)
        return f"rows of {' and of '.join(grown)} with zeros"

    def growth(self, found: Packed) -> float:
        """Weights of the padded model over the model's."""
        after = sum(self.size(name, t) for name, t in found.tensors.items())
        return after / sum(t.values.size for t in found.tensors.values())

    def __call__(self, name: str, stored: Stored) -> Stored:
        """The padded tensor; codes and scales that are added are 0."""
        values, scale = stored.values, stored.scale
        for axis, kind in enumerate(axes_of(name)[: values.ndim]):
            if kind:
                values = self._spread(values, axis, kind)
                if scale is not None and scale.shape[axis] > 1:
                    scale = self._spread(scale, axis, kind)
        if axes_of(name) == ("hidden",):
            values = values * np.float32(math.sqrt(stored.values.size / values.size))
        return Stored(stored.kind, values, scale)

    def _spread(self, x: np.ndarray, axis: int, kind: str) -> np.ndarray:
        """Entries of an axis, or one for so many of them, at their new places."""
        places, length = self.axes[kind]
        each = len(places) // x.shape[axis]
        out = np.zeros((*x.shape[:axis], length // each, *x.shape[axis + 1 :]), x.dtype)
        out[(slice(None),) * axis + (places[::each] // each,)] = x
        return out


def padding(config: dict[str, Any], block: int) -> Padding:
    """The smallest with which ``block`` divides all rows of a model of transformers."""

    def end(n: int) -> tuple[np.ndarray, int]:
        return np.arange(n), -(-n // block) * block

    heads, keys, size = head_shape(config)
    group = heads // keys
    step = block // math.gcd(block, size)  # so many heads fill whole blocks
    _, more, wide = min(
        (k * g + k, k, g)
        for k in range(keys, keys + step)
        for g in range(group, group + step)
        if k * g % step == 0
    )
    moved = (np.arange(keys)[:, None] * wide + np.arange(group)).ravel()
    places, hidden = end(config["hidden_size"])
    if config["model_type"] == "qwen2":  # whose heads llama.cpp takes to fill the hidden size
        hidden = max(hidden, more * wide * size)
    axes = {
        "hidden": (places, hidden),
        "queries": ((moved[:, None] * size + np.arange(size)).ravel(), more * wide * size),
        "keys": (np.arange(keys * size), more * size),
        "inner": end(config["intermediate_size"]),
    }
    changes = {
        "hidden_size": hidden,
        "intermediate_size": axes["inner"][1],
        "num_attention_heads": more * wide,
        "num_key_value_heads": more,
        "head_dim": size,
        "rms_norm_eps": config["rms_norm_eps"] * config["hidden_size"] / hidden,
    }
    return Padding({**config, **changes}, axes)
