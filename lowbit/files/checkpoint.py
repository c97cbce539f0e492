"""The float32 checkpoint of the plain decoder."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from lowbit import UserError
from lowbit.files.atomic import atomic_write
from lowbit.models.decoder import CausalLM, ModelConfig
from lowbit.models.interface import require_state

FORMAT = "lowbit-float32"
VERSION = 1
MAX_POSITIONS = 1 << 17


def read_config(values: object, origin: str) -> ModelConfig:
    try:
        return ModelConfig.from_dict(values)
    except UserError as e:
        raise UserError(f"{origin}: {e}") from e


def build_model(config: ModelConfig, state: dict[str, torch.Tensor], origin: str) -> CausalLM:
    """A model from named float tensors; names and shapes must match exactly.

    They are compared before memory for the model is taken.
    """
    if config.num_hidden_layers > len(state) or config.max_position_embeddings > MAX_POSITIONS:
        raise UserError(
            f"{origin}: more layers than tensors, or more than {MAX_POSITIONS} positions"
        )
    try:
        with torch.device("meta"):
            expected = CausalLM(config).state_dict()
    except (RuntimeError, OverflowError) as e:  # sizes beyond 64 bits
        raise UserError(f"{origin}: impossible sizes in the model config") from e
    require_state(expected, state, origin)
    model = CausalLM(config)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model


def save_float32(
    path: str | os.PathLike, config: ModelConfig, state: dict[str, torch.Tensor], tokenizer: dict
) -> Path:
    """Latent float32 weights under their Hugging Face names, with config and tokenizer."""
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "tokenizer": tokenizer,
        "state_dict": {k: v.detach().cpu().contiguous() for k, v in state.items()},
    }
    return atomic_write(path, lambda f: torch.save(payload, f))


def load_float32(path: str | os.PathLike) -> tuple[CausalLM, dict]:
    """(model, tokenizer description). Raises UserError for anything but such a checkpoint."""
    try:
        if zipfile.is_zipfile(path):  # deflate makes gigabytes of kilobytes
            with zipfile.ZipFile(path) as z:
                if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()):
                    raise UserError(f"{path} is compressed, which no checkpoint of this project is")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except UserError:
        raise
    except Exception as e:  # torch raises many types for damaged or hostile files
        raise UserError(f"{path} is damaged, or not a checkpoint of this project") from e
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    if payload.get("version") != VERSION:
        raise UserError(f"{path}: version {payload.get('version')!r}, expected {VERSION}")
    state, tokenizer = payload.get("state_dict"), payload.get("tokenizer")
    if not isinstance(state, dict) or not isinstance(tokenizer, dict):
        raise UserError(f"{path}: members missing")
    for name, v in state.items():
        if not isinstance(name, str) or not _is_plain(v):
            raise UserError(f"{path}: state_dict holds something that is not a plain tensor")
    # Tensors may share memory, of tied weights two do.
    if sum(v.nbytes for v in state.values()) > 2 * os.path.getsize(path):
        raise UserError(f"{path}: its tensors are larger than the file")
    config = read_config(payload.get("config"), str(path))
    return build_model(config, state, str(path)), tokenizer


def _is_plain(value: object) -> bool:
    """A dense floating-point tensor that owns all its elements."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.is_contiguous()
    )
