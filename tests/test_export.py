"""Students as GGUF: exact codes and scales, and what a real engine makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import (
    GEMMA2,
    GEMMA3,
    LLAMA3,
    LONG,
    SMOLLM3,
    WIDE,
    heard_by_engine,
    student,
    tiny_net,
    tiny_tokenizer,
)  # fmt: skip

import distillation
from lowbit import UserError, export
from lowbit.files import gguf_file
from lowbit.files.gguf_file import TYPES, choose_type, export_gguf
from lowbit.files.gguf_shape import check_shape
from lowbit.files.packed import Packed, Stored, load_packed, read_packed, save_packed
from lowbit.files.padding import padding
from lowbit.models.transformers_lm import TransformersLM, build_transformers
from lowbit.text import pre_tokenizers
from lowbit.text.tokenizers import TeacherTokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
# Rows that 256 does not divide: 3 heads of 64 and 992 inner weights become 4 and 1024.
ODD = dict(
    hidden_size=192, intermediate_size=992, num_attention_heads=3, num_key_value_heads=1
)  # fmt: skip
# 15 heads become 20, which are wider than 1024, to which 960 alone would be padded.
WIDER = dict(
    hidden_size=960, intermediate_size=1504, num_attention_heads=15, num_key_value_heads=5
)  # fmt: skip


def stored(mode: str, rows: int = 6, width: int = 512) -> Stored:
    rng = np.random.default_rng(0)
    values = {
        "ternary": [-1, 0, 1], "1bit": [-1, 1], "int8": range(-127, 128), "int4": range(-8, 8)
    }[mode]  # fmt: skip
    shape = (rows, width // 32 if mode == "int4" else 1)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-3
    if mode == "int4":
        scale[::2] *= -1
    codes = rng.choice(values, (rows, width)).astype(np.int8)
    codes[:, :300] *= 0 if mode == "ternary" else 1  # blocks of zeros
    return Stored(mode, codes, scale.to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("tq2_0", "ternary"), ("tq1_0", "ternary"), ("q4_0", "ternary"), ("q4_0", "1bit"),
     ("q8_0", "int8"), ("q4_0", "int4")],
)  # fmt: skip
def test_the_formats_library_reads_the_same_weights(kind, mode):
    """To the last bit, also where a block has only zeros."""
    tensor = stored(mode)
    raw = gguf_file.ENCODERS[kind](tensor)
    found = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind.upper()))
    np.testing.assert_array_equal(found, tensor.weight())


def test_one_bit_blocks_by_hand():
    """18 bytes for 128 weights: the scale, then signs, the first the lowest bit."""
    codes = -np.ones((1, 128), np.int8)
    codes[0, [0, 3, 127]] = 1
    raw = gguf_file.q1_0(Stored("1bit", codes, np.array([[0.5]], np.float32)))
    assert raw.shape == (1, 18)
    assert raw[0, :2].tobytes() == np.float16(0.5).tobytes()
    assert raw[0, 2:].tolist() == [0b1001] + [0] * 14 + [0b10000000]


def test_two_bit_blocks_by_hand():
    """18 bytes for 64 weights: the scale, then four codes a byte, the first in the lowest bits,
    each with one added."""
    codes = np.zeros((1, 128), np.int8)
    codes[0, [0, 1, 63]] = 1, -1, -1
    codes[0, 64:] = -1
    raw = gguf_file.q2_0(Stored("ternary", codes, np.array([[0.5]], np.float32)))
    assert raw.shape == (1, 36)
    assert raw[0, :2].tobytes() == raw[0, 18:20].tobytes() == np.float16(0.5).tobytes()
    assert raw[0, 2:18].tolist() == [0b01_01_00_10] + [0b01_01_01_01] * 14 + [0b00_01_01_01]
    assert raw[0, 20:].tolist() == [0] * 16


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_", ["tq2_0", "tq1_0", "q4_0"])
def test_a_file_holds_the_student(tmp_path, kind, type_):
    """Read back by transformers' own reader where it knows the type, else tensor by tensor."""
    path = student(tmp_path, kind)
    done = export_gguf(read_packed(path), tmp_path / "a.gguf", type_)
    assert sorted(tmp_path.glob("*")) == [tmp_path / "a.gguf", path]
    reader = gguf.GGUFReader(done.path)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.1.ffn_up.weight"] == type_.upper()
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert done.file_bytes == done.path.stat().st_size
    model = load_packed(path)[0]
    if type_ == "q4_0":
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="a.gguf", dtype=torch.float32
        )
        ids = torch.arange(40)[None] * 7 % 300
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    else:
        tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = model.net.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
        np.testing.assert_array_equal(found, expected)


