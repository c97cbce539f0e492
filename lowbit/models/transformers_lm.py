"""Decoders of the `transformers` library behind this project's interface.

Teacher and student are the library's own modules, so that a family's details (grouped heads,
biases, norms of queries and keys, sliding windows) are its authors' and not a second guess. What
has not been tried here is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lowbit import UserError, first_line
from lowbit.extras import require
from lowbit.files.atomic import allow_as_usual
from lowbit.models.interface import Features, LanguageModel, hooked, require_state

#: Families (``model_type``) whose conversion is tested.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi",
    "phi3",
)  # fmt: skip

#: Numbers of a model that no file holds, rotary frequencies among them, are fewer.
COMPUTED = 1 << 20


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


def load_tokenizer(folder: Any) -> Any:
    """The tokenizer of a model's folder. UserError where there is none."""
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except BaseException as e:  # the library raises many types, Rust's panic none of Exception's
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(
            f"--teacher: {folder} has no tokenizer that transformers can load; copy its "
            "tokenizer.json and tokenizer_config.json there"
        ) from e


class TransformersLM(LanguageModel):
    """A `transformers` causal language model."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        config = net.config.get_text_config()
        refuse_kind(config.model_type)
        self.net = net
        self.config = config
        self.vocab_size = net.get_input_embeddings().num_embeddings
        self.hidden_size = config.hidden_size
        self.max_positions = getattr(config, "max_position_embeddings", 1 << 17)
        head = net.get_output_embeddings()
        self._tied = head is None or head.weight is net.get_input_embeddings().weight
        self._cap = getattr(config, "final_logit_softcapping", None)
        # Its name since transformers 5.24.
        new = "cache" in inspect.signature(net.base_model.forward).parameters
        self._cache_name = "cache" if new else "past_key_values"

    @property
    def blocks(self) -> nn.ModuleList:
        found = [
            m
            for m in self.net.base_model.children()
            if isinstance(m, nn.ModuleList) and len(m) == self.config.num_hidden_layers
        ]
        if len(found) != 1:
            raise UserError(f"--teacher: {self.config.model_type}: its blocks were not found")
        return found[0]

    @property
    def stored(self) -> nn.Module:
        return self.net

    @property
    def embedding(self) -> nn.Embedding:
        return self.net.get_input_embeddings()

    @property
    def output(self) -> nn.Linear | None:
        return None if self._tied else self.net.get_output_embeddings()

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        logits = super().logits(x, weight, bias)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def describe(self) -> dict[str, Any]:
        return {"transformers": described(self.net.config)}

    def features(self, ids: torch.Tensor, cache: Any = None, *, keep: bool = False) -> Features:
        hidden: list[torch.Tensor] = []

        def note(block: nn.Module, args: tuple, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)

        extra = {self._cache_name: cache} if cache is not None else {}
        with hooked(b.register_forward_hook(note) for b in self.blocks):
            out = self.net.base_model(ids, use_cache=keep, **extra)
        return Features(out.last_hidden_state, hidden, getattr(out, self._cache_name, None))

    def rows_of(self, cache: Any, rows: torch.Tensor) -> Any:
        cache.batch_select_indices(rows)
        return cache


def described(config: Any) -> dict[str, Any]:
    """A configuration of the library with all its values."""
    return json.loads(config.to_json_string(use_diff=False))


def refuse_kind(kind: object) -> None:
    """UserError for a ``model_type`` that was not tried here."""
    if kind not in FAMILIES:
        raise UserError(
            f"--teacher: a model of type {kind!r} cannot be converted; tried are "
            f"{', '.join(FAMILIES)}"
        )


def refuse_layers(layers: object, tensors: int, origin: str) -> None:
    """UserError for more layers than there are tensors, which the library would build first."""
    if isinstance(layers, (int, float)) and layers > tensors:
        raise UserError(f"{origin}: {layers} layers, but only {tensors} tensors; it is damaged")


def refuse_weights(config: Any, held: int, origin: str) -> None:
    """UserError for a model of more weights than its files hold: the library would take memory for
    them all before it says so. Raises what the library does for a shape that cannot be."""
    auto = require("transformers", "hf").AutoModelForCausalLM
    with torch.device("meta"):
        net = auto.from_config(copy.deepcopy(config))
    needed = sum(x.numel() for x in (*net.parameters(), *net.buffers()))
    if needed > held + COMPUTED:
        raise UserError(
            f"{origin}: its shape has {needed:,} weights, its files {held:,}; it is damaged"
        )


def check_head(model: TransformersLM) -> None:
    """UserError where features and head do not add up to the library's own logits."""
    ids = torch.arange(4, device=model.embedding.weight.device)[None] % model.vocab_size
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), model.net(ids).logits.float()
    spread = theirs.std()  # not finite either where squares of logits are not
    if not torch.isfinite(spread):
        raise UserError(f"--teacher: {model.config.model_type}: its logits are not finite")
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(spread)):
        raise UserError(
            f"--teacher: {model.config.model_type}: its logits are more than its head's output; "
            "this model cannot be converted"
        )


