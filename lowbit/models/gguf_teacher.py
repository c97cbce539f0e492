"""Teachers from GGUF files: `transformers` reads them, and what it leaves out is put in here.

It reads no scaling of rotary positions, and not of every file how text is cut before it is merged.
A file that says something else of its shape than was read is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit import UserError, first_line
from lowbit.extras import require
from lowbit.files.gguf_shape import (
    add_shape,
    attention_size,
    family_of,
    rope_factors,
)
from lowbit.models.interface import LanguageModel
from lowbit.models.transformers_lm import (
    TransformersLM,
    checked,
    described,
    quietly,
    refuse_kind,
    refuse_layers,
    refuse_weights,
)
from lowbit.text import pre_tokenizers
from lowbit.text.tokenizers import TeacherTokenizer, Tokenizer, opening_of

#: What a file says: of the model, and of its tokenizer.
SAID = {
    "architecture": "general.architecture",
    "opens": "tokenizer.ggml.add_bos_token",
    "tokenizer_model": "tokenizer.ggml.model",
    "pre": "tokenizer.ggml.pre",
    "space": "tokenizer.ggml.add_space_prefix",
}


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
        said = {
            name: None if (field := reader.get_field(key)) is None else field.contents()
            for name, key in SAID.items()
        }
        kind = said.pop("architecture")
        layers = [
            field.contents() for key, field in reader.fields.items() if key.endswith(".block_count")
        ]
        sizes = [int(t.n_elements) for t in reader.tensors]
        ends = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
    except Exception as e:
        why = first_line(e)
        what = "is damaged, cut off, or no GGUF"
        if "GGMLQuantizationType" in why:
            what = "is damaged, or holds a type of weights that the package gguf does not know"
        raise UserError(f"--teacher: {path} {what}: {why}") from e
    if not ends or ends > path.stat().st_size:
        raise UserError(f"--teacher: {path} is cut off: it ends before its tensors do")
    for count in layers:  # the library reads that of any architecture
        refuse_layers(count, len(sizes), f"--teacher: {path}")
    with quietly(), read_once(gguf, reader):
        try:
            config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            refuse_kind(config.model_type)
            experts = reader.get_field(f"{kind}.expert_count")
            if experts is not None and experts.contents():
                raise UserError(f"--teacher: {path}: a mixture of experts cannot be converted")
            scale_positions(config, reader, kind, f"--teacher: {path}")
            if hasattr(config, "query_pre_attn_scalar"):
                config.query_pre_attn_scalar = attention_size(described(config))
            compare_shapes(gguf, config, reader, f"--teacher: {path}")
            refuse_weights(config, sum(sizes), f"--teacher: {path}")
            net, found = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                gguf_file=path.name,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
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
        if missing := sorted(map(str, found["missing_keys"])):  # they would be random
            raise UserError(f"--teacher: {path}: {missing[0]} is missing")
        if str(kind).startswith("gemma") and said["space"] is None:
            said["space"] = False
        cut_as_said(wrapped, **said)
        # It is float now; that it once was quantised would keep it from being saved.
        net.config.__dict__.pop("quantization_config", None)
        net.hf_quantizer, net.is_quantized = None, False
        model = checked(TransformersLM(net), str(path))
        return model, TeacherTokenizer(wrapped, model.vocab_size)


def scale_positions(config: Any, reader: Any, kind: str | None, origin: str) -> None:
    """Into the configuration the scaling of rotary positions that a file says. UserError for one
    that is not known here."""

    def said(name: str) -> Any:
        field = reader.get_field(f"{kind}.rope.{name}")
        return None if field is None else field.contents()

    how, factor = said("scaling.type"), said("scaling.factor") or said("scale_linear") or 1.0
    factors = {t.name: np.asarray(t.data) for t in reader.tensors if t.name.startswith("rope_f")}
    if how in (None, "linear") and factor != 1.0:
        scaled: dict[str, Any] = {"rope_type": "linear", "factor": float(factor)}
    elif how not in (None, "none", "linear"):
        raise UserError(f"{origin}: rotary positions that are scaled by {how!r} cannot be read")
    else:
        scaled = {}
    rope = config.rope_parameters
    if (near := said("freq_base_swa")) and "sliding_attention" in rope:
        rope["sliding_attention"]["rope_theta"] = near
    rope = rope.get("full_attention", rope)
    if factors:
        scaled = {
            "rope_type": "llama3", "factor": float(max(f.max() for f in factors.values())),
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        values = described(config) | {"rope_parameters": {**rope, **scaled}}
        ours = rope_factors(values) if kind == "llama" else None
        theirs = factors.get("rope_freqs.weight")
        if ours is None or theirs is None or not np.allclose(ours, theirs, rtol=1e-4):
            raise UserError(
                f"{origin}: its rotary positions are divided by other factors than Llama 3's"
            )
    rope.update(scaled)


def compare_shapes(gguf: Any, config: Any, reader: Any, origin: str) -> None:
    """UserError where a file says another number than transformers read, or took for granted."""
    values = described(config)
    writer = gguf.GGUFWriter(None, family_of(values).architecture)
    add_shape(writer, gguf, values)
    for key, ours in writer.kv_data[0].items():
        field = reader.get_field(key)
        # Vocabularies are padded, and of some families windows end a context.
        if field is None or key.endswith((".vocab_size", ".context_length")):
            continue
        theirs, ours = field.contents(), ours.value
        numbers = isinstance(theirs, (int, float)) and isinstance(ours, (int, float))
        if not (math.isclose(theirs, ours, rel_tol=1e-5) if numbers else theirs == ours):
            raise UserError(
                f"{origin} says {key} = {theirs}, which transformers does not read: it takes {ours}"
            )


def cut_as_said(
    wrapped: Any,
    *,
    opens: bool | None,
    tokenizer_model: str | None,
    pre: str | None,
    space: bool | None,
) -> None:
    """Let a tokenizer open and cut text as a file says, or as llama.cpp takes for granted: whether
    a text begins with its token, "gpt2" or "llama" (SentencePiece's pieces), the name of the cuts,
    and whether a space is put before a text of pieces."""
    pre = pre_tokenizers.ALSO.get(str(pre), pre)
    if opens is None and pre == "llama-bpe":
        opens = True
    if opens not in (None, opening_of(wrapped) is not None) and wrapped.bos_token_id is not None:
        wrapped.add_bos_token = opens
    if not wrapped.is_fast:
        return
    backend = wrapped.backend_tokenizer
    if tokenizer_model == "llama":
        pre_tokenizers.cut_in_pieces(backend, space is not False)
    elif pre in pre_tokenizers.KNOWN:
        backend.pre_tokenizer = pre_tokenizers.make(pre)
        if pre in pre_tokenizers.WHOLE_WORDS:
            backend.model.ignore_merges = True
