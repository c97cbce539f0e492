"""What a conversion of models of well-known shapes will ask for, by the program's own estimate:
python benchmarks/estimates/measure.py

Shapes only, no weights. Rewrites summary.json beside this file. Needs the extra hf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.models.transformers_lm import from_config  # noqa: E402
from lowbit.options import TARGET_BITS  # noqa: E402
from lowbit.quantization.layers import NOMINAL  # noqa: E402
from lowbit.quantization.precision import share_of_high  # noqa: E402
from lowbit.training.estimate import (  # noqa: E402
    GIB,
    memory_needed,
    trained_weights,
    weights,
)
from studies.bench import machine  # noqa: E402
from studies.shapes import SHAPES, config  # noqa: E402

PASS = 1024  # tokens, the default on a CPU


def main() -> None:
    table = []
    for name in SHAPES:
        with torch.device("meta"):
            model = from_config(config(name))
        high = share_of_high(NOMINAL["ternary"], 4, TARGET_BITS["ternary"])
        trained = trained_weights(model, 1 - high)
        gib = {
            recomputes: memory_needed(model, PASS, trained=trained, recomputes=recomputes, held=2)
            / GIB
            for recomputes in (False, True)
        }
        row = {"shape": name, "weights": weights(model), "gib": gib[False]}
        table.append({**row, "gib_activation_checkpointing": gib[True]})
        print(table[-1])
    (HERE / "summary.json").write_text(json.dumps({"shapes": table, **machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
