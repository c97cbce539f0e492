"""Damaged files for every reader: only `lowbit.UserError` may come out, soon and in little memory.

    python tests/fuzz_readers.py --inputs 100000 --minutes 15 --log benchmarks/fuzz/runs.jsonl
    python tests/fuzz_readers.py --only gguf:1:393

Sound files of each kind are damaged: bytes flipped, cut, put in and repeated, in the file or in a
member of it whose checksum is then made right, and values of its JSON replaced. A child process
reads many; that one dies is an escape, too, and so is a refusal that memory running out has made.
An input is named by kind, seed and number; `--only` reads one, and shows where.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5  # of the processor, an input
MEMORY = 2 << 30  # beyond what the process holds before the first input
PARQUET_MEMORY = 3 << 30  # a page may declare 2 GiB, which pyarrow asks for before it looks
SLOW = ("gguf", "folder", "packed_tokens", "float32", "packed", "parquet")  # in milliseconds
FEWEST = 5000  # inputs of each slow kind, in a run that has as many for every kind
SHARED_MEMORY = Path("/dev/shm")
ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**63), 1e308, float("nan"), float("inf"), 0.5,
    "", "x", "\ud800", "../../x", "a" * 5000, [], {}, [[]], [1] * 50, {"a": 1},
]  # fmt: skip


class TooLong(BaseException):
    """No reader may catch it."""


# ------------------------------------------------------------------------------------- sound files


def make_sound(folder: Path) -> dict[str, Path]:
    """A small file, or folder, of each kind."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import make_text
    from families import tiny_folder, write_gguf

    from lowbit.files.checkpoint import save_float32
    from lowbit.files.packed import save_packed
    from lowbit.models.decoder import CausalLM, ModelConfig
    from lowbit.models.teacher import load_teacher
    from lowbit.quantization.layers import quantize_model
    from lowbit.text.tokenizers import ByteTokenizer

    made = {"packed": folder / "s.npz", "float32": folder / "s.pth", "txt": folder / "a.txt"}
    made |= {"jsonl": folder / "a.jsonl", "gz": folder / "a.jsonl.gz"}
    config = ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    model = CausalLM(config).initialise(0)
    save_float32(made["float32"], config, model.state_dict(), ByteTokenizer().describe())
    quantize_model(model, "ternary")
    save_packed(made["packed"], model, ByteTokenizer().describe())
    text = make_text(3000)
    made["txt"].write_text(text)
    lines = [{"text": p} for p in text.split("\n\n")]
    lines += [{"messages": [{"role": r, "content": "hi"} for r in ("user", "assistant")]}]
    raw = "".join(json.dumps(x) + "\n" for x in lines).encode()
    made["jsonl"].write_bytes(raw)
    made["gz"].write_bytes(gzip.compress(raw, mtime=0))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        made["parquet"] = folder / "a.parquet"
        table = pyarrow.table({"text": [x.get("text", "") for x in lines]})
        pyarrow.parquet.write_table(table, made["parquet"])
    with contextlib.suppress(ImportError):
        made["folder"] = tiny_folder(folder / "hf", "llama", num_hidden_layers=1)
        made["gguf"] = write_gguf(folder / "t.gguf", layers=1)
        teacher, tokenizer = load_teacher(str(made["folder"]))
        made["packed_tokens"] = folder / "t.npz"
        save_packed(made["packed_tokens"], teacher, tokenizer.describe())
    return made