def test_the_type_is_the_fastest_that_is_exact():
    def packed(mode: str, *widths: int) -> Packed:
        tensors = {str(w): stored(mode, width=w) for w in widths}
        return Packed({}, {}, {}, tensors)

    assert choose_type(packed("ternary", 512, 768), None)[0] == "tq2_0"
    assert choose_type(packed("1bit", 384), None)[0] == "q1_0"
    chosen, why, zeros = choose_type(packed("ternary", 512, 576), None)
    assert (chosen, zeros) == ("q4_0", None)
    assert "not of 576 (smaller: lowbit.export --type q2_0, for GPUs and Macs)" in why
    assert choose_type(packed("ternary", 512, 608), None)[1].endswith("not of 608")
    assert choose_type(packed("ternary", 576), "q2_0") == ("q2_0", "as asked", None)
    assert choose_type(packed("ternary", 256), "tq1_0")[0] == "tq1_0"
    with pytest.raises(UserError, match=r"multiple of 128 weights; .* rows of 576; use q4_0"):
        choose_type(packed("1bit", 576), "q1_0")
    with pytest.raises(UserError, match="tq2_0 cannot hold 1bit weights; use q1_0 or q4_0"):
        choose_type(packed("1bit", 512), "tq2_0")
    with pytest.raises(UserError, match="fit no block"):
        choose_type(packed("ternary", 500), None)


@pytest.mark.parametrize("cut", pre_tokenizers.KNOWN)
def test_cuts_are_known_by_their_names(tmp_path, cut):
    """What is written is what was made, and a teacher that is read from it has the same ids."""
    path = student(tmp_path, "llama", cut=cut)
    export_gguf(read_packed(path), tmp_path / "a.gguf", "q4_0")
    from lowbit.models.teacher import load_teacher

    _, tokenizer = load_teacher(str(tmp_path / "a.gguf"))
    wrapped = tiny_tokenizer(300)
    wrapped.backend_tokenizer.pre_tokenizer = pre_tokenizers.make(cut)
    wrapped.backend_tokenizer.model.ignore_merges = cut in pre_tokenizers.WHOLE_WORDS
    text = "The miller's 12345 letters,\n\n  repairs  é don't"
    assert tokenizer.encode(text).tolist() == wrapped(text)["input_ids"]
    assert tokenizer.wrapped.chat_template == wrapped.chat_template
    assert (tokenizer.wrapped.bos_token, tokenizer.wrapped.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_4_bits_are_q4_0(tmp_path, tied):
    """To the last bit, beside blocks of another type."""
    path = student(tmp_path, "llama", bits=4, tie_word_embeddings=tied)
    done = export_gguf(read_packed(path), tmp_path / "a.gguf")
    assert done.low_bit == "TQ2_0"
    found = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
    assert ("output.weight" in found) != tied
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    if not tied:
        names["output.weight"] = "lm_head.weight"
    for theirs, ours in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
        names[f"blk.0.{theirs}.weight"] = f"model.layers.0.{ours}.weight"
    state = load_packed(path)[0].net.state_dict()
    for theirs, ours in names.items():
        tensor = found[theirs]
        assert tensor.tensor_type.name == "Q4_0"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, state[ours].numpy())


