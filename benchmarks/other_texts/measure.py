"""What a student that was trained on one kind of text loses on others:
python benchmarks/other_texts/measure.py STUDENT.npz [...]

Loss and KL to the teacher, SmolLM2, on windows of three kinds of text. Appends one JSON line a
student to runs.jsonl beside this file and rewrites summary.json. Needs the extra gguf.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import sklearn
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from lowbit.models.teacher import load_teacher  # noqa: E402
from lowbit.text.corpus import load_corpus  # noqa: E402
from lowbit.text.self_written import written_by  # noqa: E402
from lowbit.training.preparation import choose_dtype  # noqa: E402
from lowbit.training.validation import Reference  # noqa: E402
from studies.bench import RunLog, machine  # noqa: E402
from studies.held_out import spread, validated  # noqa: E402

WINDOWS, LENGTH = 32, 256
CHAT_TOKENS, CHAT_SEED = 24_000, 1  # students that train on such chats do so with seed 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--names", nargs="+", required=True, help="how each was made")
    o = parser.parse_args()
    device = torch.device("cpu")
    teacher, tokenizer = load_teacher("smollm2")[:2]
    dtype = choose_dtype(device, teacher)
    chats = written_by(teacher, tokenizer, CHAT_TOKENS, seed=CHAT_SEED, dtype=dtype)

    texts = {
        "documentation of the standard library, held out": load_corpus(
            [], LENGTH, tokenizer
        ).held_out(WINDOWS),
        "source code of scikit-learn": spread(
            Path(sklearn.__file__).parent, tokenizer, WINDOWS, LENGTH
        ),
        f"chats that the teacher wrote, seed {CHAT_SEED}": spread(
            chats, tokenizer, WINDOWS, LENGTH
        ),
    }
    references = {n: Reference(teacher, w, device, dtype) for n, w in texts.items()}
    log = RunLog(HERE / "runs.jsonl")
    for name, path in zip(o.names, o.students, strict=True):
        rows = validated(references, load_teacher(str(path))[0])
        print(name, rows, flush=True)
        log.append(
            {"student": name, "scikit-learn": sklearn.__version__, "texts": rows, **machine()}
        )
    (HERE / "summary.json").write_text(
        json.dumps({"students": log.runs, **machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
