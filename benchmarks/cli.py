"""Command line options that all benchmarks share, and the report at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import peers
from benchmarks.machine import machine, versions
from benchmarks.report import Report, broken

T = TypeVar("T")
Parser = argparse.ArgumentParser

OURS = ("fewbits", "torch")


def parser(description: str | None, rounds: int | None = 7, *, check: bool = True, peers: bool = False) -> Parser:
    """Make a parser with the options of every benchmark; `rounds` is None where nothing is timed."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=positive, default=rounds, help=f"rounds; {rounds}")
    made.add_argument("--threads", type=positive, default=2, help="threads of torch and the peers; 2")
    made.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write the times of every round, the machine and the versions"
    )
    if peers:
        made.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time other libraries")
    if check:
        made.add_argument("--check", action="store_true", help="exit with 1 if a promise is not held")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Parse arguments separated by commas."""
    return lambda text: [parse(part.strip()) for part in text.split(",") if part.strip()]


def dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"{text} is not a floating dtype of torch")
    return found


def begin(benchmark: str, arguments: argparse.Namespace, packages: Sequence[str] = ()) -> Report:
    """Set threads and seed, and start a report with machine and versions."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    asked = getattr(arguments, "peers", False)
    return Report(
        benchmark,
        settings,
        machine(),
        versions([*OURS, *(peers.PACKAGES if asked else ()), *packages]),
        peers.absent() if asked else [],
    )


def finish(report: Report, table: str, arguments: argparse.Namespace, promises: Sequence[str] = ()) -> int:
    """Print the report, write the JSON, and return the exit code: 1 if ``--check`` finds a broken promise."""
    report.extra["promises"] = list(promises)
    print("\n\n".join(filter(None, (report.heading(), table, "\n".join(promises), report.trouble()))))
    if arguments.json is not None:
        report.write(arguments.json)
    return int(getattr(arguments, "check", False) and broken(promises))