# ------------------------------------------------------------------------------------------ damage


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to three changes of any bytes."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        # Headers are at the beginning.
        at = rng.randrange(min(len(data), rng.choice([64, 2048, 1 << 30])) or 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif kind == 4:
            data[at : at + rng.choice([1, 4, 8])] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f"])
        else:
            del data[at : at + rng.randint(1, 64)]
    return bytes(data)


def edited(value: Any, rng: random.Random) -> Any:
    """JSON with one of its values replaced, dropped or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for key in x if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], (dict, list)):
                walk(x[key])

    if not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD)
    walk(value)
    if rng.random() < 0.5:  # of the outer ones, else long lists own them all
        places = [(value, k) for k in (value if isinstance(value, dict) else range(len(value)))]
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(ODD))] = holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return value


def damaged_json(raw: bytes, rng: random.Random) -> bytes:
    try:
        return json.dumps(edited(json.loads(raw), rng)).encode()
    except ValueError:
        return damaged(raw, rng)


def damaged_member(name: str, raw: bytes, rng: random.Random) -> bytes:
    """What is inside a container, by its form."""
    if rng.random() < 0.5:
        return damaged(raw, rng)
    if name.endswith(".json"):
        return damaged_json(raw, rng)
    if name.endswith(".safetensors"):
        size = struct.unpack("<Q", raw[:8])[0]
        header = damaged_json(raw[8 : 8 + size], rng)
        return struct.pack("<Q", len(header)) + header + raw[8 + size :]
    if name in ("header.npy", "tokenizer.npy"):
        import numpy as np

        header = damaged_json(np.load(io.BytesIO(raw)).tobytes(), rng)
        out = io.BytesIO()
        np.save(out, np.frombuffer(header, np.uint8))
        return out.getvalue()
    return damaged(raw, rng)


def damaged_zip(raw: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as z, zipfile.ZipFile(out, "w") as new:
        names = z.namelist()
        heads = [n for n in names if n.endswith(("header.npy", "tokenizer.npy", "data.pkl"))]
        victim = rng.choice(heads if heads and rng.random() < 0.6 else names)
        for name in names:
            data = z.read(name)
            new.writestr(name, damaged_member(name, data, rng) if name == victim else data)
    return out.getvalue()


@functools.lru_cache
def numbers_in(path: Path) -> list[list[tuple[int, int]]]:
    """(place, bytes) of the numbers and texts in each field and tensor's description of a GGUF."""
    import gguf

    reader = gguf.GGUFReader(path)
    start = reader.data.ctypes.data
    fields = [*reader.fields.values(), *(t.field for t in reader.tensors)]
    return [[(p.ctypes.data - start, p.nbytes) for p in f.parts if p.nbytes] for f in fields]


def damaged_gguf(sound: Path, rng: random.Random) -> bytes:
    """Another value in a field of it, so that all the others are read as before."""
    data = bytearray(sound.read_bytes())
    at, size = rng.choice(rng.choice(numbers_in(sound)))
    value = rng.choice([0, 1, 2, 3, 7, 255, 20_000, 2**31 - 1, 2**31, 2**63, rng.getrandbits(64)])
    data[at : at + size] = value.to_bytes(8, "little").ljust(size, b"a")[:size]
    return bytes(data)


def write_damaged(sound: Path, target: Path, rng: random.Random) -> Path:
    """A damaged copy in the folder ``target``."""
    if sound.is_dir():
        copy = target / "hf"
        copy.mkdir(exist_ok=True)
        victim = rng.choice(sorted(p.name for p in sound.iterdir()))
        for path in sound.iterdir():
            raw = path.read_bytes()
            write_new(
                copy / path.name, damaged_member(victim, raw, rng) if path.name == victim else raw
            )
        return copy
    raw, inside = sound.read_bytes(), rng.random() < 0.7
    if sound.suffix in (".npz", ".pth") and inside:
        raw = damaged_zip(raw, rng)
    elif sound.suffix == ".gz" and inside:
        raw = gzip.compress(damaged(gzip.decompress(raw), rng), 1)
    elif sound.suffix == ".gguf" and inside:
        raw = damaged_gguf(sound, rng)
    else:
        raw = damaged(raw, rng)
    return write_new(target / sound.name, raw)


def write_new(path: Path, raw: bytes) -> Path:
    """Not into the file that was there: it may still be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return path


# ----------------------------------------------------------------------------------------- reading


def reader(kind: str) -> Callable[[Path], Any]:
    from lowbit.models.teacher import load_teacher
    from lowbit.text.documents import deduplicate, find_files, read_documents

    if kind in ("txt", "jsonl", "gz", "parquet"):
        return lambda path: list(deduplicate(read_documents(find_files([str(path)]))))
    return lambda path: load_teacher(str(path))


def prepare() -> None:
    """What every input would do again and again to the same end."""
    with contextlib.suppress(ImportError):
        import gguf

        # transformers makes this map anew for every module of a model.
        gguf.get_tensor_name_map = functools.lru_cache(8)(gguf.get_tensor_name_map)


def limit_memory(kind: str) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + (PARQUET_MEMORY if kind == "parquet" else MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def starved(error: BaseException | None) -> bool:
    """Whether memory ran out on the way to an error."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def working_folder() -> tempfile.TemporaryDirectory:
    there = os.access(SHARED_MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(dir=SHARED_MEMORY if there else None)


def replay(name: str) -> None:
    """Read one input, KIND:SEED:NUMBER. Its error comes out, and after SECONDS where it is."""
    kind, seed, number = name.split(":")
    with working_folder() as folder:
        sound = make_sound(Path(folder))[kind]
        read = reader(kind)
        read(sound)
        target = Path(folder, "damaged")
        target.mkdir()
        path = write_damaged(sound, target, random.Random(f"{kind} {int(seed)} {int(number)}"))
        limit_memory(kind)
        faulthandler.dump_traceback_later(SECONDS)
        started = time.perf_counter()
        try:
            read(path)
        finally:
            print(f"{time.perf_counter() - started:.3f} s")


def child(kind: str, sound: Path, seed: int, first: int, count: int, seconds: float) -> None:
    """Read inputs; a line of JSON for what each came to, before and after."""
    import warnings

    warnings.simplefilter("ignore")
    sys.path[:0] = [str(ROOT)]
    from lowbit import UserError

    read = reader(kind)
    prepare()
    read(sound)  # what it imports and allocates once
    limit_memory(kind)

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    began, out = time.monotonic(), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with working_folder() as folder:
        for i in range(first, first + count):
            if time.monotonic() - began > seconds:
                break
            path = write_damaged(sound, Path(folder), random.Random(f"{kind} {seed} {i}"))
            print(json.dumps({"begun": i}), file=out)
            what, started = "read", time.perf_counter()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(path)
            except UserError as e:
                what = "refused" if str(e) and "\n" not in str(e) else f"odd line {str(e)!r}"
                if starved(e):
                    what = f"out of memory: {e}"[:300]
            except BaseException as e:
                what = f"{type(e).__name__}: {e}"[:300]
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps({"came_to": what, "s": time.perf_counter() - started}), file=out)
    status = Path("/proc/self/status").read_text()  # getrusage has the parent's peak, too
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps({"peak_bytes": peak}), file=out)


