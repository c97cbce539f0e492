"""Which matrices get more bits: those whose low-bit rounding the loss feels most.

Rounding a matrix changes it by D. By the Gauss-Newton approximation the model's mean divergence
from itself as it was becomes E[<G, D>^2] / 2, G being the gradient of the log-probability of a
label that is drawn from the model's own distribution (the Fisher information, as in Optimal Brain
Surgeon; its sampled form: Martens, arXiv 1412.1193). Windows are drawn from text, and gradients
are of whole windows, so that what D does along its own direction is seen, massive activations
(arXiv 2402.17762) included, and not only entry by entry. Interactions between matrices are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

from lowbit.models.interface import LanguageModel, hooked
from lowbit.quantization.layers import block_layers


def rounding_costs(
    model: LanguageModel,
    windows: Sequence[torch.Tensor],
    changes: Mapping[str, torch.Tensor],
    generator: torch.Generator,
    *,
    progress: Callable[[Sequence], Iterable] = iter,
) -> dict[str, float]:
    """Estimated KL, nats a token, between the model as it is and with one matrix changed.

    windows: ids (1, T) each; changes: of layers as `block_layers` names them, to be added to their
    weights; generator: on the CPU. A layer's gradient is not kept. Parameters require gradients
    afterwards as they did before.
    """
    weights = {n: m.weight for n, m in block_layers(model).items() if n in changes}
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    costs = dict.fromkeys(weights, 0.0)

    def noting(name: str) -> Callable[[torch.Tensor], None]:
        def note(p: torch.Tensor) -> None:
            assert p.grad is not None
            change = changes[name]
            costs[name] += float((p.grad * change.to(p.grad.dtype)).sum(dtype=torch.float64)) ** 2
            p.grad = None

        return note

    for p in weights.values():
        p.requires_grad_(True)
    tokens = 0
    try:
        with hooked(p.register_post_accumulate_grad_hook(noting(n)) for n, p in weights.items()):
            for ids in progress(windows):
                with torch.enable_grad():
                    logits = model(ids).logits.float().flatten(0, 1)
                    chances = logits.detach().softmax(-1).cpu()
                    drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
                    F.cross_entropy(logits, drawn.to(ids.device), reduction="sum").backward()
                tokens += ids.numel()
    finally:
        for p, required in before:
            p.requires_grad_(required)
    return {n: c / (2 * tokens) for n, c in costs.items()}


def share_of_high(low: float, high: float, target: float) -> float:
    """Share of the weights that may have ``high`` bits, the others ``low``, for a mean of
    ``target``; below 0 where all with ``low`` are too many."""
    return (target - low) / (high - low)


def with_more_bits(
    costs: Mapping[str, float], sizes: Mapping[str, int], low: float, high: float, target: float
) -> set[str]:
    """Names of the matrices that get ``high`` bits a weight where others get ``low``, so that the
    mean over all weights is at most ``target``: in falling order of cost a weight, those that still
    fit."""
    room = share_of_high(low, high, target) * sum(sizes.values())
    chosen: set[str] = set()
    for name in sorted(costs, key=lambda n: costs[n] / sizes[n], reverse=True):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen
