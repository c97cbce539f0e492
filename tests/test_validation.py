"""Validation against whole logits in float64, the best state of a run, and what it will take."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.training import estimate, validation
from lowbit.training.validation import Best, Reference

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_loss_and_distance_are_those_of_whole_logits(monkeypatch, at_once):
    """At once, or in chunks of one token."""
    monkeypatch.setattr("lowbit.training.losses.LOGITS_AT_ONCE", at_once)
    monkeypatch.setitem(validation.EVAL_TOKENS, "cpu", 20)
    windows = np.random.default_rng(0).integers(0, 50, (7, 9))
    teacher, student = CausalLM(CONFIG).initialise(0), CausalLM(CONFIG).initialise(1)
    reference = Reference(teacher, windows, CPU)
    found = reference.validate(student)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        q = torch.log_softmax(student(ids[:, :-1]).logits.double(), -1)
        p = torch.log_softmax(teacher(ids[:, :-1]).logits.double(), -1)
    each = -q.gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    assert found.loss == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.error == pytest.approx(float(each.std(unbiased=False)) / math.sqrt(7), rel=1e-3)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    own = -p.gather(-1, ids[:, 1:, None]).mean()
    assert reference.teacher_loss == pytest.approx(float(own), rel=1e-5)


def test_the_best_state_comes_back(tmp_path):
    model = CausalLM(CONFIG).initialise(0)
    model.embedding.weight.requires_grad_(False)
    best = Best(model, tmp_path)
    best.see(3.0)
    weights = [p.detach().clone() for p in model.parameters()]
    for loss in (4.0, math.nan):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1.0)
        best.see(loss)
    best.restore()
    assert best.loss == 3.0
    for p, want in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, want)


def test_memory_grows_with_what_it_is_for():
    teacher = CausalLM(CONFIG)
    trained = estimate.weights(teacher)
    one = estimate.memory_needed(teacher, 100, trained=trained)
    assert one > 4 * 5 * trained  # two models, gradients, two moments
    assert estimate.memory_needed(teacher, 200, trained=trained) > one
    assert one > estimate.memory_needed(teacher, 100, trained=trained // 2)
    half = estimate.memory_needed(teacher, 100, trained=trained, held=2)
    assert one > half
    more = [estimate.memory_needed(teacher, 200, trained=trained, held=n) for n in (2, 4)]
    assert more[1] - one > 1.2 * (more[0] - half)  # a token's activations are larger in float32
    assert one > estimate.memory_needed(teacher, 100, trained=trained, recomputes=True)
    assert estimate.memory_available(CPU) > 2**20
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert min(estimate.seconds_a_token(teacher, ids)) > 0
