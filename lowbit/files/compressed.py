"""A student as a folder of codes and scales that transformers loads with `compressed-tensors`.

    pack-quantized    linear layers: codes plus 2^(bits - 1) in int32 words, the first in the
                      lowest bits, each row from a new word; 2 bits for ternary and 1-bit codes, 8
                      or 4 for what is held so
    naive-quantized   the embedding and a head that is tied to it: int8 codes (transformers 5.24
                      loads no packed embedding)

Scales are bfloat16, one a row or, of 4-bit codes, one for 32. Everything else is float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.extras import require
from lowbit.files.gguf_file import Exported
from lowbit.files.packed import Packed, Stored
from lowbit.models.transformers_lm import TransformersLM, whole_folder
from lowbit.quantization.layers import BLOCK

BITS = {"ternary": 2, "1bit": 2, "int8": 8, "int4": 4}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- compressed-tensors
- distillation
- quantization-aware-training
---

# A low-bit student

Codes and scales as they were trained, in the formats of compressed-tensors, which has to be
installed. At the first forward pass the weights become float32; the logits are those of the
student in float32.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (O, I) in -2^(bits - 1)..2^(bits - 1) - 1 -> int32 (O, ceil(I bits / 32)), for bits
    that divide 32."""
    each = 32 // bits
    digits = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    digits = np.pad(digits, ((0, 0), (0, -digits.shape[1] % each)))
    digits = digits.reshape(len(digits), -1, each) << (np.arange(each, dtype=np.uint32) * bits)
    return np.bitwise_or.reduce(digits, axis=-1).astype(np.uint32).view(np.int32)


def scheme(kind: str, packed: bool, modules: list[str]) -> dict[str, Any]:
    """What these layers hold, as the library says it."""
    blocks = kind == "int4"
    return {
        "targets": modules,
        "format": "pack-quantized" if packed else "naive-quantized",
        "weights": {
            "num_bits": BITS[kind],
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group" if blocks else "channel",
            "group_size": BLOCK if blocks else None,
        },
    }


class _Folder:
    """tensors of model.safetensors; quantization: of config.json; parts: as in `Exported`."""

    def __init__(self, found: Packed, model: TransformersLM) -> None:
        names = {id(m): name for name, m in model.net.named_modules()}
        self.embedding = names[id(model.embedding)]
        tied = model.net.get_output_embeddings() if model.output is None else None
        self.head = names.get(id(tied))
        self.buffers = dict(model.embedding.named_buffers(recurse=False))
        self.tensors: dict[str, torch.Tensor] = {}
        self.parts: dict[str, tuple[int, int, int]] = {}
        self.groups: dict[tuple[str, bool], list[str]] = {}
        for name, stored in found.tensors.items():
            if stored.scale is None:
                added, label = {name: torch.from_numpy(stored.values.copy())}, "F32"
            else:
                added, label = self._coded(name.removesuffix(".weight"), stored)
            self.tensors.update(added)
            tensors, weights, size = self.parts.get(label, (0, 0, 0))
            size += sum(t.nbytes for t in added.values())
            self.parts[label] = (tensors + 1, weights + stored.values.size, size)

    def _coded(self, module: str, stored: Stored) -> tuple[dict[str, torch.Tensor], str]:
        """A layer's tensors, and the label of what they hold."""
        assert stored.scale is not None
        rows = len(stored.values)
        scale = torch.from_numpy(stored.scale).to(torch.bfloat16).expand(rows, -1).contiguous()
        added = {f"{module}.weight_scale": scale}
        packed = module != self.embedding
        modules = [module]
        if packed:
            bits = BITS[stored.kind]
            added[f"{module}.weight_packed"] = torch.from_numpy(pack_words(stored.values, bits))
            added[f"{module}.weight_shape"] = torch.tensor(stored.values.shape)
        else:
            bits = 8
            added[f"{module}.weight"] = torch.from_numpy(stored.values.copy())
            # The library makes parameters of a compressed layer's buffers.
            added |= {f"{module}.{name}": value.clone() for name, value in self.buffers.items()}
            if self.head is not None:
                modules.append(self.head)
                added[f"{self.head}.weight_scale"] = scale.clone()
        self.groups.setdefault((stored.kind, packed), []).extend(modules)
        return added, f"int{bits}"

    @property
    def quantization(self) -> dict[str, Any]:
        groups = {
            kind if packed else f"{kind}_embedding": scheme(kind, packed, modules)
            for (kind, packed), modules in self.groups.items()
        }
        formats = {g["format"] for g in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": [],
        }


def export_compressed(found: Packed, model: TransformersLM, folder: Path) -> Exported:
    """Write a packed student, and the model made of it, as such a folder. OSError where it cannot
    be written."""
    safetensors = require("safetensors.torch", "hf")
    made = _Folder(found, model)
    config = copy.deepcopy(model.net.config)
    config.dtype = "float32"
    config.architectures = [type(model.net).__name__]
    config.quantization_config = made.quantization
    with whole_folder(folder, found.tokenizer["files"]) as part:
        safetensors.save_file(made.tensors, part / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(part)
        model.net.generation_config.save_pretrained(part)
        (part / "README.md").write_text(CARD, "utf-8")
    path = folder / "model.safetensors"
    return Exported(path, "INT2", made.parts, "codes as they are", path.stat().st_size)
