"""The versions that a report of a bug needs: ``python -m lowbit``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from lowbit import __version__
from lowbit.arguments import Parser
from lowbit.console import Printer
from lowbit.extras import EXTRAS


def versions(packages: Iterable[str]) -> str:
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m lowbit", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="what is printed without it, too")
    parser.parse_args(argv)
    say = Printer()
    say(f"apl-hybrid {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(versions(["torch", "numpy", "scikit-learn", "tqdm"]))
    say(f"CPU: {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"CUDA: {torch.version.cuda or 'not in this torch'}, GPUs: {', '.join(gpus) or 'none'}")
    for extra, packages in EXTRAS.items():
        say(f"extra {extra}: {versions(packages.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
