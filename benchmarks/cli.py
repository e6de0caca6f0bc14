"""What all benchmarks share on the command line: rounds, threads, peers, and where the results go."""

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

OURS = ("fewbits", "torch")


def parser(description: str | None, rounds: int | None = 7, *, check: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark; `rounds` is None where nothing is timed."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=positive, default=rounds, help=f"how often everything is timed; {rounds}")
    made.add_argument("--threads", type=positive, default=2, help="of torch and of the peers; 2")
    made.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every round's times, machine and versions")
    if check:
        made.add_argument("--check", action="store_true", help="exit with 1 if a promise is not held")
    return made


def with_peers(made: argparse.ArgumentParser, default: bool | None = True) -> argparse.ArgumentParser:
    made.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=default, help="time the other libraries found here"
    )
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [parse(part.strip()) for part in text.split(",") if part.strip()]


def dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"{text} is not a floating dtype of torch")
    return found


def begin(benchmark: str, arguments: argparse.Namespace, packages: Sequence[str] = ()) -> Report:
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
