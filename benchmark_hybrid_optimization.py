"""Compare optimisers on the distillation task: a quick look, or the full studies.

    python benchmark_hybrid_optimization.py
    python benchmark_hybrid_optimization.py --study convergence --tasks conversion

Every run is appended to ``runs.jsonl`` in the study's folder as it ends, keyed by its settings: a
study that was interrupted goes on where it stopped, and more seeds, tasks or methods grow it.

The quick look trains each method for the same steps. "Steps to Converge" is there the first
validated step at which a run's loss reached the target: what the first method in the table of
which no run diverged ended at (its mean over seeds), unless --target gives another; a student
whose quantisation still warms up is validated as it would be stored, which counts against it. The
convergence study is stricter: steps to the target are the smallest horizon, with the schedule
ending there, whose mean over seeds reaches what the tuned baseline ends at. "Final Loss" is
measured on EVALUATION_WINDOWS held-out windows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lowbit  # noqa: F401  (before PyTorch: how long threads that wait stay awake)

# isort: split
import numpy as np
import torch
import torch.nn as nn

import distillation
from lowbit import RunFailed, UserError
from lowbit.arguments import Parser
from lowbit.console import complain, hushed
from lowbit.files.atomic import atomic_write, prepare_folder
from lowbit.options import (
    STEPS_PER_EPOCH,
    parse_options,
    settle_by_start,
    settle_by_teacher,
)
from lowbit.text.sampler import StratifiedSampler
from lowbit.text.tokenizers import ByteTokenizer
from lowbit.training import validation
from lowbit.training.baselines import Baseline
from lowbit.training.step import Setup, make_manager
from studies.bench import TIMED_PAIRS, Bench
from studies.definitions import STUDIES
from studies.tables import (
    format_quantization,
    format_table,
    made_of,
    plot,
    plot_study,
    print_summary,
    quantization_rows,
    study_readme,
    summarise,
    write_csv,
    write_json,
)
from studies.tasks import METHODS, PAIR, QUICK, SPOILED, TASKS

EVALUATION_WINDOWS = 512
SPOILED_EVERY, SPOILED_TIMES = 40, 30.0  # of the study `faults`
QUICK_LOOK = """Final loss, first step at the target and seconds of each method after the same steps
at its default rate, and the quantisation error of two of them."""

# ------------------------------------------------------------------------------------- one run


def at_once(share: float) -> float:
    """The turn of a run that is alone: no waiting."""
    return 0.0


_references: dict[Any, validation.Reference] = {}


def teacher_on(setup: Setup, windows: np.ndarray) -> validation.Reference:
    """The teacher on the held-out windows, kept from one run to the next: it is the same, and no
    part of a run."""
    key = (setup.corpus.fingerprint, setup.options.teacher, windows.shape, setup.device)
    if key not in _references:
        _references.clear()
        _references[key] = validation.Reference(setup.teacher, windows, setup.device, setup.dtype)
    return _references[key]


def spoil_gradients(model: nn.Module) -> None:
    """From now on every SPOILED_EVERY-th gradient of a parameter is noise, SPOILED_TIMES as long,
    the same for every method and seed."""

    def spoil(number: int, steps: Iterator[int], p: torch.Tensor) -> None:
        step = next(steps)
        if step % SPOILED_EVERY == 0 and p.grad is not None:
            generator = torch.Generator().manual_seed(step * 1000 + number)
            noise = torch.randn(p.shape, generator=generator).to(p.grad)
            p.grad.copy_(noise * (SPOILED_TIMES * p.grad.norm() / noise.norm()))

    for number, p in enumerate(model.parameters()):
        p.register_post_accumulate_grad_hook(partial(spoil, number, itertools.count(1)))


@hushed()  # many runs have a bar together
def run_once(
    method: str,
    flags: Sequence[str],
    common: Sequence[str],
    seed: int,
    *,
    turn: Callable[[float], float] = at_once,
) -> dict[str, Any]:
    """One training run, all overheads (calibration, clustering, network) inside ``seconds``.

    A run that diverges has final_loss inf. turn is called after every epoch with the share of the
    run that is done; the seconds that it waits, which it returns, are not the run's.
    """
    flags = [f for f in flags if f != "--cluster_batches"]
    if "--digits" in common:
        return run_digits(flags, common, seed, turn)
    waited = 0.0

    def after_epoch(share: float) -> None:
        nonlocal waited
        waited += turn(share)

    stdlib = sysconfig.get_paths()["stdlib"]
    words = [x.replace("{stdlib}", stdlib) for x in (*common, *flags) if x != SPOILED]
    started = time.perf_counter()
    setup = distillation.set_up(parse_options([*words, "--seed", str(seed)]))
    if SPOILED in common:
        spoil_gradients(setup.student)
    result: dict[str, Any] = {"lr": setup.lr, "steps": setup.max_steps}
    result["text"] = setup.corpus.fingerprint
    try:
        rows, _ = distillation.train(
            setup,
            lambda line: None,
            cluster_batches="--cluster_batches" in METHODS[method],
            bar=False,
            after_epoch=after_epoch,
        )
    except RunFailed:
        return {**result, "final_loss": math.inf, "final_kl": math.inf, "curve": []}
    seconds = time.perf_counter() - started - waited
    column = "val_loss_quantized" if setup.options.qat else "val_loss"
    windows = setup.corpus.held_out(EVALUATION_WINDOWS)
    reference = teacher_on(setup, windows)
    final = reference.validate(setup.student)
    finite = math.isfinite(final.loss)
    return {
        **result,
        "final_loss": final.loss if finite else math.inf,
        "final_kl": final.kl if finite else math.inf,
        "teacher_loss": reference.teacher_loss,
        "windows": len(windows),
        "curve": [(row["step"], row[column]) for row in rows if column in row],
        "activation": float(np.mean([row.get("activation_rate", 0.0) for row in rows])),
        "seconds": seconds,
        "step_seconds": float(np.median([row["median_step_seconds"] for row in rows])),
    }


def run_digits(
    flags: Sequence[str], common: Sequence[str], seed: int, turn: Callable[[float], float]
) -> dict[str, Any]:
    """Not a language model: scikit-learn's digits, a three-layer perceptron, batches of 32.
    final_loss is the cross-entropy on 360 held-out images."""
    from sklearn.datasets import load_digits

    o = parse_options([*(f for f in (*common, *flags) if f != "--digits"), "--seed", str(seed)])
    o.student_init = "random"
    settle_by_teacher(o, "bytes")
    settle_by_start(o)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.tensor(x[order] / 16, dtype=torch.float32)
    labels = torch.tensor(y[order])
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )
    steps = STEPS_PER_EPOCH * o.epochs
    setup: Any = SimpleNamespace(
        options=o,
        lr=o.lr,
        max_steps=steps,
        steps_per_epoch=STEPS_PER_EPOCH,
        tokenizer=ByteTokenizer(),  # not that there is text: defaults are those of bytes
    )
    started, waited = time.perf_counter(), 0.0
    manager = make_manager(setup) if o.hybrid else None
    baseline = None if manager else Baseline(o, model, steps)
    clusters = np.zeros(len(images) - 360, int)
    if manager and o.use_clustering:
        clusters = manager.setup_data_clustering(images[360:])
    sampler = StratifiedSampler(clusters, 32, seed)
    for t in range(steps):
        picked = 360 + torch.from_numpy(sampler.next_batch())
        loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
        model.zero_grad()
        loss.backward()
        if manager:
            manager.optimization_step(model, loss, None, cluster_id=-1, step=t)
        if baseline:
            baseline.step(t)
        if (t + 1) % STEPS_PER_EPOCH == 0:
            waited += turn((t + 1) / steps)
    seconds = time.perf_counter() - started - waited
    if baseline:
        baseline.use_averaged()
    with torch.no_grad():
        final = float(nn.functional.cross_entropy(model(images[:360]), labels[:360]))
    final = final if math.isfinite(final) else math.inf
    return {
        "lr": o.lr, "steps": steps, "final_loss": final, "final_kl": final, "curve": [],
        "seconds": seconds, "step_seconds": seconds / steps,
    }  # fmt: skip


# ---------------------------------------------------------------------------------- quick look


def finish(written: list[Path], picture: Path, draw: Callable[[], None]) -> None:
    """Draw the picture where matplotlib is there, and say which files were written."""
    try:
        draw()
        written.append(picture)
    except ImportError:
        print("No picture: pip install matplotlib")
    for path in written:
        print(f"Wrote {path}")


def write_readme(name: str, about: str, folder: Path, bench: Bench, command: Sequence[str]) -> Path:
    """Where the numbers of a folder come from. command: what followed the script's name."""
    readme = folder / "README.md"
    text = study_readme(
        name,
        about,
        shlex.join(["python", "benchmark_hybrid_optimization.py", *command]),
        list(bench.used.values()),
        len(bench.log.runs),
        readme.read_text("utf-8") if readme.exists() else "",
    )
    return atomic_write(readme, lambda f: f.write(text.encode()))


