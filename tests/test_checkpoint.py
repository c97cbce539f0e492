"""Atomic writing and the float32 checkpoint."""

from __future__ import annotations

import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit import UserError
from lowbit.files.atomic import atomic_write, prepare_folder
from lowbit.files.checkpoint import FORMAT, MAX_POSITIONS, VERSION, load_float32, save_float32
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.models.transformers_lm import whole_folder
from lowbit.text.tokenizers import ByteTokenizer

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip
TOKENIZER = ByteTokenizer().describe()
NORM = "model.norm.weight"


def make_payload() -> dict:
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": CONFIG.to_dict(),
        "tokenizer": TOKENIZER,
        "state_dict": CausalLM(CONFIG).initialise(1).state_dict(),
    }


def saved(tmp_path: Path, payload: object) -> Path:
    path = tmp_path / "model.pth"
    torch.save(payload, path)
    return path


# ---------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact(tmp_path: Path, tied: bool) -> None:
    """Weights, config and tokenizer come back as they were, denormals and -0 included."""
    config = ModelConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    state = CausalLM(config).initialise(0).state_dict()
    state[NORM][:4] = torch.tensor([1e-45, -0.0, 3.4e38, -1e-40])
    path = save_float32(tmp_path / "model.pth", config, state, TOKENIZER)
    model, tokenizer = load_float32(path)
    assert model.config == config
    assert tokenizer == TOKENIZER
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    for name, value in state.items():
        assert torch.equal(loaded[name].view(torch.int32), value.view(torch.int32)), name


def test_file_is_data_only(tmp_path: Path) -> None:
    """torch.load(weights_only=True) reads it, and finds the documented members."""
    state = CausalLM(CONFIG).initialise(0).state_dict()
    path = save_float32(tmp_path / "model.pth", CONFIG, state, TOKENIZER)
    payload = torch.load(path, weights_only=True)
    assert payload.keys() == make_payload().keys()
    assert payload["config"] == CONFIG.to_dict()


def test_views_are_stored_without_their_base(tmp_path: Path) -> None:
    """A transposed or sliced tensor is stored as its own elements."""
    state = CausalLM(CONFIG).initialise(0).state_dict()
    want = state[NORM].clone()
    state[NORM] = torch.stack((want, want * 2)).T.reshape(-1)[::2]
    model, _ = load_float32(save_float32(tmp_path / "m.pth", CONFIG, state, TOKENIZER))
    assert torch.equal(model.state_dict()[NORM], want)


# ------------------------------------------------------------------------------- refusals


