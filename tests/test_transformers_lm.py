"""Teachers and students of the transformers library: the same model behind our interface."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CHAT, FAMILIES, tiny_folder

import distillation
from lowbit import UserError
from lowbit.files.packed import load_packed, save_packed
from lowbit.models.interface import Wiring, block_calls, is_rms_norm, linear_layers, wiring
from lowbit.models.student import make_student
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import FAMILIES as TRIED
from lowbit.models.transformers_lm import TransformersLM, build_transformers, clone
from lowbit.options import parse_options
from lowbit.quantization import calibration
from lowbit.quantization.calibration import calibrate
from lowbit.quantization.layers import (
    QATLinear,
    block_layers,
    edge_layers,
    latent,
    low_bit_layers,
    quantize_model,
)
from lowbit.text.tokenizers import TeacherTokenizer, tokenizer_from
from lowbit.training.preparation import settle

transformers = pytest.importorskip("transformers")
IDS = torch.from_numpy(np.random.default_rng(0).integers(2, 300, (2, 24)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {kind: tiny_folder(base / kind, kind) for kind in FAMILIES}


def test_every_family_that_is_let_in_is_tested():
    assert set(TRIED) == set(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_the_librarys(folders, kind):
    """Of the teacher, and of the student that starts from it, before it is quantised."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[kind])
    teacher, tokenizer = load_teacher(str(folders[kind]))
    with torch.no_grad():
        want = theirs(IDS).logits
        assert torch.equal(teacher(IDS).logits, want)
        student = clone(teacher)
        quantize_model(student, "ternary")
        with latent(student):
            got = student(IDS).logits
    # Embedding and head are in 8 bits, the rest is the teacher's.
    assert (got - want).norm() < 0.1 * want.norm()
    assert not torch.equal(got, want)
    assert tokenizer.vocab_size == 320


@pytest.mark.parametrize("kind", FAMILIES)
def test_linear_layers_of_blocks_are_quantised_and_nothing_else_changes(folders, kind):
    teacher, _ = load_teacher(str(folders[kind]))
    student = quantize_model(clone(teacher), "ternary")
    linear = [m for b in teacher.blocks for m in b.modules() if type(m) is torch.nn.Linear]
    low = [m for _, m in low_bit_layers(student)]
    assert len(low) == len(linear) > 0
    assert all(isinstance(m, QATLinear) for m in low)
    assert not student.embedding.weight.requires_grad
    trained = {n for n, p in student.net.named_parameters() if p.requires_grad}
    named = {n for n, _ in student.net.named_parameters()}
    assert all("embed" in n or "head" in n for n in named - trained)
    for (n, a), (m, b) in zip(
        teacher.net.named_parameters(), student.net.named_parameters(), strict=True
    ):
        assert n == m
        if n in trained:
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_called_one_by_one_make_the_whole(folders, kind):
    teacher, _ = load_teacher(str(folders[kind]))
    with torch.no_grad():
        want = teacher.features(IDS).hidden_states
        x, calls = block_calls(teacher, IDS[:1])
        for block, call, hidden in zip(teacher.blocks, calls, want, strict=True):
            x = call(block, x)
            assert torch.allclose(x, hidden[:1], atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "groups", "writers"),
    [
        ("llama", ["q k v", "o", "gate up", "down"], ["o", "down"]),
        ("qwen3", ["q k v", "o", "gate up", "down"], ["o", "down"]),
        ("gemma2", ["q k v", "o", "gate up", "down"], ["o", "down"]),  # through norms
        ("gemma3_text", ["q k v", "o", "gate up", "down"], ["o", "down"]),
        ("phi", ["q k v fc1", "dense", "fc2"], ["dense", "fc2"]),  # both from one input
        ("phi3", ["qkv", "o", "gate_up", "down"], ["o", "down"]),
    ],
)
def test_what_reads_the_same_and_what_writes_to_the_stream(folders, kind, groups, writers, dtype):
    """Also where products are in bfloat16."""
    teacher, _ = load_teacher(str(folders[kind]))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        x, calls = block_calls(teacher, IDS[:1])
        found = wiring(teacher.blocks[0], calls[0], x)

    def short(name: str) -> str:
        return name.rpartition(".")[2].removesuffix("_proj")

    assert sorted(" ".join(sorted(map(short, g))) for g in found.groups) == sorted(
        " ".join(sorted(g.split())) for g in groups
    )
    assert [short(n) for n in found.writers] == writers
    normed = {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}
    own = {n: normed[short(n)] if "gemma" in kind else n for n in found.writers}
    assert found.writers == own


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (torch.nn.RMSNorm(32), True),
        (torch.nn.LayerNorm(32), False),
        (torch.nn.Identity(), False),
        (torch.nn.GELU(), False),
        (torch.nn.Sequential(torch.nn.RMSNorm(32)), False),
    ],
)
def test_what_counts_as_an_rms_norm(module, is_one):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0.5, 2.0)
        assert is_rms_norm(module, x, module(x)) == is_one