def checked(model: TransformersLM, origin: str) -> TransformersLM:
    for name, p in model.net.named_parameters():
        if p.device.type == "meta" or not bool(torch.isfinite(p).all()):
            raise UserError(f"--teacher: {origin}: {name} is missing or not finite")
    check_head(model.eval())
    return model


def clone(model: TransformersLM, layers: list[int] | None = None) -> TransformersLM:
    """A trainable copy in float32, of some of its layers only where ``layers`` names them."""
    net = copy.deepcopy(model.net)
    if layers is not None:
        new = TransformersLM(net)
        kept = nn.ModuleList(new.blocks[i] for i in layers)
        for name, child in net.base_model.named_children():
            if child is new.blocks:
                setattr(net.base_model, name, kept)
                break
        for i, block in enumerate(kept):
            for m in block.modules():
                if hasattr(m, "layer_idx"):
                    m.__dict__["layer_idx"] = i
        config = net.config.get_text_config()
        config.num_hidden_layers = len(kept)
        for name in ("layer_types", "no_rope_layers"):  # a value a layer
            values = getattr(config, name, None)
            if values:
                setattr(config, name, [values[i] for i in layers])
    return TransformersLM(net.float().requires_grad_(True))


def hold_linears(model: TransformersLM, dtype: torch.dtype) -> None:
    """Hold the blocks' linear layers of a frozen model in the dtype in which autocast multiplies
    them: the same products, without a copy at every use."""
    for block in model.blocks:
        for m in block.modules():
            if type(m) is nn.Linear:
                m.to(dtype)


def from_config(values: dict[str, Any]) -> TransformersLM:
    """A model of this shape with weights yet to come. UserError for a shape that cannot be."""
    transformers = require("transformers", "hf")
    try:
        values = dict(values)
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        refuse_kind(config.get_text_config().model_type)
        config.dtype = "float32"
        return TransformersLM(transformers.AutoModelForCausalLM.from_config(config))
    except UserError:
        raise
    except Exception as e:  # the library raises many types
        raise UserError(
            f"not a model's configuration that transformers knows: {first_line(e)}"
        ) from e


def build_transformers(
    values: dict[str, Any], state: dict[str, torch.Tensor], origin: str
) -> TransformersLM:
    """A model from named float tensors, of tied ones the first; names and shapes must match.

    They are compared before memory for the model is taken, and are then the model's own.
    """
    if isinstance(values, dict):
        refuse_layers(values.get("num_hidden_layers"), len(state), origin)
    with torch.device("meta"):
        shape = from_config(values).net
    tied = set(shape.all_tied_weights_keys or ())
    expected = {k: v for k, v in shape.state_dict().items() if k in state or k not in tied}
    require_state(expected, state, origin)
    with without_weights():
        model = from_config(values)
    whole = {k: v.float() for k, v in state.items()}
    model.net.load_state_dict(whole, strict=False, assign=True)
    model.net.tie_weights()
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made with parameters that have a shape and no memory; buffers, which the
    library computes and no file holds, are made as usual."""
    register = nn.Module.register_parameter

    def shape_only(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:  # one that is tied stays the same
            p = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
        register(module, name, p)

    nn.Module.register_parameter = shape_only  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def whole_folder(folder: Path, texts: dict[str, str]) -> Iterator[Path]:
    """Beside this folder another in which to write files, which then, with these texts, move into
    it. OSError where that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        try:
            yield Path(name)
        except OSError:
            raise
        except Exception as e:  # what safetensors makes of a full disk
            raise OSError(None, first_line(e), str(folder)) from e
        for file, text in texts.items():
            Path(name, file).write_text(text, "utf-8")
        for path in sorted(Path(name).iterdir()):
            allow_as_usual(path)
            os.replace(path, folder / path.name)


def save_folder(folder: Path, model: TransformersLM, tokenizer_files: dict[str, str]) -> Path:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads: the weights as they are, in
    float32, and the tokenizer's files. Every file is written beside the folder first."""
    with whole_folder(folder, tokenizer_files) as part, redirect_stderr(io.StringIO()):  # a bar
        model.net.save_pretrained(part)
    return folder
