"""What a run needs of a decoder, whoever wrote it.

Ids go in; hidden states come out, after every block and as the head reads them; the head is
apart, so that a loss over a large vocabulary can be taken in chunks. Blocks can be called one at a
time. Shapes: B sequences, T positions, V vocabulary, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lowbit import UserError


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

    def rows_of(self, cache: Any, rows: torch.Tensor) -> Any:
        """The cache of these sequences (n,) of its batch, in this order. The one that is given may
        change with it: do not use it again."""
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


def require_state(
    expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor], origin: str
) -> None:
    """UserError where names or shapes differ from those expected, or values are not finite."""
    want = {k: tuple(v.shape) for k, v in expected.items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    odd = sorted(k for k in want.keys() | found.keys() if want.get(k) != found.get(k))
    if odd:
        raise UserError(f"{origin}: tensor {odd[0]} is missing, unknown or of the wrong shape")
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{origin}: tensor {name} holds values that are not finite")


# ------------------------------------------------------------------------------ block by block


class _Enough(Exception):
    """Raised by a hook to end a forward pass of which enough was seen."""


@dataclass
class Call:
    """What a block is given besides the residual stream: masks, positions, rotary tables."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The stream (B, T, C) after the block of the stream x (B, T, C) before. T is that of the
        recording, and so is B, unless one window was recorded."""
        out = block(x, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Inside, these hooks are there."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the forward pass keeps what enters each block and no more; the backward pass runs
    the block again for the rest (activation checkpointing, arXiv 1604.06174)."""
    held = list(blocks)
    for block in held:
        again = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=block.training
        )
        block.__dict__["forward"] = again
    try:
        yield
    finally:
        for block in held:
            del block.__dict__["forward"]


def stream_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream among what a block is given."""
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def block_calls(model: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
    """The stream (B, T, C) that enters the first block, and how each block is called."""
    entering: list[torch.Tensor] = []
    calls: list[Call] = []

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        entering.append(stream_of(args, kwargs))
        rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
        calls.append(Call(args[1:], rest))

    with hooked(b.register_forward_pre_hook(note, with_kwargs=True) for b in model.blocks):
        model.features(ids)
    return entering[0], calls


@torch.no_grad()
def given_to(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """What a module is given when ``run`` runs; what comes after it is not run."""
    found: list[tuple[tuple, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Enough

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    with hooked([handle]), suppress(_Enough):
        run()
    return found[0]


def entering_stream(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """The stream (B, T, C) that enters the first block."""
    return stream_of(*given_to(model.blocks[0], lambda: model.features(ids)))


def input_of(block: nn.Module, layer: nn.Linear, call: Call, x: torch.Tensor) -> torch.Tensor:
    """What a layer of the block reads when the stream is x."""
    return given_to(layer, lambda: call(block, x))[0][0]


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


SAME = 0.01  #: relative; a sum in bfloat16, here or in a block, is wrong by 0.2 %


@dataclass
class Wiring:
    """How the linear layers of a block hang together, found by running it.

    groups: names of layers that read the same tensor, in the order in which they are run.
    writers: names of layers that write to the residual stream, and of the modules whose outputs
    are added to it: the layer itself, or an RMS norm (arXiv 1910.07467) that reads it, as in Gemma
    2 and 3. Empty where a block does something else with them.
    """

    groups: list[list[str]]
    writers: dict[str, str]


@contextmanager
def noted(
    layers: Mapping[str, nn.Module], what: Callable[[tuple, torch.Tensor], Any] = lambda _, out: out
) -> Iterator[dict[str, Any]]:
    """Inside, what these modules give is noted, in the order in which they run; or ``what`` makes
    of their inputs and their output."""
    found: dict[str, Any] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found[name] = what(inputs, output)

        return note

    with hooked(m.register_forward_hook(hook(n)) for n, m in layers.items()):
        yield found


def gains_of(norm: nn.Module, size: int, device: torch.device) -> torch.Tensor:
    """What an RMS norm multiplies its `size` channels by, (C,): what it makes of ones."""
    return norm(torch.ones(1, 1, size, device=device)).flatten().float()


def is_rms_norm(module: nn.Module, x: torch.Tensor, out: Any) -> bool:
    """Whether a module that made ``out`` of x, both (B, T, C), divides by the root mean square over
    channels and multiplies each channel by a number."""
    leaf = next(module.children(), None) is None
    if not leaf or not isinstance(out, torch.Tensor) or out.shape != x.shape:
        return False
    root = x.float().square().mean(-1, keepdim=True).sqrt()
    rest = out.float() * root - x.float() * gains_of(module, x.size(-1), x.device)
    return bool(rest.norm() <= SAME * (out.float() * root).norm())


@torch.no_grad()
def wiring(block: nn.Module, call: Call, x: torch.Tensor) -> Wiring:
    """Run a block on a stream (B, T, C) and see which layers read what and which write to it."""
    layers = linear_layers(block)
    others = {n: m for n, m in block.named_modules() if n and n not in layers}
    with noted({**layers, **others}, lambda inputs, output: (inputs, output)) as found:
        after = call(block, x)
    reads = {n: inputs[0] for n, (inputs, _) in found.items() if n in layers}
    gives = {n: output for n, (_, output) in found.items()}
    groups: list[list[str]] = []
    for name, tensor in reads.items():
        same = [g for g in groups if reads[g[0]] is tensor]
        if same:
            same[0].append(name)
        else:
            groups.append([name])
    wide = [n for n in reads if gives[n].shape == x.shape and n in [g[0] for g in groups[1:]]]
    writers = {n: n for n in wide}
    for name, (inputs, output) in found.items():
        read = [n for n in wide if inputs and inputs[0] is gives[n]]
        if read and name in others and is_rms_norm(others[name], inputs[0], output):
            writers[read[0]] = name
    change = after.float() - x.float()
    rest = change - sum(gives[n].float() for n in writers.values()) if writers else change
    plain = bool(rest.norm() <= SAME * change.norm())
    return Wiring(groups, writers if plain else {})
