"""What a run needs of a decoder, whoever wrote it.

Ids go in; hidden states come out, after every block and as the head reads them; the head is
apart, so that a loss over a large vocabulary can be taken in chunks. Blocks can be called one at a
time. Shapes: B sequences, T positions, V vocabulary, C hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Features:
    final: torch.Tensor  # (B, T, C), what the head reads
    hidden_states: list[torch.Tensor]  # after every block, each (B, T, C)
    cache: Any = None  # keys and values so far, for the next positions


@dataclass
class Output:
    logits: torch.Tensor  # (B, T, V)
    hidden_states: list[torch.Tensor]
    cache: Any = None


class LanguageModel(nn.Module):
    """A decoder: token ids (B, T) -> logits (B, T, V)."""

    vocab_size: int
    hidden_size: int
    max_positions: int

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order in which the residual stream passes them."""
        raise NotImplementedError

    @property
    def stored(self) -> nn.Module:
        """The module whose state dict names the weights as files do."""
        return self

    @property
    def embedding(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def output(self) -> nn.Linear | None:
        """The head's layer; None where the head is the embedding's weight."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The model's shape, as a file's header holds it."""
        raise NotImplementedError

    def features(self, ids: torch.Tensor, cache: Any = None, *, keep: bool = False) -> Features:
        """ids (B, T) of the positions that follow ``cache`` (or start the text) -> Features; with
        ``keep`` their cache is for the next call."""
        raise NotImplementedError

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        return self.logits(x, *self.head_parameters())

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`head` with its parameters given."""
        return F.linear(x, weight, bias)

    def head_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The head's weight (V, C), as the forward pass sees it, and its bias (V,)."""
        layer: Any = self.embedding if self.output is None else self.output
        rounded = getattr(layer, "quantized_weight", None)
        return rounded() if rounded else layer.weight, getattr(layer, "bias", None)

    def forward(self, ids: torch.Tensor, cache: Any = None, *, keep: bool = False) -> Output:
        found = self.features(ids, cache, keep=keep)
        return Output(self.head(found.final), found.hidden_states, found.cache)


# ------------------------------------------------------------------------------ block by block


class _Enough(Exception):
    """Raised by a hook to end a forward pass of which enough was seen."""


@dataclass
class Call:
    """What a block is given besides the residual stream: masks, positions, rotary tables."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The stream (B, T, C) after the block. B is as it was when this was recorded, or 1 was."""
        out = block(x, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def block_calls(model: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
    """The stream (B, T, C) that enters the first block, and how each block is called."""
    entering: list[torch.Tensor] = []
    calls: list[Call] = []

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        stream = args[0] if args else kwargs.pop("hidden_states")
        if not entering:
            entering.append(stream)
        calls.append(Call(args[1:], kwargs))

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in model.blocks]
    try:
        model.features(ids)
    finally:
        for handle in handles:
            handle.remove()
    return entering[0], calls


@torch.no_grad()
def entering_stream(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """The stream (B, T, C) that enters the first block."""
    found: list[torch.Tensor] = []

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = model.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.features(ids)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


@dataclass
class Wiring:
    """How the linear layers of a block hang together, found by running it.

    groups: names of layers that read the same tensor, in the order in which they are run.
    writers: names of layers whose outputs are added to the residual stream as they are; empty
    where a block does something else with them (a norm after them, say).
    """

    groups: list[list[str]]
    writers: list[str]


@torch.no_grad()
def wiring(block: nn.Module, call: Call, x: torch.Tensor) -> Wiring:
    """Run a block on a stream (B, T, C) and see which layers read what and which write to it."""
    reads: dict[str, torch.Tensor] = {}
    gives: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            reads[name], gives[name] = inputs[0], output

        return note

    handles = [m.register_forward_hook(hook(n)) for n, m in linear_layers(block).items()]
    try:
        after = call(block, x)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    for name, tensor in reads.items():
        same = [g for g in groups if reads[g[0]] is tensor]
        if same:
            same[0].append(name)
        else:
            groups.append([name])
    wide = [n for n in reads if gives[n].shape == x.shape and n in [g[0] for g in groups[1:]]]
    change = after - x
    rest = change - sum(gives[n] for n in wide) if wide else change
    plain = bool(rest.norm() <= 1e-3 * change.norm())
    return Wiring(groups, wide if plain else [])


@contextmanager
def outputs_of(layers: dict[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, what these layers give is noted."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found[name] = output

        return note

    handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_of(block: nn.Module, layer: nn.Linear, call: Call, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the block reads when the stream is x; what comes after it is not run."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        found.append(inputs[0])
        raise _Enough

    handle = layer.register_forward_pre_hook(note)
    try:
        call(block, x)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def accepts(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters
