"""Packed files that are not what they seem: refused in one line, before memory is taken."""

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
from packing import SMALL, TOKENIZER, members_of, small_model

from lowbit import UserError
from lowbit.files.packed import (
    FORMAT,
    VERSION,
    load_packed,
    read_packed,
    save_packed,
)
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.quantization.layers import hold


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


def test_large_scales_are_in_bzip2(tmp_path: Path, monkeypatch) -> None:
    """numpy and the reader take them; damage is a line, and says so."""
    small, large = tmp_path / "small.npz", tmp_path / "large.npz"
    model = small_model("ternary", False)
    save_packed(small, model, TOKENIZER)
    monkeypatch.setattr("lowbit.files.packed.LARGE", 1)
    save_packed(large, model, TOKENIZER)
    kinds = []
    for path in (small, large):
        with zipfile.ZipFile(path) as z:
            kinds.append({i.filename for i in z.infolist() if i.compress_type == zipfile.ZIP_BZIP2})
    assert kinds == [set(), {"scales.npy"}]
    ours, theirs = members_of(large), members_of(small)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    want = load_packed(small)[0].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in load_packed(large)[0].state_dict().items())
    with zipfile.ZipFile(large) as z:
        info = z.getinfo("scales.npy")
    raw = bytearray(large.read_bytes())
    raw[info.header_offset + 30 + len(info.filename) + 20 + info.compress_size // 2] ^= 255
    large.write_bytes(raw)
    refused(large, "is damaged, or not a packed model")


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
