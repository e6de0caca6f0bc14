"""What all benchmarks share on the command line: rounds, threads, peers, and where the results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import peers
from benchmarks.machine import machine, versions
from benchmarks.plot import Panel, draw, timings
from benchmarks.report import Report

T = TypeVar("T")

OURS = ("fewbits", "torch")


def parser(description: str | None, rounds: int | None = 7) -> argparse.ArgumentParser:
    """With the options that every benchmark has; `rounds` is how often it times by default, None if it does not."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=positive, default=rounds, help=f"how often everything is timed; {rounds}")
    made.add_argument("--threads", type=positive, default=2, help="of torch and of the peers; 2")
    made.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every round's times, machine and versions")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the results (needs matplotlib)")
    return made


def with_peers(made: argparse.ArgumentParser, default: bool | None = True) -> argparse.ArgumentParser:
    """And with the choice whether other libraries take part."""
    made.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=default, help="time the other libraries found here"
    )
    return made


def positive(text: str) -> int:
    """An argument from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argument with commas in it."""
    return lambda text: [parse(part.strip()) for part in text.split(",") if part.strip()]


def dtype(text: str) -> torch.dtype:
    """An argument such as ``float32``."""
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"{text} is not a floating dtype of torch")
    return found


def begin(benchmark: str, arguments: argparse.Namespace, packages: Sequence[str] = ()) -> Report:
    """Settle threads and seed; a report that knows where it was made."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    settings = {key: _plain(value) for key, value in vars(arguments).items() if key not in ("json", "plot")}
    asked = getattr(arguments, "peers", False)
    return Report(
        benchmark,
        settings,
        machine(),
        versions([*OURS, *(peers.PACKAGES if asked else ()), *packages]),
        peers.absent() if asked else [],
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def finish(report: Report, table: str, arguments: argparse.Namespace, panels: Sequence[Panel] | None = None) -> None:
    """Print, and write what was asked for: the JSON first, because a plot may fail.

    Args:
        report: what was found.
        table: as text.
        arguments: of the command line.
        panels: what to plot; None stands for the times of all cells.
    """
    print("\n\n".join(part for part in (report.heading(), table, report.trouble()) if part))
    if arguments.json is not None:
        report.write(arguments.json)
    if arguments.plot is not None:
        title = f"{report.benchmark}: {report.machine['cpu']}, {report.machine['threads']} threads"
        draw(timings(report.cells) if panels is None else panels, title, arguments.plot)