class Payload:
    """Runs code where a pickle is trusted."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("place", ["whole", "member", "plain pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, place: str) -> None:
    """A checkpoint that holds a call is refused, and the call is not made."""
    target = tmp_path / "executed"
    bad = Payload(target)
    path = tmp_path / "model.pth"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    else:
        torch.save(bad if place == "whole" else make_payload() | {"notes": bad}, path)
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        load_float32(path)
    assert not target.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    """Every truncation is a UserError."""
    path = saved(tmp_path, make_payload())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=r"model\.pth"):
        load_float32(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_float32(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "not a checkpoint"),
        ({"format": "other"}, "not a checkpoint"),
        ({"version": VERSION + 1}, f"version {VERSION + 1}, expected {VERSION}"),
        ({"version": None}, "version None"),
        ({"state_dict": None}, "members missing"),
        ({"tokenizer": "bytes"}, "members missing"),
        ({"config": None}, "fields missing or unknown"),
        ({"config": CONFIG.to_dict() | {"hidden_size": -1}}, "hidden_size cannot be -1"),
        ({"state_dict": {NORM: 3}}, "not a plain tensor"),
        ({"state_dict": {5: torch.ones(2)}}, "not a plain tensor"),
    ],
)
def test_wrong_members(tmp_path: Path, changes: dict, message: str) -> None:
    """Whatever is not this format is refused in one line."""
    with pytest.raises(UserError) as e:
        load_float32(saved(tmp_path, make_payload() | changes))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("payload", [[1, 2], {}, {"state_dict": {}}, torch.ones(3)], ids=str)
def test_other_peoples_files(tmp_path: Path, payload: object) -> None:
    """A sound torch file that is not a checkpoint of this project is refused."""
    with pytest.raises(UserError, match="not a checkpoint"):
        load_float32(saved(tmp_path, payload))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(16).to_sparse(),
        torch.ones(16, dtype=torch.int64),
        torch.ones(16, dtype=torch.complex64),
        torch.ones(16, device="meta"),
        torch.ones(1).expand(16),
    ],
    ids=["sparse", "integer", "complex", "meta", "expanded"],
)
def test_odd_tensors_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    """Only dense floating-point tensors that own their elements are weights."""
    payload = make_payload()
    payload["state_dict"][NORM] = value
    with pytest.raises(UserError, match="plain tensor"):
        load_float32(saved(tmp_path, payload))


@pytest.mark.parametrize("name", [NORM, "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "inf"])
def test_a_bad_tensor_is_named(tmp_path: Path, name: str, damage: str) -> None:
    """Missing, misshapen and non-finite tensors are refused by name."""
    payload = make_payload()
    state = payload["state_dict"]
    if damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][:-1].clone()
    else:
        state[name].view(-1)[0] = float(damage)
    with pytest.raises(UserError) as e:
        load_float32(saved(tmp_path, payload))
    assert f"tensor {name} " in str(e.value)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    payload = make_payload()
    payload["state_dict"]["extra.weight"] = torch.ones(1)
    with pytest.raises(UserError, match=r"tensor extra\.weight "):
        load_float32(saved(tmp_path, payload))


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size=2**30),
        dict(hidden_size=2**30, intermediate_size=2**31 - 1, vocab_size=2**31 - 1),
        dict(vocab_size=2**31 - 1),
        dict(num_hidden_layers=2**31 - 1),
        dict(max_position_embeddings=MAX_POSITIONS + 1),
        dict(rope_theta=10**400),
    ],
    ids=str,
)
def test_giant_configs_take_no_memory(tmp_path: Path, changes: dict) -> None:
    """A config far beyond the tensors is refused before a model of its size is made."""
    payload = make_payload()
    payload["config"] |= changes
    with pytest.raises(UserError, match=r"model\.pth"):
        load_float32(saved(tmp_path, payload))


# --------------------------------------------------------------------------- atomic_write


class Interrupted(BaseException):
    pass


def test_files_that_would_take_all_memory(tmp_path: Path) -> None:
    """Compressed, or tensors that share their memory."""
    path = saved(tmp_path, make_payload())
    with zipfile.ZipFile(path) as z:
        members = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items():
            z.writestr(name, raw)
    with pytest.raises(UserError, match="is compressed"):
        load_float32(path)
    one = torch.zeros(1000, 100)
    path = saved(tmp_path, {**make_payload(), "state_dict": {str(i): one for i in range(50)}})
    with pytest.raises(UserError, match="larger than the file"):
        load_float32(path)


@pytest.mark.parametrize("error", [ValueError, OSError, Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_write_leaves_nothing(tmp_path: Path, error: type, exists: bool) -> None:
    """The old file stays as it was, and no temporary file stays behind."""
    path = tmp_path / "file.bin"
    if exists:
        path.write_bytes(b"old")

    def write(f) -> None:
        f.write(b"half of the new")
        f.flush()
        raise error("midway")

    with pytest.raises(error):
        atomic_write(path, write)
    assert [p.name for p in tmp_path.iterdir()] == (["file.bin"] if exists else [])
    assert not exists or path.read_bytes() == b"old"


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    """A folder in the file's place is an OSError without a temporary file."""
    path = tmp_path / "file.bin"
    path.mkdir()
    with pytest.raises(OSError, match=r"file\.bin"):
        atomic_write(path, lambda f: f.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    assert path.is_dir()


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """While the writer runs, readers of the path still see the old content."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    seen = []

    def write(f) -> None:
        f.write(b"new")
        f.flush()
        seen.append(path.read_bytes())

    assert atomic_write(path, write) == path
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    """As for a file that open() makes, not mkstemp's 0600; the umask itself is left alone."""
    old = os.umask(mask)
    try:
        path = atomic_write(tmp_path / "file.bin", lambda f: f.write(b"x"))
    finally:
        left = os.umask(old)
    assert left == mask
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_files_of_a_folder_may_be_read_by_those_who_may(tmp_path: Path) -> None:
    """safetensors makes files of mode 0600, which another user's server could not load."""
    old = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "student", {"tokenizer.json": "{}"}) as part:
            save_file({"weight": torch.zeros(2)}, part / "model.safetensors")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "student").iterdir()}
    assert modes == {"tokenizer.json": 0o644, "model.safetensors": 0o644}


def test_prepare_folder(tmp_path: Path) -> None:
    """Parents are made and nothing is left inside; a file in the place is a UserError."""
    folder = prepare_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write to"):
            prepare_folder(path)
