"""The result of a benchmark: one cell of times per contender and case, as a table and as JSON."""

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
    """The seconds of one contender in one case, one number per round, beside those of its baseline."""

    case: Mapping[str, Any]
    contender: str
    seconds: Sequence[float]
    baseline: Sequence[float] = ()
    facts: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def speed(self) -> float:
        pairs = zip(self.baseline, self.seconds, strict=False)
        return statistics.median([base / own for base, own in pairs] or [math.nan])

    def to_dict(self) -> dict[str, Any]:
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
    case: Mapping[str, Any]
    contender: str
    reason: str

    def __str__(self) -> str:
        where = ", ".join(f"{key} {value}" for key, value in self.case.items())
        return f"{self.contender}{f' ({where})' if where else ''}: {self.reason}"


@attrs.define
class Report:
    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    missing: Sequence[str] = ()
    cells: list[Cell] = attrs.field(factory=list)
    failures: list[Failure] = attrs.field(factory=list)
    extra: dict[str, Any] = attrs.field(factory=dict)

    def write(self, path: Path) -> None:
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(Report) if field.name != "extra"}
        fields |= {"cells": [cell.to_dict() for cell in self.cells], **self.extra}
        path.write_text(json.dumps(fields, indent=1, default=_plain) + "\n", encoding="utf-8")

    def heading(self) -> str:
        m = self.machine
        held = " ".join(m["capabilities"]) or m["architecture"]
        return (
            f"{m['cpu']}; {held}; {m['threads']} threads\n"
            + ", ".join(f"{name} {version}" for name, version in self.versions.items())
            + (f"\nnot installed: {', '.join(self.missing)}" if self.missing else "")
        )

    def trouble(self) -> str:
        return "\n".join(f"left out: {failure}" for failure in self.failures)


def _plain(value: Any) -> Any:
    return attrs.asdict(value) if attrs.has(type(value)) else str(value)


def said(promise: str, held: bool) -> str:
    return f"{'held' if held else 'NOT HELD'}: {promise}"


def broken(lines: Sequence[str]) -> bool:
    return any(line.startswith("NOT HELD") for line in lines)


def pivot(cells: Sequence[Cell], column: str, show: Callable[[Cell], str]) -> list[tuple[str, ...]]:
    """Make a table with a line per contender and a column per value of one part of the case."""
    names = list(dict.fromkeys(cell.contender for cell in cells))
    values = list(dict.fromkeys(cell.case[column] for cell in cells))
    at = {(cell.contender, cell.case[column]): show(cell) for cell in cells}
    heading = ("", *(f"{column} {value}" for value in values))
    return [heading, *((name, *(at.get((name, value), "-") for value in values)) for name in names)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def milliseconds(cell: Cell) -> str:
    return f"{cell.median * 1e3:.3g} ms ±{cell.spread * 50:.0f}%"
