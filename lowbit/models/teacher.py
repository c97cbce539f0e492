"""The teacher: the embedded one, or a checkpoint of this project.

The embedded teacher is made by ``python -m lowbit.models.train_teacher`` (see that file for the
recipe) and shipped as float16 in the packed format.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from lowbit import UserError
from lowbit.files.checkpoint import load_float32
from lowbit.files.packed import load_packed
from lowbit.models.decoder import CausalLM
from lowbit.text.tokenizers import ByteTokenizer


def embedded_teacher() -> Path:
    return Path(str(resources.files("lowbit") / "data" / "teacher.npz"))


def load_teacher(spec: str, tokenizer: ByteTokenizer) -> CausalLM:
    """'embedded', or the path of a .pth or .npz that this project wrote -> model in eval mode.

    Raises UserError where the file is unsound or its vocabulary is not the student's.
    """
    path = embedded_teacher() if spec == "embedded" else Path(spec)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long
        raise UserError(f"--teacher: no such file: {spec} (or use the default: embedded)")
    if path.suffix == ".npz":
        model, vocabulary, _ = load_packed(path)
    elif path.suffix == ".pth":
        model, vocabulary = load_float32(path)
    else:
        raise UserError(f"--teacher: {spec}: expected embedded, a .pth or a .npz file")
    want = tokenizer.describe()
    if vocabulary != want or model.config.vocab_size != want["vocab_size"]:
        raise UserError(
            f"--teacher: {spec} has vocabulary {vocabulary.get('name')!r} of "
            f"{model.config.vocab_size}; the student's is {want['name']!r} of {want['vocab_size']}"
        )
    return model.eval().requires_grad_(False)
