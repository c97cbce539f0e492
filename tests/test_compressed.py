"""Students as folders of codes, and what transformers makes of them with compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CHAT, FAMILIES, tiny_net, tiny_tokenizer

from lowbit import UserError, export
from lowbit.files.compressed import pack_words
from lowbit.files.packed import save_packed
from lowbit.models.teacher import from_folder
from lowbit.models.transformers_lm import TransformersLM
from lowbit.quantization.layers import edge_layers, quantize_model
from lowbit.text.tokenizers import TeacherTokenizer

pytest.importorskip("transformers")
IDS = torch.arange(40)[None] * 7 % 300


def exported(
    folder: Path,
    kind: str,
    mode: str = "ternary",
    bits: int = 8,
    edge: int = 8,
    scope: str = "row",
    **changes: Any,
) -> tuple[Path, Path]:
    """Folders in float32 and in codes of a student with random codes, the first block, and
    embedding and head, in so many bits."""
    model = TransformersLM(tiny_net(kind, **changes))
    quantize_model(
        model, mode, scope=scope, more=edge_layers(model, 1), high_bits=edge, embedding_bits=bits
    )
    path = folder / "student.npz"
    save_packed(path, model, TeacherTokenizer(tiny_tokenizer(), 320).describe())
    for type_ in ([], ["--type", "packed"]):
        assert export.main([str(path), "--to", "hf", *type_]) == 0
    return folder / "transformers", folder / "transformers-packed"


def loaded(folder: Path, **options: Any) -> Any:
    """A model all of whose weights were found."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("compressed_tensors")
    net, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    return net


@torch.no_grad()
def agree(folders: tuple[Path, Path], **options: Any) -> tuple[Any, Any]:
    """The same logits, to the last bit."""
    plain, packed = (loaded(f, **options) for f in folders)
    assert torch.equal(packed(IDS).logits, plain(IDS).logits)
    return plain, packed


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [32, 50])
def test_the_library_unpacks_the_same_codes(bits, width):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, width), dtype=torch.int8)
    words = torch.from_numpy(pack_words(codes.numpy(), bits))
    assert words.shape == (6, -(-width * bits // 32))
    assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(helpers.pack_to_int32(codes, bits), words)


def test_words_by_hand():
    """Sixteen codes a word, the first in the lowest bits, each plus 2."""
    codes = np.zeros((1, 17), np.int8)
    codes[0, [0, 1, 15, 16]] = [-1, 1, 1, -1]
    first = 0b11_10101010_10101010_10101010_1011_01
    assert pack_words(codes, 2).view(np.uint32).tolist() == [[first, 0b01]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_answers_the_same(tmp_path, kind):
    plain, packed = agree(exported(tmp_path, kind))
    greedy = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(packed.generate(IDS[:, :5], **greedy), plain.generate(IDS[:, :5], **greedy))


@pytest.mark.parametrize(
    "student",
    [
        dict(mode="1bit"),
        dict(bits=4),
        dict(edge=4),
        dict(bits=4, edge=4),
        dict(bits=4, tie_word_embeddings=False),
        dict(scope="tensor"),
    ],
    ids=str,
)
def test_every_code_answers_the_same(tmp_path, student):
    agree(exported(tmp_path, "llama", **student))


def test_in_bfloat16_both_folders_round_alike(tmp_path):
    agree(exported(tmp_path, "qwen2"), dtype=torch.bfloat16)


def test_codes_become_weights_at_the_first_pass(tmp_path):
    folder = exported(tmp_path, "llama")[1]
    net = loaded(folder)
    layer = net.model.layers[1].mlp.up_proj
    assert layer.weight_packed.dtype == torch.int32
    assert net.model.embed_tokens.weight.dtype == torch.int8
    net.generate(IDS[:, :5], max_new_tokens=1)
    assert not hasattr(layer, "weight_packed")
    weights = [p for n, p in net.named_parameters() if n.endswith(".weight")]
    assert {p.dtype for p in weights} == {torch.float32}


def test_what_the_folder_holds(tmp_path, capsys):
    """The other folder's files and a card; two bits a ternary weight and its row's scale."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    plain, packed = exported(tmp_path, "llama")
    files = {p.name for p in plain.iterdir()}
    assert {p.name for p in packed.iterdir()} == files | {"README.md"}
    for name in files - {"model.safetensors", "config.json"}:
        assert (packed / name).read_bytes() == (plain / name).read_bytes()
    config = json.loads((packed / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((plain / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(packed).chat_template == CHAT

    held = load_file(packed / "model.safetensors")
    assert held["model.layers.1.mlp.up_proj.weight_packed"].nbytes == 96 * 64 // 4
    assert held["model.layers.0.mlp.up_proj.weight_packed"].nbytes == 96 * 64
    assert held["model.layers.1.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert held["lm_head.weight_scale"].shape == (320, 1)
    assert "lm_head.weight" not in held

    out = capsys.readouterr().out
    weights = 2 * (64 * 96 * 3 + 64 * 64 * 2 + 64 * 32 * 2)
    rows = 2 * (96 * 2 + 64 * 3 + 32 * 2)
    size = weights // 4 + 2 * rows + 14 * 16  # a layer's shape is two int64
    assert f"int2        14 {weights:13,} {size:12,} {8 * size / weights:9.3f}" in out
    assert "pip install compressed-tensors" in out


def test_what_is_refused(tmp_path, capsys, tiny_teacher, monkeypatch):
    def refused(*words: object) -> str:
        assert export.main([str(w) for w in words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    packed = exported(tmp_path, "llama")[1]
    capsys.readouterr()
    with pytest.raises(UserError, match=r"quantised weights .* give the folder with the float"):
        from_folder(packed)
    path = tmp_path / "student.npz"
    assert "needs --to hf" in refused(path, "--to", "gguf", "--type", "packed")
    assert "student of bytes" in refused(tiny_teacher, "--to", "hf", "--type", "packed")
    words = (path, "--to", "hf", "--type", "packed", "--output")
    assert "cannot write" in refused(*words, path / "folder")

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"some")
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "No space left on device" in refused(*words, tmp_path / "transformers-packed")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
