"""The packed file: codecs, exactness, size, and files that are not what they seem."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from packing import SMALL, TOKENIZER, small_model

from lowbit import UserError
from lowbit.files.packed import (
    FORMAT,
    STREAM_DTYPES,
    load_packed,
    pack_bits,
    pack_nibbles,
    pack_ternary,
    save_packed,
    unpack_bits,
    unpack_nibbles,
    unpack_ternary,
)
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import low_bit_layers, quantize_model

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
