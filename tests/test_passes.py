"""A step in several passes, with blocks computed again, over tokens that count and others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_folder

import distillation
from lowbit import UserError
from lowbit.models.interface import recomputed
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import clone, hold_linears
from lowbit.options import parse_options
from lowbit.quantization import layers
from lowbit.quantization.layers import (
    fix_high_bits,
    low_bit_layers,
    quantize_model,
    rounded_once,
)
from lowbit.text.corpus import load_corpus
from lowbit.text.tokenizers import UNCOUNTED, TeacherTokenizer
from lowbit.training.baselines import Baseline
from lowbit.training.estimate import choose_passes, halved, trained_weights, weights
from lowbit.training.losses import IGNORED, distillation_objective
from lowbit.training.step import make_step
from lowbit.training.validation import Reference, batch_of, counted_tokens

pytest.importorskip("transformers")
CPU = torch.device("cpu")
TURNS = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tiny_folder(tmp_path_factory.mktemp("model") / "llama", "llama")
    tokenizer = load_teacher(str(path))[1].wrapped
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> TeacherTokenizer:
    return load_teacher(str(folder))[1]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_weights_that_memory_is_counted_for_are_those_that_train(tmp_path, kind):
    """Of a tied and of an untied head."""
    teacher, _ = load_teacher(str(tiny_folder(tmp_path / kind, kind)))
    student = clone(teacher)
    names = ["0.mlp.up_proj", "2.self_attn.k_proj"]
    quantize_model(student, "ternary", more=names, high_bits=4, embedding_bits=4)
    fix_high_bits(student)
    dear = 64 * 96 + 64 * 32
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trained_weights(teacher, 1 - dear / weights(teacher.blocks)) == trained


def chats(path: Path, n: int = 60) -> Path:
    """Questions whose length varies, and short answers."""
    lines = []
    for i in range(n):
        asked = " ".join(f"the {k}th heron of {i}" for k in range(1 + i % 5))
        turns = [("user", asked), ("assistant", f"no {i}"), ("user", "why?"), ("assistant", "so.")]
        messages = [{"role": r, "content": c} for r, c in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


def gradients(folder: Path, text: Path, tmp_path: Path, *flags: str) -> tuple[list, float]:
    """Of one step of SGD at a rate of 1: what it takes off each parameter; and the loss."""
    words = ["--teacher", str(folder), "--data", str(text), "--output_dir", str(tmp_path)]
    common = (
        "--ternary --qat --optimizer sgd --lr 1 --momentum 0 --weight_decay 0 --batch_size 6 "
        "--seq_len 32 --epochs 1 --lr_schedule constant"
    )
    words += common.split()
    setup = distillation.set_up(parse_options([*words, *flags]))
    setup = replace(setup, dtype=None)
    before = [p.detach().clone() for p in setup.student.parameters()]
    optimizer = Baseline(setup.options, setup.student, 1)
    result = make_step(setup, optimizer, np.zeros(9999, int))(0, np.arange(6))
    after = setup.student.parameters()
    return [a - b.detach() for a, b in zip(before, after, strict=True)], result.loss


@pytest.mark.parametrize("kind", ["text", "chats"])
@pytest.mark.parametrize(
    "flags",
    ["--micro_batch_size 4", "--micro_batch_size 1", "--activation_checkpointing"],
)
def test_passes_add_up_to_the_step(folder, text_file, tmp_path, monkeypatch, kind, flags):
    """Also where windows count different numbers of tokens."""
    monkeypatch.setattr(distillation, "choose_dtype", lambda *a: None)
    text = text_file if kind == "text" else chats(tmp_path / "a.jsonl")
    whole, loss = gradients(folder, text, tmp_path, "--micro_batch_size", "6")
    parts, same = gradients(folder, text, tmp_path, *flags.split())
    assert same == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-9)


def test_blocks_computed_again_keep_less(folder):
    """What is saved for the backward pass shrinks; the gradients are the same."""
    model = clone(load_teacher(str(folder))[0])
    quantize_model(model, "ternary")
    ids = torch.arange(40).view(2, 20)

    def run(blocks) -> tuple[int, list[torch.Tensor]]:
        sizes: list[int] = []

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), recomputed(blocks):
            out = model(ids)
        total = sum(sizes)
        assert len(out.hidden_states) == len(model.blocks)
        (out.logits.square().mean() + out.hidden_states[1].square().mean()).backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return total, found

    kept, expected = run(())
    few, found = run(model.blocks)
    assert few < 0.5 * kept
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    assert all("forward" not in b.__dict__ for b in model.blocks)


def test_weights_are_rounded_once(folder, monkeypatch):
    """Not at every pass, to the same logits; and again at the next step."""
    model = clone(load_teacher(str(folder))[0])
    quantize_model(model, "ternary")
    ids = torch.arange(20)[None]
    calls = []
    rounds = layers.ternary_codes
    monkeypatch.setattr(layers, "ternary_codes", lambda *a: (calls.append(1), rounds(*a))[1])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        calls.clear()
        with rounded_once(model):
            found = [model(ids).logits for _ in range(3)]
    assert len(calls) == sum(1 for _ in low_bit_layers(model))
    assert all(torch.equal(x, expected) for x in found)
    with torch.no_grad():
        for _, m in low_bit_layers(model):
            m.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16), rounded_once(model):
        assert not torch.equal(model(ids).logits, expected)


def test_a_teacher_held_in_bfloat16_says_the_same(folder):
    """Autocast would round the same weights at every use."""
    teacher = load_teacher(str(folder))[0]
    ids = torch.arange(30)[None]
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher(ids).logits
        hold_linears(teacher, torch.bfloat16)
        assert torch.equal(teacher(ids).logits, expected)
    held = sum(p.dtype == torch.bfloat16 for p in teacher.parameters())
    assert held == 7 * len(teacher.blocks)


@pytest.mark.parametrize(
    ("fits", "found"),
    [
        (lambda m, again: True, (4, False)),
        (lambda m, again: m <= 2, (2, False)),
        (lambda m, again: again and m <= 2, (2, True)),
        (lambda m, again: again and m == 1, (1, True)),
        (lambda m, again: False, (1, True)),
    ],
)
def test_passes_shrink_before_blocks_are_computed_again(fits, found):
    """Down to so many windows, of which fewer would be slow."""
    assert choose_passes([4, 2, 1], 2, None, fits) == found


def test_what_is_asked_for_is_done():
    """Computing again at the largest passes that fit; never where it is switched off."""
    assert halved(7) == [7, 4, 2, 1]
    assert choose_passes([4, 2, 1], 2, True, lambda m, again: m <= 2) == (2, True)
    assert choose_passes([4, 2, 1], 2, False, lambda m, again: again) == (1, False)
    assert choose_passes([3], 2, None, lambda m, again: True) == (3, False)


# ----------------------------------------------------------------------- tokens that count


def test_a_chat_counts_what_the_assistant_says(tokenizer):
    """With the mark that ends its turn, and the text is the template's."""
    messages = [
        {"role": "user", "content": "so say so"},
        {"role": "assistant", "content": " so "},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "the miller's letter, é"},
    ]
    ids = tokenizer.encode_chat("a", messages)
    assert ids.dtype == np.uint32
    plain = ids % UNCOUNTED
    text = tokenizer.wrapped.apply_chat_template(messages, tokenize=False)
    assert plain.tolist() == tokenizer.encode(text).tolist()
    counted = [i for i, x in enumerate(ids) if x < UNCOUNTED]
    said = tokenizer.wrapped.decode(plain[counted].tolist(), skip_special_tokens=False)
    assert said == "so</s>the miller's letter, é</s>"
    assert tokenizer.end_of_turn == "</s>"


