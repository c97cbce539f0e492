"""Which matrices get more bits: estimated costs against the divergence itself, the choice, and
runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distillation
from lowbit import UserError
from lowbit.files.packed import read_packed
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.models.interface import LanguageModel
from lowbit.models.teacher import load_teacher
from lowbit.options import parse_options
from lowbit.quantization.layers import (
    block_layers,
    edge_layers,
    from_codes,
    nibble_codes,
    ternary_codes,
)
from lowbit.quantization.precision import rounding_costs, with_more_bits
from lowbit.training.preparation import settle_more_bits
from tests.resuming import HYBRID, SMALL

SMALL_MODEL = ModelConfig(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip


def model_and_windows(windows: int) -> tuple[LanguageModel, list[torch.Tensor]]:
    model = CausalLM(SMALL_MODEL).initialise(0)
    with torch.no_grad():  # a model that prefers some tokens
        model.embedding.weight.mul_(4)
    ids = torch.randint(0, 24, (windows, 1, 10), generator=torch.Generator().manual_seed(1))
    return model, list(ids)


@torch.no_grad()
def divergence(model: LanguageModel, layer: nn.Linear, change, windows) -> float:
    """KL(as it is || changed), nats a token."""
    ids = torch.cat(windows)
    before = F.log_softmax(model(ids).logits.double(), -1)
    layer.weight.add_(change)
    after = F.log_softmax(model(ids).logits.double(), -1)
    layer.weight.sub_(change)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_costs_are_the_divergence_of_small_changes():
    """Of labels drawn a few thousand times, within what such a sample leaves."""
    model, windows = model_and_windows(4)
    layers = block_layers(model)
    generator = torch.Generator().manual_seed(2)
    changes = {
        n: 0.01 * torch.randn(m.weight.shape, generator=generator) for n, m in layers.items()
    }
    found = rounding_costs(model, windows * 250, changes, generator)
    assert found.keys() == layers.keys()
    for name, cost in found.items():
        exact = divergence(model, layers[name], changes[name], windows)
        assert cost == pytest.approx(exact, rel=0.25), name


def test_costs_leave_the_model_as_it_was():
    model, windows = model_and_windows(2)
    model.embedding.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    name, layer = next(iter(block_layers(model).items()))
    one = {name: torch.ones_like(layer.weight)}
    twice = [
        rounding_costs(model, windows, one, torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert twice[0] == twice[1]
    assert twice[0][name] > 0
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
        assert p.requires_grad == required[n]
        assert p.grad is None
        assert not p._post_accumulate_grad_hooks


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=12),
    st.floats(1.58, 4),
)
def test_the_choice_fits_and_leaves_nothing_dearer_out(matrices, target):
    costs = {str(i): c for i, (c, _) in enumerate(matrices)}
    sizes = {str(i): n for i, (_, n) in enumerate(matrices)}
    chosen = with_more_bits(costs, sizes, 1.58, 4, target)
    total = sum(sizes.values())
    spent = sum(sizes[n] for n in chosen)
    mean = (4 * spent + 1.58 * (total - spent)) / total
    assert mean <= target + 1e-9
    room = (target - 1.58) / (4 - 1.58) * total
    for left in costs.keys() - chosen:  # what is left out did not fit beside what is dearer
        dearer = [n for n in chosen if costs[n] / sizes[n] >= costs[left] / sizes[left]]
        assert sum(sizes[n] for n in dearer) + sizes[left] > room - 1e-9


def test_names_are_those_of_blocks():
    model, _ = model_and_windows(1)
    names = list(block_layers(model))
    assert len(names) == 14
    assert names[0].startswith("0.")
    assert edge_layers(model, 1) == [n for n in names if n.startswith("0.")]
    assert edge_layers(model, 0, 1) == [n for n in names if n.startswith("1.")]
    assert edge_layers(model, 1, 1) == names
    assert edge_layers(model, 0) == []


# ---------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("words", "low", "high"),
    [
        ("--hybrid --ternary --qat", "ternary", "int4"),
        ("--hybrid --qat --high_bits 8", "1bit", "int8"),
        ("--hybrid --ternary", "ternary", "int4"),
    ],
)
def test_a_run_keeps_to_its_bits(tiny_teacher, text_file, tmp_path, capsys, words, low, high):
    flags = ["--teacher", str(tiny_teacher), "--data", str(text_file), *SMALL, *words.split()]
    flags += ["--calibrate=false", "--target_bits", "2.5", "--output_dir", str(tmp_path)]
    assert distillation.main(flags) == 0
    said = re.search(
        r"(\d+) of (\d+) matrices have (\d) bits, (\d\.\d\d) a weight", capsys.readouterr().out
    )
    assert said
    tensors = read_packed(next(tmp_path.glob("*.npz"))).tensors
    linear = {n: t for n, t in tensors.items() if ".layers." in n and t.scale is not None}
    kinds = {n: t.kind for n, t in linear.items()}
    assert set(kinds.values()) == {low, high}
    assert sum(k == high for k in kinds.values()) == int(said[1])
    assert len(kinds) == int(said[2])
    bits = {"ternary": 1.58, "1bit": 1.0, "int4": 4.0, "int8": 8.0}
    sizes = np.array([t.values.size for t in linear.values()])
    mean = float(np.dot(sizes, [bits[k] for k in kinds.values()]) / sizes.sum())
    assert mean == pytest.approx(float(said[4]), abs=0.006)
    assert mean <= 2.5


@pytest.mark.parametrize("frozen", [True, False])
def test_matrices_with_more_bits_stay_as_they_start(tiny_teacher, text_file, tmp_path, frozen):
    """Unless a flag lets them be trained; the file has the codes of the teacher's weights."""
    flags = [*HYBRID, "--teacher", str(tiny_teacher), "--data", str(text_file), *SMALL]
    flags += ["--calibrate=false", "--target_bits", "2.5", "--output_dir", str(tmp_path)]
    assert distillation.main([*flags, *([] if frozen else ["--freeze_high_bits=false"])]) == 0
    original = load_teacher(str(tiny_teacher))[0].state_dict()
    tensors = read_packed(next(tmp_path.glob("*.npz"))).tensors
    same = {n: np.array_equal(t.weight(), from_codes(*nibble_codes(original[n])).numpy())
            for n, t in tensors.items() if t.kind == "int4"}  # fmt: skip
    assert same
    assert set(same.values()) == {frozen}
    assert all(
        (t.values != ternary_codes(original[n])[0].numpy()).any()
        for n, t in tensors.items()
        if t.kind == "ternary"
    )


