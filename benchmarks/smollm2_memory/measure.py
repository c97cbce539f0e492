"""Peak memory of a training step of SmolLM2: as a run takes it, in one pass, and logits held whole:
python benchmarks/smollm2_memory/measure.py [--batch_size 8] [--seq_len 256]

Each case is a fresh process: teacher, student, three steps of AdamW. "run" is what distillation.py
does by default: passes of 1,024 tokens, the teacher's linear layers held in bfloat16, logits in
chunks. "chunks" has the chunks alone, "whole" nothing. Rewrites runs.jsonl and summary.json beside
this file.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402

from lowbit.models.teacher import load_teacher  # noqa: E402
from lowbit.models.transformers_lm import TransformersLM, clone, hold_linears  # noqa: E402
from lowbit.quantization.layers import quantize_model, rounded_once  # noqa: E402
from lowbit.training import losses  # noqa: E402
from studies.bench import machine  # noqa: E402

CASES = {"run": losses.LOGITS_AT_ONCE, "chunks": losses.LOGITS_AT_ONCE, "whole": 1 << 40}
PASS = 1024  # tokens


def one(case: str, batch_size: int, seq_len: int) -> None:
    losses.LOGITS_AT_ONCE = CASES[case]
    torch.set_num_threads(2)
    teacher, _ = load_teacher("smollm2")
    assert isinstance(teacher, TransformersLM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    student = quantize_model(clone(teacher), "ternary")
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5)
    if case == "run":
        hold_linears(teacher, torch.bfloat16)
    windows = max(1, PASS // seq_len) if case == "run" else batch_size
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(teacher.vocab_size, (batch_size, seq_len + 1), generator=generator)
        student.zero_grad()
        with rounded_once(student) if case == "run" else nullcontext():
            for part in ids.split(windows):
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        target = teacher.features(part[:, :-1])
                    found = student.features(part[:, :-1])
                    objective = losses.distillation_objective(
                        student, teacher, found.final, target.final, part[:, 1:], None, 0.5, 1.0
                    )[0]
                (objective * len(part) / len(ids)).backward()
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {"case": case, "batch_size": batch_size, "seq_len": seq_len}
    print(json.dumps({**record, "loaded_bytes": before * 1024, "peak_bytes": peak * 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    o = parser.parse_args()
    if o.case:
        return one(o.case, o.batch_size, o.seq_len)
    runs = []
    for case in CASES:
        words = ["--case", case, "--batch_size", str(o.batch_size), "--seq_len", str(o.seq_len)]
        process = subprocess.run(
            [sys.executable, __file__, *words], text=True, capture_output=True, check=True
        )
        runs.append({**json.loads(process.stdout.splitlines()[-1]), **machine()})
        print(runs[-1], flush=True)
    (HERE / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    peaks = {r["case"]: r["peak_bytes"] for r in runs}
    ratios = {f"{case}_over_whole": peaks[case] / peaks["whole"] for case in ("run", "chunks")}
    summary = {"peak_bytes": peaks, **ratios, **machine()}
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
