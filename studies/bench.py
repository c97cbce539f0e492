"""What a comparison of methods is made of: provenance, a log of runs, statistics.

Losses are arrays (seeds,) of one method at one horizon; seeds are paired across methods: the same
seed means the same initial weights and, among methods that draw batches alike, the same order of
the data (the hybrid's batches are balanced over clusters).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.special import stdtrit

from hybrid_optimization import native_bfloat16
from lowbit import UserError, __version__
from lowbit.console import progress_bar
from lowbit.options import STEPS_PER_EPOCH

RESAMPLES = 4000
TIMED_PAIRS = 3
START_METHOD = "spawn"  # of processes; a fork may use neither OpenMP nor CUDA again
T = TypeVar("T")


# -------------------------------------------------------------------------------- provenance


def machine() -> dict[str, Any]:
    """What a reader needs to place the numbers."""

    def git(*words: str) -> str:
        root = Path(__file__).parent.parent
        try:
            return subprocess.run(
                ["git", *words], cwd=root, text=True, capture_output=True, check=False
            ).stdout.strip()
        except OSError:  # no git here
            return ""

    # An installed copy may lie in a folder of somebody else's repository.
    commit = (git("ls-files", "--", __file__) and git("describe", "--always")) or "unknown"
    # Documents, and what a study writes, don't make it another code.
    if git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "lowbit/data"):
        commit += "-dirty"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    # Processors of one name differ in what decides how fast a step is.
    cpu += f", {torch.backends.cpu.get_cpu_capability()}"
    if native_bfloat16(torch.device("cpu")):
        cpu += " with bfloat16"
    return {
        "commit": commit,
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class RunLog:
    """Finished runs, one JSON line each, found again by their settings: a study that was
    interrupted goes on where it stopped, and more seeds or horizons grow it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    self.runs.append(json.loads(line))
                except ValueError:  # the last line of a killed run
                    continue

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        def fits(r: Mapping[str, Any]) -> bool:
            same_kind = r.get("purpose") == key.get("purpose")  # a timed run is none of a result
            return same_kind and all(r.get(k) == v for k, v in key.items())

        return next(filter(fits, self.runs), None)

    def append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record) + "\n"
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            text = "\n" + text  # end a line that was cut short
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text)
        self.runs.append(record)


#: Method, the task's flags, further flags.
Setting = tuple[str, str, Sequence[str]]