@pytest.mark.parametrize(("scale", "said"), [(-131072.0, "beyond float16"), (2.0**-25, "small")])
def test_scales_that_float16_has_not(scale, said):
    tensor = stored("int4")
    tensor.scale[2, 3] = scale
    with pytest.raises(UserError, match=rf"^x: a scale .*{said}"):
        gguf_file.encoded("x", tensor, "tq2_0")


# ------------------------------------------------------------------------------------- padding


def padded(path: Path) -> TransformersLM:
    """A student with the zeros that it is exported with."""
    found = read_packed(path)
    zeros = padding(found.config["transformers"], 256)
    state = {
        name: torch.from_numpy(zeros(name, tensor).weight())
        for name, tensor in found.tensors.items()
    }
    return build_transformers(zeros.config, state, "padded")


def offered(found: Packed) -> bool:
    """Does the export name zeros as a way?"""
    return "tq2_0, filled with zeros" in choose_type(found, None)[1]


def smaller(found: Packed, folder: Path) -> bool:
    """Is the file with zeros smaller than the one without?"""
    sizes = [export_gguf(found, folder / "a.gguf", t).file_bytes for t in ("tq2_0", "q4_0")]
    return sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", ODD), ("llama", {**ODD, "tie_word_embeddings": False, "bits": 4}),
     ("llama", {**ODD, "attention_bias": True, "mlp_bias": True}), ("qwen2", ODD),
     ("qwen2", {**ODD, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}),
     ("qwen3", ODD), ("llama", {**ODD, "num_key_value_heads": 3})],
)  # fmt: skip
def test_zeros_change_nothing(tmp_path, kind, more):
    """In float64, eps so large that it matters; weights of norms are float32."""
    eps = 1e-6 if kind == "qwen3" else 0.1
    path = student(tmp_path, kind, rms_norm_eps=eps, **more)
    model, wide = load_packed(path)[0], padded(path)
    found = read_packed(path)
    counted = padding(found.config["transformers"], 256).growth(found)
    for name, w in wide.net.state_dict().items():
        assert w.ndim < 2 or w.shape[1] % 256 == 0, name
    weights = [sum(p.numel() for p in m.net.parameters()) for m in (model, wide)]
    assert counted == weights[1] / weights[0]
    assert offered(found) == (counted <= gguf_file.MOST_PADDING and smaller(found, tmp_path))
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        ours, theirs = (m.double()(ids).logits for m in (model, wide))
    torch.testing.assert_close(theirs, ours, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("layers", [2, 5])
def test_zeros_are_offered_where_they_make_the_file_smaller(tmp_path, layers):
    """The first layer has 4 bits, which grow with the rows."""
    path = student(tmp_path, "llama", bits=4, num_hidden_layers=layers, **ODD)
    found = read_packed(path)
    assert offered(found) == smaller(found, tmp_path) == (layers == 5)


@pytest.mark.parametrize(
    ("heads", "keys", "size", "becomes"),
    [(9, 3, 64, (12, 3)), (14, 2, 64, (16, 2)), (9, 9, 64, (12, 12)), (15, 5, 64, (20, 5)),
     (8, 8, 96, (8, 8)), (3, 1, 128, (4, 1)), (16, 8, 128, (16, 8)), (6, 3, 64, (8, 4))],
)  # fmt: skip
def test_the_fewest_heads_that_fill_blocks(heads, keys, size, becomes):
    """A real head of queries keeps its head of keys."""
    config = dict(
        model_type="llama", hidden_size=256, intermediate_size=300, rms_norm_eps=1.0,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=size,
    )  # fmt: skip
    zeros = padding(config, 256)
    after = zeros.config["num_attention_heads"], zeros.config["num_key_value_heads"]
    assert after == becomes
    assert (zeros.config["intermediate_size"], zeros.config["rms_norm_eps"]) == (512, 1.0)
    places, length = zeros.axes["queries"]
    assert length == after[0] * size
    assert length % 256 == 0
    firsts = places.reshape(heads, size)[:, 0] // size
    np.testing.assert_array_equal(
        firsts // (after[0] // after[1]), np.arange(heads) // (heads // keys)
    )
    np.testing.assert_array_equal(np.diff(places.reshape(heads, size)), 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_padded_file_is_read_back(tmp_path, bits):
    """By our reader of GGUF teachers, with a student's logits."""
    from lowbit.models.teacher import load_teacher

    path = student(tmp_path, "llama", bits=bits, **ODD)
    done = export_gguf(read_packed(path), tmp_path / "a.gguf", "tq2_0")
    assert done.reason == "as asked, rows of 192 padded to 256 and of 992 padded to 1024 with zeros"
    model, again = load_packed(path)[0], load_teacher(str(done.path))[0]
    assert sum(n for _, n, _ in done.parts.values()) == sum(
        t.values.size for t in read_packed(path).tensors.values()
    )
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- in a real llama.cpp


LETTER = 70  # a token that is a letter: the engine reports nothing after half a character


class Rounded:
    """Inside, every linear layer of a model reads activations in 8 bits, one scale for so many: as
    the engine's products do."""

    def __init__(self, model: TransformersLM, size: int) -> None:
        self.model, self.size = model, size

    def __enter__(self) -> None:
        def round_inputs(module, args):
            x = args[0]
            blocks = x.reshape(*x.shape[:-1], -1, self.size)
            scale = blocks.abs().amax(-1, keepdim=True) / 127
            rounded = (blocks / scale.clamp_min(1e-12)).round() * scale
            return (rounded.reshape(x.shape),)

        layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        self.handles = [m.register_forward_pre_hook(round_inputs) for m in layers]

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("kind", "mode", "type_", "size", "more"),
    [("llama", "ternary", "q4_0", 32, {}), ("llama", "ternary", "tq2_0", 256, {}),
     ("llama", "ternary", "tq1_0", 256, {}), ("llama", "1bit", "q1_0", 32, {}),
     ("llama", "ternary", "q2_0", 32, {"bits": 4}),
     ("qwen2", "ternary", "q2_0", 32, {**ODD, "intermediate_size": 960}),
     ("qwen2", "ternary", "q4_0", 32, {}), ("qwen3", "ternary", "tq2_0", 256, {}),
     ("llama", "ternary", "tq2_0", 256, {"bits": 4}),
     ("llama", "ternary", "q4_0", 32, {"bits": 4, "tie_word_embeddings": False}),
     ("llama", "ternary", "tq2_0", 256, ODD), ("llama", "ternary", "tq1_0", 256, ODD),
     ("llama", "ternary", "tq2_0", 256, {**ODD, "bits": 4, "tie_word_embeddings": False}),
     ("qwen2", "ternary", "tq2_0", 256, ODD),
     ("qwen2", "ternary", "tq2_0", 256, WIDER), ("qwen3", "ternary", "tq2_0", 256, ODD),
     ("llama", "ternary", "q4_0", 32, {"rope_parameters": LLAMA3}),
     ("qwen2", "ternary", "q4_0", 32, {"rope_parameters": LONG}),
     ("mistral", "ternary", "q4_0", 32, {"sliding_window": None}),
     ("smollm3", "ternary", "q4_0", 32, SMOLLM3),
     ("smollm3", "ternary", "tq2_0", 256, {**SMOLLM3, **ODD}),
     ("gemma", "ternary", "q4_0", 32, {}), ("gemma2", "ternary", "q4_0", 32, GEMMA2),
     ("gemma3_text", "ternary", "q4_0", 32, GEMMA3),
     ("gemma3_text", "ternary", "tq2_0", 256, GEMMA3),
     ("phi", "ternary", "q4_0", 32, {}),
     ("phi3", "ternary", "q4_0", 32, {"partial_rotary_factor": 0.5, "bits": 4})],
)  # fmt: skip
def test_the_engine_says_what_we_say(tmp_path, kind, mode, type_, size, more):
    """The engine's products round activations to 8 bits. With the same rounding our distribution
    is the engine's, up to its bfloat16 and float16 cache; without, it differs by what that
    rounding costs."""
    path = student(tmp_path, kind, mode, **more)
    export_gguf(read_packed(path), tmp_path / "a.gguf", type_)
    prompts = [[0, 40, 41, 77], list(range(10, 60)), [299, 5, 5, 5, 120]]
    heard = heard_by_engine(tmp_path / "a.gguf", LETTER)
    found = [heard(ids) for ids in prompts]
    zeros = size == 256 and "hidden_size" in more
    model = padded(path) if zeros else load_packed(path)[0]
    for ids, theirs in zip(prompts, found, strict=True):
        with torch.no_grad(), Rounded(model, size):
            ours = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert len(theirs) > 100
        gap = sum(
            float(ours[i].exp()) * (float(ours[i]) - log) for i, log in theirs.items()
        )  # KL, but for what is not among the 200
        assert abs(gap) < 0.02
        assert int(ours.argmax()) in sorted(theirs, key=theirs.get)[-3:]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [("llama", {"hidden_act": "gelu"}, "activation 'gelu' \\(silu\\)"),
     ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'"),
     ("qwen2", {"rope_parameters": LLAMA3}, "type 'llama3'"),
     ("smollm3", {"no_rope_layers": [1, 0, 1]}, "every 4th without positions"),
     ("gemma2", {"query_pre_attn_scalar": 100}, "scale of attention"),
     ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "order of layers"),
     ("gemma3_text", {"use_bidirectional_attention": True}, "attention to what follows"),
     ("gemma3_text", {"attn_logit_softcapping": 20.0}, "logits have no cap"),
     ("gemma3_text", {"sliding_window": None}, "with windows"),
     ("gemma2", {"attn_logit_softcapping": None}, "logits are capped"),
     ("llama", {"intermediate_size": 100}, "rows of 100 weights fit no block"),
     ("mamba", {}, "type 'mamba' cannot be exported")],
)  # fmt: skip
def test_what_the_engine_computes_otherwise_is_refused(kind, changes, said):
    from transformers import AutoConfig

    config = {"model_type": kind}
    if kind != "mamba":
        shape = {"num_hidden_layers": 3, "head_dim": 256, "no_rope_layers": [1, 1, 1], **changes}
        config |= json.loads(AutoConfig.for_model(kind, **shape).to_json_string(use_diff=False))
    with pytest.raises(UserError, match=said):
        check_shape(config)
    if changes and kind != "llama":
        capped = 50.0 if kind == "gemma2" else None
        check_shape(config | {k: WITHOUT.get(k, capped) for k in changes})


