"""A conversion of a well-known shape with random weights, to compare its memory with the estimate:
python benchmarks/estimates/convert.py --shape Qwen2.5-0.5B [FLAGS]

Makes a Hugging Face folder of the shape, in bfloat16, with a tokenizer of 16,384 tokens made from
the standard library's documentation, converts it with the program's defaults in a fresh process,
and appends what that printed and took to runs.jsonl beside this file. FLAGS go to the conversion.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.models.transformers_lm import from_config  # noqa: E402
from lowbit.text.documents import cached_stdlib_documents  # noqa: E402
from lowbit.training.estimate import GIB  # noqa: E402
from studies.bench import RunLog  # noqa: E402
from studies.commands import measured  # noqa: E402
from studies.shapes import SHAPES, config  # noqa: E402

COMMAND = "distillation.py --hybrid --ternary --qat --save_metrics"


def make_teacher(shape: str, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    from_config(config(shape)).net.bfloat16().save_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (text for _, text in cached_stdlib_documents()),
        trainers.BpeTrainer(
            vocab_size=16384,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    o, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder, o.shape)
        make_teacher(o.shape, teacher)
        run = measured([*COMMAND.split(), *flags, "--teacher", str(teacher)])
        run = {k: v.replace(folder, "") if isinstance(v, str) else v for k, v in run.items()}
    RunLog(HERE / "runs.jsonl").append(run)
    print(run["printed"])
    print(f"{run['seconds'] / 60:.1f} min, {run['peak_rss_bytes'] / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