def test_answers_that_occur_elsewhere(tokenizer):
    """Inside the template's own words, in the question, or with nothing said."""
    turns = [("user", "s assistant"), ("assistant", "s"), ("user", ""), ("assistant", "")]
    ids = tokenizer.encode_chat("a", [{"role": r, "content": c} for r, c in turns])
    counted = [int(x) for x in ids if x < UNCOUNTED]
    said = tokenizer.wrapped.decode(counted, skip_special_tokens=False)
    assert said == "s</s></s>"


def test_a_template_that_drops_thoughts(folder):
    """Of earlier answers, as Qwen 3's does: what is left of them counts."""
    tokenizer = load_teacher(str(folder))[1]
    tokenizer.wrapped.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}(hm){% endif %}{{ m.content }}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ids = tokenizer.encode_chat("a", [{"role": r, "content": c} for r, c in turns])
    counted = [int(x) for x in ids if x < UNCOUNTED]
    assert tokenizer.wrapped.decode(counted, skip_special_tokens=False) == "b</s>(hm)d</s>"


def test_chats_without_answers_are_refused(tokenizer, tmp_path):
    line = '{"messages": [{"role": "user", "content": "hi %d"}]}\n'
    (tmp_path / "a.jsonl").write_text("".join(line % i for i in range(200)))
    with pytest.raises(UserError, match="no token of the training text counts"):
        load_corpus([str(tmp_path / "a.jsonl")], 16, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the teacher has no chat template"),
        ("{{ raise_exception('only one turn') }}", "chat template refuses: only one turn"),
        (
            "{% for m in messages %}{{ m.content | upper }}{{ loop.length }}{% endfor %}",
            "changes what message 2",
        ),
    ],
)
def test_chats_that_the_template_does_not_take(folder, template, reason):
    tokenizer = load_teacher(str(folder))[1]
    tokenizer.wrapped.chat_template = template
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "hi")]
    messages = [{"role": r, "content": c} for r, c in turns]
    with pytest.raises(UserError, match=reason) as e:
        tokenizer.encode_chat("a.jsonl:3", messages)
    assert "a.jsonl:3" in str(e.value)