#: Values with which the same is exported.
WITHOUT = {
    "no_rope_layers": [1, 1, 1], "query_pre_attn_scalar": 256, "layer_types": None,
    "use_bidirectional_attention": False, "rope_parameters": None, "sliding_window": 4096,
}  # fmt: skip


def test_zeros_leave_factors_of_positions_as_they_are(tmp_path):
    """Also where transformers would refuse the padded shape: 20 heads, a hidden size of 1024."""
    path = student(tmp_path, "llama", **WIDER, rope_parameters=LLAMA3)
    found = []
    for kind in ("tq2_0", "q4_0"):
        done = export_gguf(read_packed(path), tmp_path / "a.gguf", kind)
        tensors = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
        found.append(np.array(tensors["rope_freqs.weight"].data))
    assert found[0].shape == (32,)
    assert found[0].max() == pytest.approx(8)
    np.testing.assert_array_equal(*found)


def test_a_context_ends_with_the_window(tmp_path):
    """Where llama.cpp has no windows for an architecture."""
    path = student(tmp_path, "mistral", sliding_window=48)
    done = export_gguf(read_packed(path), tmp_path / "a.gguf")
    field = gguf.GGUFReader(done.path).get_field("llama.context_length")
    assert field.contents() == 48


# ------------------------------------------------------------------------------ the commands