def quick_look(o: argparse.Namespace, folder: Path, command: Sequence[str]) -> None:
    """The classical table, and the quantisation-error table where both kinds of run are there."""
    bench = Bench(folder, o.jobs, o.device, run_once, METHODS)
    methods = o.methods or QUICK
    steps = o.epochs * STEPS_PER_EPOCH
    keys = [bench.key(m, o.task, steps, s) for s in range(o.seeds) for m in methods]
    paired = [m for m in PAIR if m in methods]
    words = o.task.split()
    full_keys = []
    if len(paired) == 2 and "--qat" in words:
        task = " ".join("--calibrate=false" if w == "--qat" else w for w in words)
        full_keys = [bench.key(m, task, steps, s) for s in range(o.seeds) for m in paired]
    try:
        runs, full = bench.run(keys), bench.run(full_keys)
    finally:
        bench.close()
    summary = {"task": keys[0]["task"], **made_of(runs), **summarise(runs, o.target)}
    print("\n".join(format_table(summary)))
    if full:
        rows = summary["quantization"] = quantization_rows(
            [r for r in runs if r["method"] in paired], full
        )
        print("\n" + "\n".join(format_quantization(rows)))
    written = [
        bench.log.path,
        write_json(folder / "summary.json", summary),
        write_csv(folder / "summary.csv", summary["table"]),
        write_readme("quick look", QUICK_LOOK, folder, bench, command),
    ]
    picture = folder / "summary.png"
    finish(written, picture, lambda: plot(picture, runs, summary["target"]))


