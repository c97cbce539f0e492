"""GGUF files as teachers: what transformers' reader leaves out of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_text
from families import GEMMA2, GEMMA3, LLAMA3, LONG, of_pieces, pieces_tokenizer, student

from lowbit import UserError
from lowbit.files import gguf_file
from lowbit.files.gguf_file import export_gguf
from lowbit.files.packed import load_packed, read_packed
from lowbit.models.teacher import load_teacher
from lowbit.text.tokenizers import tokenizer_from

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")


def exported(folder: Path, kind: str, **changes: object) -> tuple[Path, Path]:
    """A student, and the same as GGUF."""
    path = student(folder, kind, **changes)
    return path, export_gguf(read_packed(path), folder / "a.gguf", "q4_0").path


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"rope_parameters": LONG}),
     ("llama", {"rope_parameters": {
         **LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192,
     }}),
     ("qwen2", {"rope_parameters": LONG}), ("gemma3_text", GEMMA3),
     ("gemma2", {**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
     ("mistral", {"sliding_window": None}), ("phi3", {"vocab_size": 32064})],
)  # fmt: skip
def test_positions_and_windows_are_read(tmp_path, kind, changes):
    """The teacher's logits are the student's, far beyond a window, and positions are scaled."""
    path, written = exported(tmp_path, kind, **changes)
    ours, theirs = load_packed(path)[0], load_teacher(str(written))[0]
    ids = torch.arange(60)[None] * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    if "rope_parameters" in changes:
        found, known = theirs.config.rope_parameters, ours.config.rope_parameters
        for place in ("full_attention", "sliding_attention"):
            a, b = (x.get(place, x) for x in (found, known))
            assert {k: a.get(k) for k in b} == b


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [("llama", {"rope_parameters": LLAMA3}, "other factors than Llama 3's"),
     ("gemma2", GEMMA2, r"attn_logit_softcapping = 5.0, which .* it takes 50.0"),
     ("phi3", {"partial_rotary_factor": 0.5, "vocab_size": 32064}, "dimension_count = 32")],
)  # fmt: skip
def test_what_would_be_read_wrongly_is_refused(tmp_path, kind, changes, said):
    _, written = exported(tmp_path, kind, **changes)
    with pytest.raises(UserError, match=f"a.gguf.*{said}"):
        load_teacher(str(written))


def test_weights_of_an_unknown_type_are_refused(tmp_path, monkeypatch):
    """As Q2_0 is, until the package knows it."""
    monkeypatch.setattr(gguf_file, "NUMBERS", {"Q2_0": 999})
    written = export_gguf(read_packed(student(tmp_path, "llama")), tmp_path / "a.gguf", "q2_0").path
    with pytest.raises(UserError, match=r"a\.gguf .* holds a type .* does not know: .*999"):
        load_teacher(str(written))


def test_another_scaling_is_refused(tmp_path, monkeypatch):
    add = gguf_file.add_shape

    def scaled(writer, *rest):
        add(writer, *rest)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    monkeypatch.setattr(gguf_file, "add_shape", scaled)
    _, written = exported(tmp_path, "llama")
    with pytest.raises(UserError, match="scaled by 'yarn' cannot be read"):
        load_teacher(str(written))


@pytest.mark.parametrize(
    ("kind", "opens"), [("llama", True), ("llama", False), ("gemma3_text", False)]
)
def test_pieces_are_cut_as_the_file_says(tmp_path, kind, opens):
    """With or without a space before the text, also after the tokenizer was stored and read."""
    written = pieces_tokenizer(opens)
    path = of_pieces(tmp_path, kind, written, query_pre_attn_scalar=64)
    export_gguf(read_packed(path), tmp_path / "a.gguf")
    read = load_teacher(str(tmp_path / "a.gguf"))[1]
    again = tokenizer_from(read.describe())
    for text in (make_text(100), "The miller's 12345  letters,\n\n é don't ", "  北京 🙂", "x"):
        ids = written(text, add_special_tokens=False)["input_ids"]
        assert read.encode(text).tolist() == ids
        assert again.encode(text).tolist() == ids
        assert read.decode(read.encode(text)) == text


def changed(source: Path, target: Path, drop: str = "", **numbers: int) -> Path:
    """A copy of a GGUF file without the tensors and keys whose names hold ``drop``, and with more
    numbers of its architecture."""
    reader = gguf.GGUFReader(source)
    kind = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, kind)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or (drop and drop in name):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, value in numbers.items():
        writer.add_uint32(f"{kind}.{name}", value)
    for tensor in reader.tensors:
        if not drop or drop not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    _, written = exported(tmp_path, "llama")
    assert load_teacher(str(changed(written, tmp_path / "same.gguf")))
    with pytest.raises(UserError, match=r"down_proj.* is missing|is damaged"):
        load_teacher(str(changed(written, tmp_path / "b.gguf", drop="blk.1.ffn_down")))
    with pytest.raises(UserError, match="a mixture of experts cannot be converted"):
        load_teacher(str(changed(written, tmp_path / "c.gguf", expert_count=8)))


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3"])
def test_llama_3_opens_a_text_unless_it_says_not(tmp_path, monkeypatch, pre):
    from lowbit.text import pre_tokenizers

    path = student(tmp_path, "llama", cut="llama-bpe")
    monkeypatch.setattr(pre_tokenizers, "name_of", lambda *_: pre)
    written = export_gguf(read_packed(path), tmp_path / "a.gguf").path
    silent = changed(written, tmp_path / "b.gguf", drop="add_bos_token")
    for file, opening in ((written, None), (silent, 0)):
        tokenizer = load_teacher(str(file))[1]
        assert tokenizer.opening == opening
        assert tokenizer.wrapped.backend_tokenizer.model.ignore_merges