def test_the_command(tmp_path, capsys):
    path = student(tmp_path, "llama")
    assert export.main([str(tmp_path), "--to", "gguf"]) == 0
    out = capsys.readouterr().out
    assert "Low-bit weights are TQ2_0: the fastest on CPUs that holds ternary weights" in out
    assert "exactly (lowbit.export --type q2_0, for GPUs and Macs)" in out
    assert (tmp_path / "student.gguf").exists()
    assert f"{(tmp_path / 'student.gguf').stat().st_size:,} bytes" in out
    assert export.main([str(path), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().err == ""
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, load_packed(path)[0](ids).logits)


def refused(capsys, *words: object) -> str:
    assert export.main([str(w) for w in words]) == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1
    return out.err


def test_what_cannot_be_exported(tmp_path, capsys, tiny_teacher, monkeypatch):
    path = student(tmp_path, "llama")
    assert "no such file" in refused(capsys, tmp_path / "none", "--to", "gguf")
    (tmp_path / "empty").mkdir()
    assert "no packed student" in refused(capsys, tmp_path / "empty", "--to", "gguf")
    assert "student of bytes" in refused(capsys, tiny_teacher, "--to", "gguf")
    assert "student of bytes" in refused(capsys, tiny_teacher, "--to", "hf")
    assert "--type needs" in refused(capsys, path, "--to", "hf", "--type", "q4_0")
    assert "cannot hold ternary" in refused(capsys, path, "--to", "gguf", "--type", "q1_0")
    nowhere = tmp_path / "none" / "a.gguf"
    assert "cannot write" in refused(capsys, path, "--to", "gguf", "--output", nowhere)

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    before = sorted(tmp_path.iterdir())
    assert "No space left" in refused(capsys, path, "--to", "gguf")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()

    small = student(tmp_path, "llama", hidden_size=96, intermediate_size=128, head_dim=32)
    said = refused(capsys, small, "--to", "gguf", "--type", "tq2_0")
    assert "rows of 96 padded to 256 and of 128 padded to 256 with zeros" in said
    assert "times as many; use q4_0" in said
    said = refused(capsys, small, "--to", "gguf", "--type", "q2_0")
    assert "needs rows of a multiple of 64 weights; this model has rows of 96; use q4_0" in said
    one_bit = student(tmp_path, "llama", "1bit", **ODD)
    assert "cannot hold 1bit" in refused(capsys, one_bit, "--to", "gguf", "--type", "tq2_0")
    odd = student(tmp_path, "gemma", hidden_size=192, head_dim=64)
    said = refused(capsys, odd, "--to", "gguf", "--type", "tq2_0")
    assert "this gemma has rows of 192, which are not padded here; use q2_0 or q4_0" in said
    monkeypatch.setattr(pre_tokenizers, "KNOWN", {})
    assert "byte-level BPE" in refused(capsys, student_of(tmp_path), "--to", "gguf")


def student_of(folder: Path) -> Path:
    sub = folder / "again"
    sub.mkdir()
    net = tiny_net("llama", **WIDE)
    save_packed(
        sub / "a.npz", TransformersLM(net), TeacherTokenizer(tiny_tokenizer(), 320).describe()
    )
    return sub


def test_a_run_exports(tmp_path, text_file, capsys):
    """And says before it trains where it could not."""
    teacher = tmp_path / "teacher"
    tiny_net("llama", vocab_size=300).save_pretrained(teacher)
    tiny_tokenizer(300).save_pretrained(teacher)
    words = [
        "--teacher",
        str(teacher),
        "--data",
        str(text_file),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    words += ["--ternary", "--qat", "--epochs", "1", "--seq_len", "32", "--export", "gguf"]
    assert distillation.main(words) == 0
    out = capsys.readouterr().out
    assert "Low-bit weights are Q4_0: exact, and tq2_0 needs rows of a multiple of 256" in out
    assert "filled with zeros" not in out  # rows of 64 would be four times as long
    assert list((tmp_path / "o").glob("*.gguf"))
    assert distillation.main([*words[2:], "--teacher", "embedded"]) == 2
    assert "student of bytes" in capsys.readouterr().err


def test_every_type_has_an_encoder():
    assert set(TYPES) < set(gguf_file.ENCODERS)
