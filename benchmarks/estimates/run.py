"""Whole conversions of well-known shapes with random weights, what they took beside what was
estimated: python benchmarks/estimates/run.py [SHAPE ...]

Two steps each, all else as the defaults have it. Appends a line a run to runs.jsonl beside this
file. Needs the extras hf, gguf and smollm2 (whose tokenizer is used).
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from measure import SHAPES, configuration  # noqa: E402

from lowbit.models.teacher import load_teacher  # noqa: E402
from studies.bench import RunLog  # noqa: E402
from studies.commands import measured  # noqa: E402

COMMAND = "distillation.py --hybrid --ternary --qat --epochs 1 --samples_per_epoch 8 --export gguf"


def make(shape: str, folder: Path) -> None:
    """A Hugging Face folder of this shape: random weights, SmolLM2's tokenizer."""
    torch.manual_seed(0)
    values = configuration(*SHAPES[shape])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    for name, text in load_teacher("smollm2")[1].describe()["files"].items():
        (folder / name).write_text(text, "utf-8")


def main() -> None:
    log = RunLog(HERE / "runs.jsonl")
    for shape in sys.argv[1:] or ["Qwen2.5-0.5B"]:
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where, shape)
            make(shape, folder)
            run = measured([*COMMAND.split(), "--teacher", str(folder)])
        for key in ("command", "printed"):
            run[key] = run[key].replace(f"{where}/", "")
        found = re.search(r"(\d+\.\d+) GiB", run["printed"])
        run |= {"shape": shape, "estimated_gib": float(found[1]) if found else None}
        run["peak_gib"] = run["peak_rss_bytes"] / 2**30
        log.append(run)
        print(shape, run["estimated_gib"], run["peak_gib"], f"{run['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