def test_what_a_norm_reads_so_that_it_gives_more(monkeypatch):
    """But for the part along the output, which no input changes."""
    monkeypatch.setattr(calibration, "NORM_RIDGE", 0.0)
    g = torch.Generator().manual_seed(0)
    y, change = torch.randn(2, 7, 32, generator=g, dtype=torch.float64)
    gains = torch.rand(32, generator=g, dtype=torch.float64) + 0.5

    def norm(x: torch.Tensor) -> torch.Tensor:
        return gains * x / x.square().mean(-1, keepdim=True).sqrt()

    more = (norm(y + 1e-6 * calibration.before_norm(change, y, gains)) - norm(y)) / 1e-6
    out = norm(y)
    rest = more - change
    rest -= out * (rest * out).sum(-1, keepdim=True) / out.square().sum(-1, keepdim=True)
    assert float(rest.norm()) < 1e-4 * float(change.norm())


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_norm_before_the_sum_does_not_hide_what_earlier_blocks_got_wrong(folders, kind):
    """Blocks whose layers count as writers end nearer to the teacher than those without."""
    teacher, _ = load_teacher(str(folders[kind]))
    ids = torch.from_numpy(np.random.default_rng(1).integers(2, 300, (512, 16)))

    def error(find: Callable[..., Wiring]) -> float:
        student = quantize_model(clone(teacher), "ternary").requires_grad_(False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "wiring", find)
            calibrate(student, teacher, ids[:480].split(16))
        with torch.no_grad():
            want, found = (m.features(ids[480:]).hidden_states[-1] for m in (teacher, student))
        return float(((found - want).square().mean(-1) / want.square().mean(-1)).mean())

    assert error(wiring) < 0.95 * error(lambda *a: replace(wiring(*a), writers={}))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_calibration_beats_rounding(folders, kind):
    teacher, _ = load_teacher(str(folders[kind]))
    rounded = quantize_model(clone(teacher), "ternary").requires_grad_(False)
    student = copy.deepcopy(rounded)
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(2, 300, (264, 16)))
    calibrate(student, teacher, ids[:256].split(8))
    with torch.no_grad():
        want = teacher.features(ids[256:]).final
        errors = [float((m.features(ids[256:]).final - want).norm()) for m in (student, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_a_student_of_some_layers(folders):
    teacher, _ = load_teacher(str(folders["smollm3"]))
    student = clone(teacher, [0, 2])
    assert len(student.blocks) == student.config.num_hidden_layers == 2
    with torch.no_grad():
        x, calls = block_calls(teacher, IDS[:1])
        for i in (0, 2):
            x = calls[i](teacher.blocks[i], x)
        assert torch.allclose(student.features(IDS[:1]).hidden_states[-1], x, atol=1e-5)
    assert len(teacher.blocks) == 3  # untouched


def test_generation_with_a_cache_is_generation_without(folders):
    teacher, _ = load_teacher(str(folders["mistral"]))
    with torch.no_grad():
        first = teacher.features(IDS[:1, :10], keep=True)
        then = teacher.features(IDS[:1, 10:11], first.cache, keep=True)
        whole = teacher.features(IDS[:1, :11])
    assert torch.allclose(then.final[:, 0], whole.final[:, 10], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_packed_and_read_back(folders, tmp_path, kind):
    teacher, tokenizer = load_teacher(str(folders[kind]))
    student = quantize_model(clone(teacher), "ternary")
    report = save_packed(tmp_path / "s.npz", student, tokenizer.describe())
    loaded, vocabulary, _ = load_packed(tmp_path / "s.npz")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    again = tokenizer_from(vocabulary)
    assert again.encode("Seven baskets.").tolist() == tokenizer.encode("Seven baskets.").tolist()
    assert isinstance(again, TeacherTokenizer)
    assert again.wrapped.chat_template == CHAT
    assert report.linear_weights == sum(m.weight.numel() for _, m in low_bit_layers(student))
    model, _ = load_teacher(str(tmp_path / "s.npz"))  # a student can teach
    assert isinstance(model, TransformersLM)


def test_a_packed_file_of_another_shape_is_refused(folders, tmp_path):
    teacher, tokenizer = load_teacher(str(folders["llama"]))
    teacher.net.config.intermediate_size = 128
    save_packed(tmp_path / "s.npz", teacher, tokenizer.describe())
    with pytest.raises(UserError, match=r"tensor model.layers.0.mlp.* of the wrong shape"):
        load_packed(tmp_path / "s.npz")


def test_the_whole_run(folders, text_file, tmp_path, capsys):
    """From a Hugging Face folder to one that transformers loads, with the logits that were
    measured."""
    out = tmp_path / "out"
    words = f"--hybrid --ternary --qat --epochs 2 --samples_per_epoch 16 --seq_len 32 --seed 1 \
        --data_clusters 2 --save_metrics --device cpu --data {text_file} --output_dir {out}"
    assert distillation.main([*words.split(), "--teacher", str(folders["llama"])]) == 0
    printed = capsys.readouterr().out
    assert "Validation loss, nats a token" in printed
    assert "\nIt was trained on no chats; to talk to a student, add chats" in printed
    assert re.search(r"^About \d+\.\d GiB of memory and \d+ minutes", printed, re.M)
    start, end = re.search(r"student: (\S+) before training, (\S+) after", printed).groups()
    assert float(end) <= float(start)
    packed = out / "student_quantized_ternary_1.58bit_qat.npz"
    ours, _, _ = load_packed(packed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "transformers")
    assert tokenizer.chat_template == CHAT
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    card = (out / "transformers" / "README.md").read_text()
    loss = re.search(r"student, quantized +(\S+ \+- \S+) ", printed)[1]
    assert f"| student | {loss} |" in card
    assert "# A ternary (1.58-bit) student of llama" in card
    assert str(folders["llama"].parent) not in card
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(
        [packed.name, "student_metrics.csv", "student_metrics.png", "transformers"]
    )


@pytest.mark.parametrize(("tied", "edge"), [(True, 8), (False, 8), (True, 4)])
def test_the_whole_run_with_an_embedding_of_4_bits(text_file, tmp_path, capsys, tied, edge):
    """The run's lines are true, all its files hold the same weights, and what is read back and
    rounded once more is the same file."""
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out"
    teacher = tiny_folder(tmp_path / "teacher", "llama", tie_word_embeddings=tied)
    words = f"--ternary --qat --epochs 1 --samples_per_epoch 8 --seq_len 32 --device cpu --data \
        {text_file} --output_dir {out} --edge_blocks 1 0 --high_bits {edge} --embedding_bits 4 \
        --export gguf"
    assert distillation.main([*words.split(), "--teacher", str(teacher)]) == 0
    printed = capsys.readouterr().out
    assert "the embedding is held in 4 bits" in printed
    held = f"embedding and head in 4 bits, the first 1 and the last 0 blocks in {edge}"
    assert f"; {held}\n" in printed
    weights = (1 if tied else 2) * 320 * 64
    path = out / "student_quantized_ternary_1.58bit_qat.npz"
    model, vocabulary, notes = load_packed(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "transformers")
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path.with_suffix(".gguf")).tensors}
    assert types["token_embd.weight"] == types.get("output.weight", "Q4_0") == "Q4_0"
    assert types["blk.0.ffn_up.weight"] == f"Q{edge}_0"
    weights += sum(m.weight.numel() for m in linear_layers(model.blocks[0]).values()) * (edge == 4)
    assert f"int4 {weights:,} weights, " in printed
    quantize_model(model, "ternary", more=edge_layers(model, 1), high_bits=edge, embedding_bits=4)
    save_packed(tmp_path / "again.npz", model, vocabulary, notes=notes)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "words", ["--student_layers 2", "--student_size tiny", "--student_init random"]
)
def test_other_students_of_such_a_teacher(folders, text_file, tmp_path, words):
    common = f"--hybrid --ternary --qat --epochs 1 --samples_per_epoch 8 --seq_len 32 --device cpu \
        --data_clusters 2 --data {text_file} --output_dir {tmp_path} --teacher {folders['llama']}"
    assert distillation.main([*common.split(), *words.split()]) == 0


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_random_weights_keep_the_teachers_embedding_and_head(folders, kind):
    teacher, tokenizer = load_teacher(str(folders[kind]))
    o = parse_options(["--ternary", "--qat", "--student_init", "random"])
    settle(o, teacher, tokenizer)
    student = make_student(o, teacher)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert (student.output is None) == (teacher.output is None)
    if student.output is not None:
        theirs = teacher.output.state_dict()
        mine = student.output.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
        assert student.output.weight is not teacher.output.weight
    assert student.embedding.weight is not teacher.embedding.weight
    for name, layer in block_layers(student).items():
        assert not torch.equal(layer.weight, block_layers(teacher)[name].weight)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_is_built_around_its_weights(folders, kind):
    """No second copy of them, no parameter without memory, and the library's own logits."""
    original = load_teacher(str(folders[kind]))[0]
    tied = original.output is None
    state = {k: v.clone() for k, v in original.net.state_dict().items()}
    state = {k: v for k, v in state.items() if not (tied and k.startswith("lm_head"))}
    model = build_transformers(original.describe()["transformers"], state, "here")
    held = {v.data_ptr() for v in state.values()}
    assert all(p.device.type == "cpu" and p.data_ptr() in held for p in model.parameters())
    assert (model.output is None) == tied
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # as before
    ids = torch.arange(12)[None] % model.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
