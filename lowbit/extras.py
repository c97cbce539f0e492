"""Packages that only some runs need: the extras of pyproject.toml."""

from __future__ import annotations

import importlib
from typing import Any

from lowbit import UserError

#: What each extra installs.
EXTRAS = {
    "plot": "matplotlib",
    "hf": "transformers tokenizers safetensors",
    "gguf": "transformers tokenizers safetensors gguf accelerate",
    "compressed": "transformers tokenizers safetensors compressed-tensors",
    "parquet": "pyarrow",
    "chat": "xllamacpp",
    "bench": "matplotlib schedulefree prodigyopt",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}


def require(package: str, extra: str) -> Any:
    """Import an optional package, or say in one line what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UserError(
            f"this needs the package {package.partition('.')[0]}, of the extra {extra}: "
            f"pip install {EXTRAS[extra]}"
        ) from e