def test_frozen_matrices_need_a_start_worth_keeping():
    teacher = SimpleNamespace(blocks=[nn.Sequential(nn.Linear(64, 8)) for _ in range(4)])

    def settled(flags: str) -> bool:
        o = parse_options(["--hybrid", *flags.split()])
        o.student_init = o.student_init or "teacher"
        settle_more_bits(o, teacher, "bpe", True)
        return o.freeze_high_bits

    assert settled("--ternary --qat")
    assert not settled("--ternary")  # rounded when all is trained
    assert not settled("--ternary --qat --student_init random")
    assert not settled("--ternary --qat --freeze_high_bits=false")
    assert not settled("--ternary --qat --target_bits 4")  # all would be frozen
    for flags in ("--ternary", "--ternary --qat --student_init random"):
        with pytest.raises(UserError, match="--freeze_high_bits needs --qat"):
            settled(f"{flags} --freeze_high_bits")


@pytest.mark.parametrize(
    ("flags", "vocabulary", "width", "target", "edges", "high"),
    [
        ("--ternary --qat", "bpe", 576, 2.0, [0, 0], 4),
        ("--qat", "bpe", 576, 1.5, [0, 0], 4),
        ("--ternary", "bpe", 576, 2.0, [0, 0], 4),
        ("--ternary --qat --high_bits 8", "bpe", 40, 2.0, [0, 0], 8),
        ("--ternary --qat", "bpe", 40, None, [1, 1], 8),  # no row is made of whole blocks
        ("--ternary --qat --student_init random", "bpe", 576, None, [1, 1], 8),  # nothing to weigh
        ("--ternary --student_init random", "bpe", 576, 2.0, [0, 0], 4),  # trained when it is
        ("--ternary --qat --edge_blocks 1 0", "bpe", 576, None, [1, 0], 8),
        ("--ternary --qat --edge_blocks 0 0", "bpe", 576, None, [0, 0], 8),
        ("--ternary --qat --edge_blocks 1 1 --high_bits 4", "bpe", 576, None, [1, 1], 4),
        ("--ternary --qat", "bytes", 576, None, [0, 0], 8),
        ("--ternary --qat --target_bits 3", "bytes", 576, 3.0, [0, 0], 4),
    ],
)
def test_what_is_held_in_more_bits_where_little_is_said(
    flags, vocabulary, width, target, edges, high
):
    o = parse_options(["--hybrid", *flags.split()])
    o.student_init = o.student_init or "teacher"
    teacher = SimpleNamespace(blocks=[nn.Sequential(nn.Linear(width, 8)) for _ in range(4)])
    settle_more_bits(o, teacher, vocabulary, not o.qat or o.student_init == "teacher")
    assert (o.target_bits, list(o.edge_blocks), o.high_bits) == (target, edges, high)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--target_bits", "1.5"], "--target_bits 1.5: from 1.58 to 4"),
        (["--target_bits", "4.5"], "--target_bits 4.5: from 1.58 to 4"),
        (["--target_bits", "2", "--edge_blocks", "1", "0"], "contradicts --edge_blocks"),
        (["--target_bits", "9"], "--target_bits: expected"),
    ],
)
def test_bits_that_cannot_be(tiny_teacher, text_file, tmp_path, capsys, flags, told):
    words = [*HYBRID, "--teacher", str(tiny_teacher), "--data", str(text_file), *flags]
    try:
        code: object = distillation.main([*words, "--output_dir", str(tmp_path / "out")])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
