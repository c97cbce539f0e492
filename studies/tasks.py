"""What the studies compare: tasks, and the methods that do them."""

from __future__ import annotations

from dataclasses import dataclass, replace

RUN = 320  # steps of the default run, where a study needs one length
SPOILED = "--spoiled_gradients"  # a task's flag, of `benchmark_hybrid_optimization.run_once`

#: Method -> its flags. --cluster_batches is ours alone: batches balanced over clusters.
METHODS: dict[str, list[str]] = {
    "Baseline SGD": ["--optimizer", "sgd", "--lr_schedule", "constant"],
    "SGD + LR schedule": ["--optimizer", "sgd"],
    "SGD + clustering": ["--optimizer", "sgd", "--cluster_batches"],
    "AdamW": ["--optimizer", "adamw"],
    "AdamW + clustering": ["--optimizer", "adamw", "--cluster_batches"],
    "AdamW + calibration": ["--optimizer", "adamw", "--calibrate"],
    "AdamW + quantization warm-up": ["--optimizer", "adamw", "--quant_warmup", "0.8"],
    "AdamW + gradient clipping": ["--optimizer", "adamw", "--max_grad_norm", "1"],
    "Muon": ["--optimizer", "muon"],
    "Muon + quantization warm-up": ["--optimizer", "muon", "--quant_warmup", "0.8"],
    "Schedule-Free AdamW": ["--optimizer", "schedulefree"],
    "Prodigy": ["--optimizer", "prodigy"],
    "Full hybrid": ["--hybrid"],
    "Hybrid - auxiliary network": ["--hybrid", "--use_auxiliary_nn=false"],
    "Hybrid - trust region": ["--hybrid", "--use_trust_region=false"],
    "Hybrid - data clustering": ["--hybrid", "--use_clustering=false"],
    "Hybrid - parameter clustering": ["--hybrid", "--param_clusters", "1"],
    "Hybrid - matrix geometry": ["--hybrid", "--use_matrix_geometry=false"],
    "Hybrid - calibration": ["--hybrid", "--calibrate=false"],
    "Hybrid - quantization warm-up": ["--hybrid", "--quant_warmup", "0"],
}
PAIR = ("AdamW", "Full hybrid")
QUICK = ["Baseline SGD", "SGD + LR schedule", "SGD + clustering", "AdamW", "Full hybrid"]


@dataclass(frozen=True)
class Task:
    """flags: of distillation.py. steps: the baseline's horizon. rates: where tuning starts.
    expected: where the search for the hybrid's horizon starts, a share of the baseline's."""

    flags: str
    steps: int
    rates: dict[str, float]
    expected: float = 0.5


FROM_SCRATCH = {"AdamW": 4e-3, "Muon": 1e-2, "Schedule-Free AdamW": 4e-3, "Prodigy": 1.0}
TERNARY = FROM_SCRATCH | {f"{m} + quantization warm-up": FROM_SCRATCH[m] for m in ("AdamW", "Muon")}
#: {stdlib} stands for the folder of the standard library's source code.
SOURCE_CODE = " ".join(
    "{stdlib}/" + name for name in ("asyncio", "email", "http", "importlib", "json", "unittest")
)
TASKS: dict[str, Task] = {
    "conversion": Task(
        "--ternary --qat --student_init teacher",
        400,
        {
            "AdamW": 1e-3,
            "AdamW + calibration": 1e-3,
            "Muon": 2e-3,
            "Schedule-Free AdamW": 1e-3,
            "Prodigy": 1.0,
        },
        expected=0.6,
    ),
    "scratch": Task("--ternary --qat --student_init random", 800, TERNARY),
    "scratch_small": Task(
        "--ternary --qat --student_init random --student_size small", 800, TERNARY
    ),
    "full_precision": Task("--ternary --calibrate=false --student_init random", 800, FROM_SCRATCH),
    "heldout": Task(f"--ternary --qat --student_init random --data {SOURCE_CODE}", 800, TERNARY),
    "digits": Task("--digits", 192, FROM_SCRATCH, expected=1.0),
}
#: Optimisers that are given fewer steps, a share of the task's: they reach AdamW's loss earlier.
SHORTER = {"muon": 0.5}


def optimizer_of(baseline: str) -> str:
    """What its method gives to --optimizer."""
    return METHODS[baseline][METHODS[baseline].index("--optimizer") + 1]


def given(task: Task, baseline: str) -> Task:
    """The task as this baseline runs it."""
    return replace(task, steps=round(task.steps * SHORTER.get(optimizer_of(baseline), 1.0)))
