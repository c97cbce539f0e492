"""The packed file: codecs, exactness, size, and files that are not what they seem."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit import UserError
from lowbit.files.packed import (
    FORMAT,
    STREAM_DTYPES,
    VERSION,
    load_packed,
    pack_bits,
    pack_nibbles,
    pack_ternary,
    read_packed,
    save_packed,
    unpack_bits,
    unpack_nibbles,
    unpack_ternary,
)
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import hold, low_bit_layers, quantize_model
from lowbit.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer().describe()
SMALL = ModelConfig(
    vocab_size=30, hidden_size=18, intermediate_size=26, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=32,
)  # fmt: skip


def small_model(mode: str, learnable: bool, **changes) -> CausalLM:
    """A quantised model whose latents, gains and scales have moved since conversion."""
    model = CausalLM(ModelConfig(**{**SMALL.to_dict(), **changes})).initialise(0).eval()
    quantize_model(model, mode, learnable_scale=learnable)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=g))
            p.add_(0.05 * p.abs().mean() * torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "small.npz"
    save_packed(path, small_model("ternary", False), TOKENIZER)
    return path


# ---------------------------------------------------------------------------------- codecs


@given(codes=hnp.arrays(np.int8, st.integers(0, 60), elements=st.integers(-1, 1)))
def test_ternary_round_trip(codes: np.ndarray) -> None:
    """Any length comes back, in a fifth of the bytes."""
    packed = pack_ternary(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == ((len(codes) + 4) // 5,)
    assert (packed <= 242).all()
    np.testing.assert_array_equal(unpack_ternary(packed, len(codes)), codes)


@given(codes=hnp.arrays(np.int8, st.integers(0, 60), elements=st.sampled_from([-1, 1])))
def test_bits_round_trip(codes: np.ndarray) -> None:
    """Any length comes back, in an eighth of the bytes."""
    packed = pack_bits(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == ((len(codes) + 7) // 8,)
    np.testing.assert_array_equal(unpack_bits(packed, len(codes)), codes)


@given(codes=hnp.arrays(np.int8, st.integers(0, 30).map(lambda n: 2 * n),
                        elements=st.integers(-8, 7)))  # fmt: skip
def test_nibbles_round_trip(codes: np.ndarray) -> None:
    """Any even length comes back, in half of the bytes."""
    packed = pack_nibbles(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (len(codes) // 2,)
    np.testing.assert_array_equal(unpack_nibbles(packed, len(codes)), codes)


def test_nibbles_golden_bytes() -> None:
    """code + 8, the first in the lower half; every byte is legal and comes back."""
    assert pack_nibbles(np.array([-8, 7, 0, 1, -8, -7])).tolist() == [0xF0, 0x98, 0x10]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pack_nibbles(unpack_nibbles(every, 512)), every)
    for count in (510, 511, 513, 514):
        with pytest.raises(ValueError, match="cannot hold"):
            unpack_nibbles(every, count)
    for bad in ([8, 0], [-9, 0], [0.5, 0], [float("nan"), 0]):
        with pytest.raises(ValueError, match="codes are"):
            pack_nibbles(np.array(bad))


@pytest.mark.parametrize("length", range(23))
def test_every_short_length(length: int) -> None:
    """All remainders of 5 and 8, 0 included, also from float arrays of two dimensions."""
    rng = np.random.default_rng(length)
    trits, bits = rng.integers(-1, 2, length), rng.choice([-1, 1], length)
    assert (unpack_ternary(pack_ternary(trits[None].astype(np.float32)), length) == trits).all()
    assert (unpack_bits(pack_bits(bits[None].astype(np.float32)), length) == bits).all()


@pytest.mark.parametrize(
    ("codes", "golden"),
    [
        ([], []),
        ([-1, -1, -1, -1, -1], [0]),
        ([1, 1, 1, 1, 1], [242]),  # 2 * (1 + 3 + 9 + 27 + 81)
        ([0, 0, 0, 0, 0], [121]),
        ([1, 0, -1, -1, -1], [5]),  # 2 + 1 * 3
        ([-1, -1, -1, -1, 1], [162]),  # 2 * 81
        ([1], [122]),  # 2 + 3 + 9 + 27 + 81: padded with zeros
        ([0, 0, 0, 0, 0, -1], [121, 120]),
    ],
)
def test_ternary_golden_bytes(codes: list[int], golden: list[int]) -> None:
    """code + 1 as base-3 digits, the first least significant."""
    assert pack_ternary(np.array(codes, int)).tolist() == golden


@pytest.mark.parametrize(
    ("codes", "golden"),
    [
        ([], []),
        ([1, -1, -1, -1, -1, -1, -1, -1], [1]),
        ([-1, -1, -1, -1, -1, -1, -1, 1], [128]),
        ([1] * 8, [255]),
        ([1, -1, 1], [5]),
        ([-1] * 8 + [-1, 1], [0, 2]),
    ],
)
def test_bits_golden_bytes(codes: list[int], golden: list[int]) -> None:
    """A bit a code, the first least significant."""
    assert pack_bits(np.array(codes, int)).tolist() == golden


def test_every_byte() -> None:
    """0..242 are exactly the five-code words; the others are refused."""
    legal = np.arange(243, dtype=np.uint8)
    words = unpack_ternary(legal, 5 * 243).reshape(-1, 5)
    assert len({tuple(w) for w in words.tolist()}) == 243
    np.testing.assert_array_equal(pack_ternary(words), legal)
    for byte in range(243, 256):
        with pytest.raises(ValueError, match="above 242"):
            unpack_ternary(np.array([0, byte], np.uint8), 10)


@pytest.mark.parametrize("count", [0, 1, 4, 11, 15])
def test_wrong_lengths(count: int) -> None:
    """Two bytes hold 6 to 10 ternary codes, or 9 to 16 bits, and no other number."""
    two = np.zeros(2, np.uint8)
    with pytest.raises(ValueError, match="cannot hold"):
        unpack_ternary(two, count)
    with pytest.raises(ValueError, match="cannot hold"):
        unpack_bits(two, count if count < 9 else count + 8)


@pytest.mark.parametrize("bad", [[2], [0.5], [-2, 0], [float("nan")]])
def test_codes_outside_the_set(bad: list) -> None:
    for pack in (pack_ternary, pack_bits):
        with pytest.raises(ValueError, match="codes are"):
            pack(np.array(bad))
    with pytest.raises(ValueError, match="codes are"):
        pack_bits(np.array([0]))


def test_padding_must_be_zero() -> None:
    """So that one tensor has one encoding."""
    with pytest.raises(ValueError, match="padding"):
        unpack_ternary(pack_ternary(np.array([1, 1, 1, 1, 1])), 4)
    with pytest.raises(ValueError, match="padding"):
        unpack_bits(np.array([0b1000], np.uint8), 3)


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
@torch.no_grad()
def test_the_file_is_the_quantized_model(
    tmp_path: Path, mode: str, learnable: bool, tied: bool
) -> None:
    """Logits of the file read back equal those of the quantised forward pass, bit for bit."""
    model = small_model(mode, learnable, tie_word_embeddings=tied)
    path = tmp_path / "model.npz"
    save_packed(path, model, TOKENIZER, notes={"steps": 3})
    loaded, tokenizer, notes = load_packed(path)
    assert (loaded.config, tokenizer, notes) == (model.config, TOKENIZER, {"steps": 3})
    ids = torch.randint(30, (3, 32), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    weights = loaded.state_dict()
    for name, layer in low_bit_layers(model):
        assert torch.equal(weights[f"{name}.weight"], layer.quantized_weight())


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("learnable", [False, True])
@torch.no_grad()
def test_scale_scopes_are_stored(tmp_path: Path, scope: str, learnable: bool) -> None:
    """One scale a row or one a matrix, both read back exactly."""
    model = CausalLM(SMALL).initialise(0).eval()
    quantize_model(model, "ternary", scope=scope, learnable_scale=learnable)
    save_packed(tmp_path / "model.npz", model, TOKENIZER)
    ids = torch.arange(30)[None]
    loaded, _, _ = load_packed(tmp_path / "model.npz")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_plain_models(tmp_path: Path) -> None:
    """Unquantised models are stored exactly in float32 and rounded in float16."""
    model = CausalLM(SMALL).initialise(0)
    for plain, cast in (("float32", torch.float32), ("float16", torch.float16)):
        save_packed(tmp_path / "m.npz", model, TOKENIZER, plain=plain)
        loaded, _, _ = load_packed(tmp_path / "m.npz")
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value.to(cast).float())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    """No time stamp, no order that varies."""
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path in paths:
        save_packed(path, small_model("1bit", True), TOKENIZER)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("mode", ["ternary", "1bit"])
def test_non_finite_weights_are_not_packed(
    tmp_path: Path, value: float, name: str, mode: str
) -> None:
    """A model that could not be read back is refused by tensor, and no file is left."""
    model = small_model(mode, False)
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = value
    with pytest.raises(UserError, match=rf"{name}\.weight"):
        save_packed(tmp_path / "m.npz", model, TOKENIZER)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(("mode", "bits"), [("ternary", 1.62), ("1bit", 1.1)])
def test_size(tmp_path: Path, mode: str, bits: float) -> None:
    """A gaussian model of the default shape: bits a linear weight with scales, whole file."""
    model = quantize_model(CausalLM(ModelConfig()).initialise(0), mode)
    path = tmp_path / "model.npz"
    report = save_packed(path, model, TOKENIZER)
    values = sum(p.numel() for p in model.parameters())
    assert report.file_bytes == path.stat().st_size
    assert report.float32_bytes == 4 * values
    assert report.linear_weights == 3 * (4 * 256 * 256 + 3 * 256 * 512)
    assert 1.0 <= report.linear_bits <= bits
    assert report.ratio == report.float32_bytes / report.file_bytes >= 15


def test_members_are_the_documented_ones(packed: Path) -> None:
    """numpy reads the file without pickle; names, types and lengths are the format's."""
    with np.load(packed, allow_pickle=False) as z:
        members = {k: z[k] for k in z.files}
    assert members.keys() == {"header", "ternary", "int8", "float32", "scales"}
    header = json.loads(members.pop("header").tobytes())
    assert header.keys() == {"format", "version", "config", "tokenizer", "tensors", "notes"}
    assert (header["format"], header["version"]) == (FORMAT, 1)  # as before there was int4
    for name, array in members.items():
        assert array.dtype == STREAM_DTYPES[name]
        assert array.ndim == 1
    counts = {"ternary": 0, "int8": 0, "float32": 0, "scales": 0}
    for entry in header["tensors"]:
        n = int(np.prod(entry["shape"]))
        counts[entry["encoding"]] += -(-n // 5) if entry["encoding"] == "ternary" else n
        counts["scales"] += entry.get("scales", 0)
    assert {k: len(v) for k, v in members.items()} == counts


def test_a_reader_in_numpy_alone(packed: Path) -> None:
    """The module's first page is enough to decode a weight by hand."""
    with np.load(packed, allow_pickle=False) as z:
        header = json.loads(z["header"].tobytes())
        stream, scales = z["ternary"], z["scales"]
    byte = row = 0
    decoded = {}
    for entry in header["tensors"]:
        if entry["encoding"] == "ternary":
            n = entry["shape"][0] * entry["shape"][1]
            digits = [b // 3**i % 3 - 1 for b in stream[byte : byte + -(-n // 5)].tolist()
                      for i in range(5)][:n]  # fmt: skip
            byte += -(-n // 5)
            scale = (scales[row : row + entry["scales"]].astype("<u4") << 16).view("<f4")
            decoded[entry["name"]] = np.reshape(digits, entry["shape"]) * scale[:, None]
        row += entry.get("scales", 0)
    state = load_packed(packed)[0].state_dict()
    assert len(decoded) == 14
    for name, value in decoded.items():
        np.testing.assert_array_equal(value.astype(np.float32), state[name].numpy())


# --------------------------------------------------------------------------- hostile files


def members_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


def rewrite(
    packed: Path, tmp_path: Path, change: Callable[[dict, dict[str, np.ndarray]], object]
) -> Path:
    """The file with its header and streams changed, sound as a zip."""
    members = members_of(packed)
    header = json.loads(members.pop("header").tobytes())
    change(header, members)
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "changed.npz"
    np.savez_compressed(path, header=np.frombuffer(raw, np.uint8), **members)
    return path


def refused(path: Path, message: str = "") -> None:
    with pytest.raises(UserError) as e:
        load_packed(path)
    assert message in str(e.value)
    assert str(path) in str(e.value)


def test_rewriting_alone_is_harmless(packed: Path, tmp_path: Path) -> None:
    """The helper of the tests below writes a file that loads."""
    loaded, _, _ = load_packed(rewrite(packed, tmp_path, lambda h, m: None))
    want = load_packed(packed)[0].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in loaded.state_dict().items())


def edit(**values) -> Callable[[dict, dict], object]:
    return lambda h, m: h.update(values)


def edit_config(**values) -> Callable[[dict, dict], object]:
    return lambda h, m: h["config"].update(values)


def edit_tensor(index: int, **values) -> Callable[[dict, dict], object]:
    return lambda h, m: h["tensors"][index].update(values)


def set_stream(
    name: str, make: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict, dict], object]:
    return lambda h, m: m.update({name: make(m[name])})


