"""What a benchmark found: cells of times, as a table and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class Cell:
    """One contender in one case.

    Attributes:
        case: what was measured, such as ``{"shape": "4096x4096", "rows": 1}``.
        contender: who.
        seconds: one number for each round.
        baseline: the seconds of whoever it is compared with, in the same rounds.
        facts: whatever else is known, such as the kernel.
    """

    case: Mapping[str, Any]
    contender: str
    seconds: Sequence[float]
    baseline: Sequence[float] = ()
    facts: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest round, in parts of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def speed(self) -> float:
        """How many times faster than the baseline: the median over the rounds of the ratio within a round."""
        pairs = zip(self.baseline, self.seconds, strict=False)
        return statistics.median([base / own for base, own in pairs] or [math.nan])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a ratio that is not known is null."""
        return {
            **self.case,
            "contender": self.contender,
            "seconds": list(self.seconds),
            "median": self.median,
            "spread": self.spread,
            "speed": None if math.isnan(self.speed) else self.speed,
            **self.facts,
        }


@attrs.frozen
class Failure:
    """A contender that was left out of a case, and why."""

    case: Mapping[str, Any]
    contender: str
    reason: str

    def __str__(self) -> str:
        where = ", ".join(f"{key} {value}" for key, value in self.case.items())
        return f"{self.contender}{f' ({where})' if where else ''}: {self.reason}"


@attrs.define
class Report:
    """All that a run found."""

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    missing: Sequence[str] = ()
    cells: list[Cell] = attrs.field(factory=list)
    failures: list[Failure] = attrs.field(factory=list)
    extra: dict[str, Any] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "benchmark": self.benchmark,
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "missing": list(self.missing),
            "cells": [cell.to_dict() for cell in self.cells],
            "failures": [attrs.asdict(failure) for failure in self.failures],
            **self.extra,
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n", encoding="utf-8")

    def heading(self) -> str:
        """Machine and versions, in two lines."""
        m = self.machine
        held = " ".join(m["capabilities"]) or m["architecture"]
        return (
            f"{m['cpu']}; {held}; {m['threads']} threads\n"
            + ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + (f"\nnot installed: {', '.join(self.missing)}" if self.missing else "")
        )

    def trouble(self) -> str:
        """The contenders that were left out, one a line."""
        return "\n".join(f"left out: {failure}" for failure in self.failures)


def said(promise: str, held: bool) -> str:
    """A line for a promise."""
    return f"{'held' if held else 'NOT HELD'}: {promise}"


def broken(lines: Sequence[str]) -> bool:
    """Whether any of these lines is of a promise that was not held."""
    return any(line.startswith("NOT HELD") for line in lines)


def pivot(cells: Sequence[Cell], column: str, show: Callable[[Cell], str]) -> list[tuple[str, ...]]:
    """A table with a line for every contender and a column for every value of one part of the case."""
    names = list(dict.fromkeys(cell.contender for cell in cells))
    values = list(dict.fromkeys(cell.case[column] for cell in cells))
    at = {(cell.contender, cell.case[column]): show(cell) for cell in cells}
    heading = ("", *(f"{column} {value}" for value in values))
    return [heading, *((name, *(at.get((name, value), "-") for value in values)) for name in names)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as text: the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def milliseconds(cell: Cell) -> str:
    """The median and the spread."""
    return f"{cell.median * 1e3:.3g} ms ±{cell.spread * 50:.0f}%"


def faster(cell: Cell) -> str:
    """How many times faster than the baseline."""
    return f"{cell.speed:.2f}x"


def slower(cell: Cell) -> str:
    """How many times the baseline's time."""
    return f"{1 / cell.speed:.2f}x"