def attack(
    kind: str, sound: Path, seed: int, first: int, count: int, seconds: float = 1e9
) -> dict[str, Any]:
    """What so many inputs came to, in a child process or, after deaths, several."""
    found: dict[str, Any] = {"kind": kind, "seed": seed, "first": first, "inputs": 0}
    found |= {"refused": 0, "read": 0, "escapes": [], "slowest_seconds": 0.0, "peak_bytes": 0}
    deadline, last = time.monotonic() + seconds, first + count
    while first < last and time.monotonic() < deadline:
        left = deadline - time.monotonic()
        argv = [kind, str(sound), str(seed), str(first), str(last - first), str(left)]
        done = subprocess.Popen(
            [sys.executable, __file__, "--child", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert done.stdout
        begun: int | None = None
        for line in done.stdout:
            said = json.loads(line)
            found["peak_bytes"] = max(found["peak_bytes"], said.get("peak_bytes", 0))
            if "begun" in said:
                begun = said["begun"]
            if "came_to" in said and begun is not None:
                found["inputs"] += 1
                found["slowest_seconds"] = max(found["slowest_seconds"], said["s"])
                if said["came_to"] in ("refused", "read"):
                    found[said["came_to"]] += 1
                else:
                    found["escapes"].append([begun, said["came_to"]])
                first, begun = begun + 1, None
        if done.wait() == 0:
            break
        if begun is None:
            raise RuntimeError(f"the child of {kind} failed before its first input")
        found["inputs"] += 1
        found["escapes"].append([begun, f"the process ended with {done.returncode}"])
        first = begun + 1
    return found


def summary(log: Path) -> dict[str, Any]:
    """A log's rows, added up over each kind."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_kind = kinds.setdefault(row["kind"], {})
        for key in ("inputs", "refused", "read"):
            of_kind[key] = of_kind.get(key, 0) + row[key]
        of_kind["escapes"] = of_kind.get("escapes", 0) + len(row["escapes"])
        for key in ("slowest_seconds", "peak_bytes"):
            of_kind[key] = max(of_kind.get(key, 0), row[key])
    total = {key: sum(k[key] for k in kinds.values()) for key in ("inputs", "escapes")}
    return {**total, "kinds": kinds, "commits": sorted({r["commit"] for r in rows})}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, sound, *numbers = sys.argv[2:]
        child(kind, Path(sound), *map(int, numbers[:3]), float(numbers[3]))  # type: ignore[misc]
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log", type=Path, help="a .jsonl file; its sums go to summary.json beside it"
    )
    parser.add_argument("--only", metavar="KIND:SEED:NUMBER", help="read this input alone")
    o = parser.parse_args()
    if o.only:
        replay(o.only)
        return
    with working_folder() as folder:
        sound = make_sound(Path(folder))
        from studies.bench import machine

        ends = time.monotonic() + 60 * o.minutes
        # Slow ones first: the others share what is left of inputs and of time.
        kinds = sorted(sound, key=lambda kind: (*SLOW, kind).index(kind))
        left = o.inputs
        for n, kind in enumerate(kinds):
            share = left // (len(kinds) - n)
            if kind in SLOW:
                share = min(share, max(FEWEST, o.inputs // 100))
            seconds = (ends - time.monotonic()) / (len(kinds) - n)
            found = attack(kind, sound[kind], o.seed, 0, share, seconds)
            left -= found["inputs"]
            print({k: v for k, v in found.items() if k != "escapes"}, flush=True)
            for escape in found["escapes"][:20]:
                print("   ", *escape, flush=True)
            if o.log:
                with o.log.open("a") as f:
                    f.write(json.dumps({**found, **machine()}) + "\n")

    if o.log:
        sums = json.dumps({**summary(o.log), **machine()}, indent=1)
        (o.log.parent / "summary.json").write_text(sums + "\n")


if __name__ == "__main__":
    main()