def with_first(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.concatenate((np.array([value], a.dtype), a[1:]))


HEADERS = {
    "wrong version": (edit(version=VERSION + 1), f"version {VERSION + 1}"),
    "wrong format": (edit(format="other"), "'other'"),
    "no tokenizer": (edit(tokenizer=None), "tokenizer or notes"),
    "notes a list": (edit(notes=[]), "tokenizer or notes"),
    "no tensors": (edit(tensors=[]), ""),
    "tensors a number": (edit(tensors=3), "damaged"),
    "config a list": (edit(config=[1]), "config"),
    "negative size": (edit_config(hidden_size=-18), "hidden_size"),
    "other size": (edit_config(vocab_size=31), "model.embed_tokens.weight"),
    "giant hidden size": (edit_config(hidden_size=3 * 2**28), ""),
    "giant vocabulary": (edit_config(vocab_size=2**31 - 1), ""),
    "giant depth": (edit_config(num_hidden_layers=2**31 - 1), ""),
    "giant positions": (edit_config(max_position_embeddings=2**31 - 1), ""),
    "giant shape": (edit_tensor(0, shape=[2**30, 2**30], scales=1), "streams do not match"),
    "large shape": (edit_tensor(0, shape=[2**16, 2**16], scales=1), "wrong length"),
    "shape of 2^31": (edit_tensor(0, shape=[2**31, 1]), "bad shape"),
    "empty shape": (edit_tensor(0, shape=[0, 18]), "bad shape"),
    "negative shape": (edit_tensor(0, shape=[-30, -18]), "bad shape"),
    "float shape": (edit_tensor(0, shape=[30.0, 18]), "bad shape"),
    "shape a text": (edit_tensor(0, shape="ab"), "bad shape"),
    "flat shape": (edit_tensor(0, shape=[540]), "scales of"),
    "too many scales": (edit_tensor(0, scales=29), "scales of"),
    "scales a text": (edit_tensor(0, scales="30"), "scales of"),
    "unknown encoding": (edit_tensor(0, encoding="int4"), "unknown encoding"),
    "no encoding of any version": (edit_tensor(0, encoding="int3"), "unknown encoding"),
    "scales as encoding": (edit_tensor(0, encoding="scales"), "unknown encoding"),
    "unhashable encoding": (edit_tensor(0, encoding=[]), "damaged"),
    "same tensor twice": (edit_tensor(1, name="model.embed_tokens.weight"), "twice"),
    "name a number": (edit_tensor(1, name=3), "no name"),
    "unknown tensor": (edit_tensor(1, name="extra.weight"), "tensor extra.weight"),
    "other layout": (lambda h, m: h["tensors"].reverse(), ""),
    "one tensor less": (lambda h, m: h["tensors"].pop(), ""),
    "deep header": (edit(notes=json.loads("[" * 500 + "]" * 500)), "notes"),
}  # fmt: skip

STREAMS = {
    "negative scale": (set_stream("scales", with_first(0xBF80)), "negative or not finite"),
    "scale of NaN": (set_stream("scales", with_first(0x7FC0)), "negative or not finite"),
    "infinite scale": (set_stream("scales", with_first(0x7F80)), "negative or not finite"),
    "illegal byte": (set_stream("ternary", with_first(243)), "above 242"),
    "padding": (set_stream("ternary", lambda a: np.full_like(a, 242)), "padding"),
    "short stream": (set_stream("ternary", lambda a: a[:-1]), ""),
    "long stream": (set_stream("scales", lambda a: np.append(a, a[:1])), ""),
    "very long stream": (set_stream("int8", lambda a: np.zeros(10**6, a.dtype)), "wrong length"),
    "wider type": (set_stream("scales", lambda a: a.astype(np.uint32)), ""),
    "signed type": (set_stream("ternary", lambda a: a.astype(np.int8)), ""),
    "two dimensions": (set_stream("int8", lambda a: a.reshape(2, -1)), ""),
    "NaN weight": (set_stream("float32", lambda a: a * np.float32("nan")), "not finite"),
    "missing stream": (lambda h, m: m.pop("scales"), "streams do not match"),
    "extra stream": (lambda h, m: m.update(float16=np.ones(3, np.float16)), "do not match"),
    "unknown stream": (lambda h, m: m.update(code=np.ones(3)), "members"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), [*HEADERS.values(), *STREAMS.values()], ids=[*HEADERS, *STREAMS]
)
def test_sound_zips_with_false_content(
    packed: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    """Every lie in the header or the streams is a UserError that names the file."""
    refused(rewrite(packed, tmp_path, change), message)


@pytest.fixture(scope="module")
def packed_nibbles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain decoder whose embedding (30, 64) and head are held in 4 bits."""
    path = tmp_path_factory.mktemp("packed") / "nibbles.npz"
    config = ModelConfig(
        **{**SMALL.to_dict(), "hidden_size": 96, "num_attention_heads": 6,
           "num_key_value_heads": 2, "tie_word_embeddings": False}
    )  # fmt: skip
    model = CausalLM(config).initialise(0)
    hold(model.embedding, 4)
    assert model.output is not None
    hold(model.output, 4)
    save_packed(path, model, TOKENIZER)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load_packed(path)[0].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in loaded.items())
    return path


def test_nibbles_are_of_version_2(packed_nibbles: Path) -> None:
    members = members_of(packed_nibbles)
    header = json.loads(members["header"].tobytes())
    held = [e for e in header["tensors"] if e["encoding"] == "int4"]
    assert header["version"] == VERSION == 2
    assert [(e["shape"], e["scales"]) for e in held] == [([30, 96], 90)] * 2
    assert members["int4"].shape == (30 * 96,)
    assert members["scales"].shape == (180,)


NIBBLES = {
    "version of before": (edit(version=1), "unknown encoding 'int4'"),
    "a scale a row": (edit_tensor(0, scales=30), "scales of"),
    "a scale": (edit_tensor(0, scales=1), "scales of"),
    "a text": (edit_tensor(0, scales="90"), "scales of"),
    "a scale too many": (edit_tensor(0, scales=91), "scales of"),
    "rows not of 32": (edit_tensor(0, shape=[60, 48]), "scales of"),
    "other rows": (edit_tensor(0, shape=[90, 32]), "model.embed_tokens.weight"),
    "flat": (edit_tensor(0, shape=[2880]), "scales of"),
    "no axis": (edit_tensor(0, shape=[]), "scales of"),
    "three axes": (edit_tensor(0, shape=[2, 15, 96]), "scales of"),
    "large shape": (edit_tensor(0, shape=[2**16, 2**16], scales=2**27), "wrong length"),
    "giant shape": (edit_tensor(0, shape=[2**30, 2**30], scales=2**55), "streams do not match"),
    "scale of NaN": (set_stream("scales", with_first(0x7FC0)), "not finite"),
    "infinite scale": (set_stream("scales", with_first(0xFF80)), "not finite"),
    "short stream": (set_stream("int4", lambda a: a[:-1]), ""),
    "very long stream": (set_stream("int4", lambda a: np.zeros(10**6, a.dtype)), "wrong length"),
    "signed type": (set_stream("int4", lambda a: a.view(np.int8)), ""),
    "missing stream": (lambda h, m: m.pop("int4"), "streams do not match"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), NIBBLES.values(), ids=NIBBLES)
def test_sound_zips_with_false_nibbles(
    packed_nibbles: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    refused(rewrite(packed_nibbles, tmp_path, change), message)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}' * 2]
)
def test_headers_that_are_no_objects(packed: Path, tmp_path: Path, raw: bytes) -> None:
    members = members_of(packed) | {"header": np.frombuffer(raw, np.uint8)}
    path = tmp_path / "bad.npz"
    np.savez(path, **members)
    refused(path)


def test_object_arrays_are_not_unpickled(packed: Path, tmp_path: Path) -> None:
    """A pickled member is refused and nothing in it is called."""
    target = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return Path.touch, (target,)

    for name in ("header", "scales", "ternary"):
        members = members_of(packed) | {name: np.array([Payload()], object)}
        path = tmp_path / "object.npz"
        np.savez(path, **members)
        refused(path)
    assert not target.exists()


def with_members(packed: Path, path: Path, extra: dict[str, bytes]) -> Path:
    path.write_bytes(packed.read_bytes())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as z:
        warnings.simplefilter("ignore")  # zipfile warns of duplicates
        for name, data in extra.items():
            z.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../evil.npy",
        "/tmp/evil.npy",
        "..\\evil.npy",
        "header",
        "scales.npy/",
        "ternary.NPY",
        "x.npy",
    ],
)
def test_members_outside_the_format(packed: Path, tmp_path: Path, name: str) -> None:
    """Nothing is extracted, and a file with any other member is refused."""
    refused(with_members(packed, tmp_path / "more.npz", {name: b"x"}), "members")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["more.npz"]


@pytest.mark.parametrize("name", ["header.npy", "ternary.npy", "scales.npy"])
def test_duplicate_members(packed: Path, tmp_path: Path, name: str) -> None:
    """Two members of one name are refused even where both are the same."""
    with zipfile.ZipFile(packed) as z:
        data = z.read(name)
    refused(with_members(packed, tmp_path / "twice.npz", {name: data}), "members")


def npy(dtype: str, shape: str, data: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("header.npy", npy("|u1", "(1099511627776,)", b"{}")),
        ("header.npy", npy("|u1", "(-1,)", b"{}")),
        ("header.npy", npy("|u1", "(2, 1)", b"{}")),
        ("header.npy", npy("|O", "(2,)", b"{}")),
        ("header.npy", b"\x93NUMPY\x03\x00" + bytes(300)),
        ("header.npy", b"PK\x03\x04"),
        ("header.npy", b""),
        ("header.npy", npy("|u1", f"({(2 << 20)},)", bytes(2 << 20))),
        ("scales.npy", npy("<u2", "(1099511627776,)", b"{}")),
        ("scales.npy", npy("<u2", "(9,)", bytes(18))),
    ],
)
def test_members_that_lie_about_their_size(
    packed: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    """Array headers are compared with what is expected before anything is read."""
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename == name else old.read(info))
    refused(path)


def test_not_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    refused(path, "cannot read")
    for content in (b"", b"PK", b"\x93NUMPY" + bytes(100), bytes(1000), io.BytesIO().getvalue()):
        path.write_bytes(content)
        refused(path)
    refused(tmp_path, "cannot read")


def test_truncations(packed: Path, tmp_path: Path) -> None:
    """No prefix of the file loads."""
    raw = packed.read_bytes()
    path = tmp_path / "short.npz"
    rng = random.Random(0)
    for size in [
        1,
        4,
        30,
        len(raw) - 22,
        len(raw) - 1,
        *(rng.randrange(len(raw)) for _ in range(40)),
    ]:
        path.write_bytes(raw[:size])
        refused(path)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bytes(packed: Path, tmp_path: Path, seed: int) -> None:
    """Flipped, set, dropped or doubled bytes: a UserError, or exactly the original model.

    Half of the mutations hit the zip's directory, which has no checksum of its own.
    """
    raw = packed.read_bytes()
    want = load_packed(packed)
    weights = want[0].state_dict()
    directory = raw.rindex(b"PK\x05\x06") - 46 * 5 - 60
    path = tmp_path / "mutated.npz"
    rng = random.Random(seed)
    refusals = 0
    for _ in range(60):
        data = bytearray(raw)
        at = rng.randrange(directory if rng.random() < 0.5 else 0, len(raw))
        how = rng.randrange(4)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.choice([b for b in (0, 255, 127, 128) if b != data[at]])
        elif how == 2:
            del data[at : at + rng.randint(1, 4)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 4)]
        path.write_bytes(data)
        try:
            got = load_packed(path)
        except UserError:
            refusals += 1
            continue
        assert got[0].config == want[0].config
        assert got[1:] == want[1:]
        for name, value in got[0].state_dict().items():
            assert torch.equal(value, weights[name]), (at, how, name)
    assert refusals > 20


def bomb(path: Path, rows: int, columns: int) -> Path:
    """A sound file of few bytes that declares many weights."""
    entry = {"name": "w.weight", "encoding": "ternary", "shape": [rows, columns], "scales": 1}
    header = {
        "format": FORMAT, "version": VERSION, "config": {}, "tokenizer": {}, "notes": {},
        "tensors": [entry],
    }  # fmt: skip
    codes = np.full(-(-rows * columns // 5), 121, np.uint8)
    raw = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(path, header=raw, ternary=codes, scales=np.ones(1, np.uint16))
    return path


def test_a_file_that_would_take_all_memory(tmp_path: Path) -> None:
    """A thousand times what any student's file of its size holds: refused before it is read."""
    path = bomb(tmp_path / "bomb.npz", 10_000, 10_000)
    assert path.stat().st_size < 1 << 16
    tracemalloc.start()
    refused(path, "100,000,000 weights are more than a file of this size can hold")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_small_models_may_be_anything(tmp_path: Path) -> None:
    """All codes equal, up to ALWAYS_ROOM."""
    assert (
        read_packed(bomb(tmp_path / "zeros.npz", 4000, 4000)).tensors["w.weight"].values.sum() == 0
    )