def test_texts_and_chats_in_one_corpus(folder, tokenizer, tmp_path, text_file):
    """Ids grow to 32 bits when the first chat comes; what was written before stays what it was."""
    texts = tmp_path / "docs"
    texts.mkdir()
    (texts / "a.txt").write_text(text_file.read_text())
    alone = load_corpus([str(texts)], 32, tokenizer)
    chats(texts / "z.jsonl")
    both = load_corpus([str(texts)], 32, tokenizer)
    assert alone.train.dtype == np.uint16
    assert both.train.dtype == np.uint32
    assert both.train_tokens > alone.train_tokens
    assert (both.train[:20] < UNCOUNTED).all()
    marked = both.train[-5:]
    assert 0 < (marked >= UNCOUNTED).mean() < 1
    inputs, labels = batch_of(marked, CPU)
    assert int(inputs.max()) < 320
    np.testing.assert_array_equal((labels != IGNORED).sum(1), counted_tokens(marked))
    np.testing.assert_array_equal(inputs[:, 1:] == labels[:, :-1], labels[:, :-1] != IGNORED)


@pytest.mark.parametrize("at_once", [700, 1 << 24])
def test_losses_are_means_over_tokens_that_count(folder, monkeypatch, at_once):
    """Whole and in chunks, against the formulas in float64; validation weighs tokens alike."""
    monkeypatch.setattr("lowbit.training.losses.LOGITS_AT_ONCE", at_once)
    teacher = load_teacher(str(folder))[0]
    student = clone(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 320, (3, 13)).astype(np.uint32)
    windows[0, 5:] |= UNCOUNTED
    windows[1] |= UNCOUNTED
    inputs, labels = batch_of(windows, CPU)
    weights = torch.tensor([0.5, 1.0, 2.0])
    out, target = student.features(inputs), teacher.features(inputs)
    total, ce, kl = distillation_objective(
        student, teacher, out.final, target.final, labels, weights, 0.3, 1.0
    )
    q = student(inputs).logits.detach().double().log_softmax(-1)
    p = teacher(inputs).logits.detach().double().log_softmax(-1)
    each = -q.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    apart = (p.exp() * (p - q)).sum(-1)
    counted = (labels != IGNORED).double()
    assert counted.sum(1).tolist() == [4, 0, 12]
    n = counted.sum(1).clamp_min(1)
    ce64, kl64 = ((x * counted).sum(1) / n for x in (each, apart))
    torch.testing.assert_close(ce.double(), ce64, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kl.double(), kl64, rtol=1e-3, atol=1e-6)
    expected = (weights * (0.3 * ce64 + 0.7 * kl64)).mean()
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-4)

    found = Reference(teacher, windows, CPU).validate(student)
    assert found.loss == pytest.approx(float((each * counted).sum() / 16), rel=1e-4)
    assert found.kl == pytest.approx(float((apart * counted).sum() / 16), rel=1e-3)


def test_a_run_on_chats(folder, tmp_path, capsys):
    """From the command line to the files."""
    words = ["--teacher", str(folder), "--data", str(chats(tmp_path / "chats.jsonl"))]
    common = "--hybrid --ternary --qat --epochs 2 --seq_len 32 --data_clusters 2"
    words += common.split()
    assert distillation.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Validation loss of the quantized student" in printed
    assert "nan" not in printed
    assert "trained on no chats" not in printed