class Bench:
    """Runs of a study: what is in the log is not run again.

    run_once(method, flags, task's flags, seed) -> what a run gave, with turn=f as in `alternate`
    where its time counts; methods: name -> flags. With jobs > 1 run_once must be a function of a
    module, to be called in other processes; timed_pairs: of runs that a study does for their
    seconds alone; from_log: no run is done, UserError names the first that is missing. `close`
    it in the end.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        device: str,
        run_once: Callable[..., dict[str, Any]],
        methods: Mapping[str, Sequence[str]],
        timed_pairs: int = TIMED_PAIRS,
        from_log: bool = False,
    ) -> None:
        self.folder, self.jobs, self.device = folder, jobs, device
        self.run_once, self.methods, self.timed_pairs = run_once, methods, timed_pairs
        self.from_log = from_log
        self.threads = max(1, torch.get_num_threads() // jobs)  # of a run, if it takes no turns
        self.log = RunLog(folder / "runs.jsonl")
        self.where = machine()
        # Not drawn before there is a run (a delay above 0): an error's line should come alone.
        self.bar = progress_bar(unit="run", delay=1e-3)
        self.used: dict[int, dict[str, Any]] = {}  # records that a result was made of
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[str, Future] = {}
        self._lock = threading.RLock()  # of everything above: parts of a study are threads

    def close(self) -> None:
        """No more runs: those that wait, or are not finished, are dropped, and who waits for one
        of them is told."""
        if self.bar.total:
            self.bar.clear()
        self.bar.close()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is None:
            return
        done = all(future.done() for future in self._running.values())
        if not done:
            # Not cancel_futures: who waits for a run that was cancelled would not be woken.
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
        pool.shutdown(wait=done)  # those that have nothing to do clean up behind them

    def key(
        self, method: str, task: str, steps: int, seed: int, extra: Sequence[str] = ()
    ) -> dict[str, Any]:
        flags = [*task.split(), "--device", self.device, "--epochs", str(steps // STEPS_PER_EPOCH)]
        words = [*self.methods[method], *extra]
        return {"method": method, "seed": seed, "task": flags, "flags": words}

    def run(self, keys: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of ``keys``, in their order."""
        keys = list(keys)
        with self._lock:
            missing = self.missing(keys)
            if missing and self.from_log:
                k = missing[0]
                raise UserError(
                    f"{self.log.path} has no run of {k['method']}, seed {k['seed']}, with "
                    f"{' '.join([*k['task'], *k['flags']])}; leave out --from_log"
                )
            if self.jobs > 1:
                running = {self._start(k): k for k in missing}
            else:
                self._expect(len(missing))
        if self.jobs > 1:
            for future in as_completed(running):
                self._keep(running[future], future.result(), self.threads)
        else:
            for k in missing:
                self.bar.set_description(f"{k['method']}, seed {k['seed']}")
                self._keep(k, self.run_once(*_arguments(k)), self.threads)
        with self._lock:
            found = [r for r in map(self.log.find, keys) if r is not None]
            self.used |= {id(r): r for r in found}
        return found

    def missing(self, keys: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of which the log has no run."""
        return [k for k in keys if self.log.find(k) is None]

    def has_run(self, method: str, task: str) -> bool:
        """Whether the log has any run of a method on a task."""
        words = task.split()  # before the device and the epochs, see `key`
        return any(r["method"] == method and r["task"][:-4] == words for r in self.log.runs)

    def together(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """What the parts of a study return. With several jobs they ask for their runs at the same
        time, so that no part's last run leaves the machine idle."""
        if self.jobs == 1 or len(parts) == 1:
            return [part() for part in parts]
        with ThreadPoolExecutor(len(parts)) as threads:
            running = [threads.submit(part) for part in parts]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                self.close()  # or the others would go on
                raise
        return [future.result() for future in running]

    def _start(self, key: dict[str, Any]) -> Future:
        """The run of this key in another process; a second caller gets the first one's."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._running:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self.jobs,
                    mp_context=multiprocessing.get_context(START_METHOD),
                    initializer=_begin,
                    initargs=(self.threads,),
                )
            self._expect(1)
            self._running[name] = self._pool.submit(self.run_once, *_arguments(key))
        return self._running[name]

    def _expect(self, runs: int) -> None:
        if not runs:
            return
        self.bar.total = (self.bar.total or 0) + runs
        self.bar.refresh()

    def _keep(self, key: dict[str, Any], result: dict[str, Any], threads: int) -> None:
        with self._lock:
            if self.missing([key]):
                self.log.append({**key, **result, **self.where, "threads": threads})
                self.bar.update()

    def losses(
        self, settings: Iterable[Setting], steps: int, seeds: int, column: str = "final_loss"
    ) -> np.ndarray:
        """A row for each setting, a column for each seed. All runs are asked for at once, so that
        --jobs fills the machine."""
        settings = list(settings)
        runs = self.run(
            self.key(method, task, steps, seed, extra)
            for method, task, extra in settings
            for seed in range(seeds)
        )
        return np.array([r[column] for r in runs]).reshape(len(settings), seeds)

    def take_turns(self, sides: Sequence[tuple[Setting, int]], pairs: int) -> list[list[dict]]:
        """For each side, a setting and its steps, a record a seed: runs whose times are compared.
        Those of a seed take turns an epoch long (`alternate`), whatever --jobs, so that a machine
        whose speed drifts is as fast for one as for the other. From the log: pairs that are there.
        """
        runs: list[list[dict]] = [[] for _ in sides]
        for seed in range(pairs):
            plain = [self.key(*side[:2], steps, seed, side[2]) for side, steps in sides]
            keys = [
                {
                    **key,
                    "purpose": "timing, turns an epoch long, a process each",
                    "beside": [[k["method"], k["task"], k["flags"]] for k in plain if k is not key],
                    # Times of two machines don't mix, but a log may be another machine's.
                    **({} if self.from_log else {"cpu": self.where["cpu"]}),
                }
                for key in plain
            ]
            missing = self.missing(keys)
            if missing and self.from_log:
                continue
            if missing:
                self._expect(len(keys))
                self.bar.set_description(f"in turns, seed {seed}")
                results = alternate([partial(self.run_once, *_arguments(k)) for k in keys])
                for k, result in zip(keys, results, strict=True):
                    self._keep(k, result, self.where["threads"])
            for side, record in zip(runs, self.run(keys), strict=True):
                side.append(record)
        return runs


def _follow_parent() -> None:
    """Called in a process of a study: it doesn't outlive one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _begin(threads: int) -> None:
    _follow_parent()
    torch.set_num_threads(threads)


def _arguments(key: Mapping[str, Any]) -> tuple[str, list[str], list[str], int]:
    return key["method"], key["flags"], key["task"], key["seed"]


def alternate(runs: Sequence[Callable[..., T]]) -> list[T]:
    """Call every run in a process of its own, one at a time.

    Each is called with turn=f. When it calls f(share of it that is done) it waits while another
    has done less; f returns the seconds that it waited. Returns what the runs returned; what one
    of them raised is raised. Not threads: two pools of OpenMP threads in one process make each
    other's barriers slow.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    pipes, processes = [], []
    for run in runs:
        pipe, end = context.Pipe()
        process = context.Process(target=_side, args=(run, end), daemon=True)
        process.start()
        end.close()
        pipes.append(pipe)
        processes.append(process)
    results: dict[int, T] = {}
    try:
        shares = {i: pipe.recv()[1] for i, pipe in enumerate(pipes)}  # once all have started
        while shares:
            mine = min(shares, key=lambda i: (shares[i], i))
            pipes[mine].send(None)
            kind, value = pipes[mine].recv()
            if kind == "turn":
                shares[mine] = value
            elif kind == "failed":
                raise value
            else:
                results[mine] = value
                del shares[mine]
    finally:
        for i, process in enumerate(processes):
            if i not in results:
                process.terminate()
            process.join()
    return [results[i] for i in range(len(runs))]


def _side(run: Callable[..., Any], pipe: Connection) -> None:
    """A process of `alternate`."""
    _follow_parent()

    def turn(share: float) -> float:
        started = time.perf_counter()
        pipe.send(("turn", share))
        pipe.recv()
        return time.perf_counter() - started

    turn(0.0)
    try:
        pipe.send(("done", run(turn=turn)))
    except Exception as e:
        pipe.send(("failed", e))


# -------------------------------------------------------------------------------- statistics


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % t-interval); nan half width for one value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5)


def resamples(n: int, seed: int = 0) -> np.ndarray:
    """Bootstrap draws of n seeds: indices (RESAMPLES, n), the same for every method (paired)."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def estimate(statistic: Callable[[np.ndarray], float], n: int) -> dict[str, Any]:
    """{"value", "ci95"}: a statistic of the seeds' indices, and its percentile bootstrap interval.

    A statistic may be infinite (a target that was not reached); the interval then is, too. Of one
    seed it is nan.
    """
    low = high = math.nan
    if n > 1:
        drawn = np.sort([statistic(index) for index in resamples(n)])
        low, high = (float(drawn[round(q * (len(drawn) - 1))]) for q in (0.025, 0.975))
    return {"value": float(statistic(np.arange(n))), "ci95": [low, high], "n": n}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Ratio of two means over paired seeds, with its bootstrap interval."""
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} seeds do not pair")
    return estimate(lambda i: float(a[i].mean() / b[i].mean()), len(a))


def smallest_horizon(
    losses: Mapping[int, Sequence[float]], target: float, seeds: np.ndarray
) -> float:
    """The smallest horizon (steps) whose mean loss over ``seeds`` is at most target; inf if none.

    losses: horizon -> loss a seed. Horizons are separate runs, each with its own schedule.
    """
    for horizon in sorted(losses):
        if np.asarray(losses[horizon], float)[seeds].mean() <= target:
            return float(horizon)
    return float("inf")


def steps_ratio(
    losses: Mapping[int, Sequence[float]], reference: Sequence[float], horizon: int
) -> dict[str, Any]:
    """Smallest horizon to the reference's mean loss over the reference's own horizon.

    The target is resampled together with the runs, so its uncertainty is in the interval. A
    percentile bootstrap of few seeds is narrow: "paired_t95" has the smallest horizons whose
    losses are not above, and are below, the reference's by paired 95 % t-intervals.
    """
    base = np.asarray(reference, float)
    found = estimate(
        lambda i: smallest_horizon(losses, float(base[i].mean()), i) / horizon, len(base)
    )
    if len(base) < 2:
        return {**found, "paired_t95": [math.nan, math.nan]}
    behind = {h: mean_interval(np.asarray(losses[h], float) - base) for h in sorted(losses)}
    ends = [
        next(
            (h / horizon for h, (mean, half) in behind.items() if mean + sign * half <= 0), math.inf
        )
        for sign in (-1, 1)
    ]
    return {**found, "paired_t95": ends}


def gap_reduction(
    plain: Sequence[float], guided: Sequence[float], reference: Sequence[float]
) -> dict[str, Any]:
    """1 - (guided - reference) / (plain - reference), of means over paired seeds."""
    p, g, r = (np.asarray(x, float) for x in (plain, guided, reference))
    return estimate(
        lambda i: float(1 - (g[i].mean() - r[i].mean()) / (p[i].mean() - r[i].mean())), len(p)
    )