# ---------------------------------------------------------------------------------- command line

#: Studies of what `run_digits` does without: other batches, quantisation, clusters, noise.
LANGUAGE_ONLY = ("quantization", "batch-size", "ablation", "faults")


def run_study(name: str, o: argparse.Namespace, folder: Path, command: Sequence[str]) -> None:
    function, seeds, tasks, methods = STUDIES[name]
    for task in o.tasks or tasks:
        if name in LANGUAGE_ONLY and "--digits" in TASKS[task].flags.split():
            raise UserError(f"--tasks {task}: the study {name} needs a language model")
    bench = Bench(folder, o.jobs, o.device, run_once, METHODS, o.timed_pairs, o.from_log)
    seeds = o.seeds if o.seeds is not None else seeds
    try:
        found = function(bench, seeds, o.tasks or tasks, o.methods or methods)
    finally:
        bench.close()
    used = list(bench.used.values())
    print(name)
    print_summary(found)
    written = [
        bench.log.path,
        write_json(folder / "summary.json", {"study": name, **made_of(used), **found}),
    ]
    written.append(write_readme(name, function.__doc__, folder, bench, command))
    picture = folder / "summary.png"
    finish(written, picture, lambda: plot_study(picture, name, found["tasks"]))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--study", choices=[*STUDIES, "all"], help="a full study (default: the quick look)"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs a method (default 3; a study has its own default)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        help=f"among: {', '.join(METHODS)} (default of the quick look: {', '.join(QUICK)}; studies "
        "have their own, to which quantization, overhead and ablation keep)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        metavar="NAME",
        help="of a study (default: its own)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument(
        "--timed_pairs",
        type=int,
        default=TIMED_PAIRS,
        help="of the convergence study: pairs of runs, one at a time, whose seconds are compared "
        f"(default {TIMED_PAIRS}; 0: none)",
    )
    parser.add_argument(
        "--from_log",
        action="store_true",
        help="of a study: do no runs, summarise those that are there (from another machine, say)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--output_dir", default="benchmark", help="folder (default benchmark/)")
    g = parser.add_argument_group("quick look")
    g.add_argument("--epochs", type=int, default=5, help="epochs of 16 steps a run (default 5)")
    g.add_argument("--target", type=float, help="validation loss that counts as converged")
    g.add_argument(
        "--task",
        default="--ternary --qat --student_size small",
        help='distillation.py flags of every run (default "%(default)s")',
    )
    o = parser.parse_args(argv)
    try:
        for name in ("seeds", "epochs", "jobs"):
            if (value := getattr(o, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1")
        if o.timed_pairs < 0:
            raise UserError("--timed_pairs must be at least 0")
        if o.study:
            for name in STUDIES if o.study == "all" else [o.study]:
                run_study(name, o, prepare_folder(Path(o.output_dir) / name), argv)
        else:
            if o.from_log:
                raise UserError("--from_log goes with --study")
            o.seeds = o.seeds or 3
            parse_options(o.task.split())
            quick_look(o, prepare_folder(o.output_dir), argv)
    except UserError as e:
        return e.tell()
    except KeyboardInterrupt:
        complain("interrupted; finished runs are kept and the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
