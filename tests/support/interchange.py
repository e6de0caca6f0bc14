"""Write the versions in the table of docs/interchange.md: those that the tests of each row pass with.

Run it with ``python -m support.interchange`` in the folder of the tests. A row keeps its versions if its tests fail, or
are all skipped because a package is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "interchange.md"
HEADER = "| format or tool | direction | tested with | what the tests verify | tests |"


class Row(NamedTuple):
    """A row of the table; `line` counts from 0."""

    line: int
    cells: list[str]

    @property
    def packages(self) -> list[str]:
        return [entry.split()[0] for entry in self.cells[2].split(", ")]

    @property
    def tests(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.cells[4])


def rows(text: str) -> Iterator[Row]:
    lines = text.splitlines()
    first = lines.index(HEADER) + 2
    for number, line in enumerate(lines[first:], first):
        if not line.startswith("|"):
            break
        yield Row(number, [cell.strip() for cell in line.strip("|").split("|")])


class Outcomes:
    """Counts what passed and failed in a run of pytest."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def ran(tests: list[str]) -> str:
    """Run tests; return "passed", "failed" or "skipped"."""
    outcomes = Outcomes()
    arguments = ["-q", "--no-header", "-m", "not slow", *(str(TESTS / test) for test in tests)]
    status = pytest.main(arguments, plugins=[outcomes])
    if outcomes.failed or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "failed"
    return "passed" if outcomes.passed else "skipped"


def versions(packages: list[str]) -> str:
    return ", ".join(f"{package} {importlib.metadata.version(package).partition('+')[0]}" for package in packages)


def main() -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for row in rows(text):
        found[row.cells[0]] = outcome = ran(row.tests)
        if outcome == "passed":
            cells = [*row.cells[:2], versions(row.packages), *row.cells[3:]]
            lines[row.line] = f"| {' | '.join(cells)} |"
    DOCUMENT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, outcome in found.items():
        print(f"{outcome}: {name}")
    return int("failed" in found.values())


if __name__ == "__main__":
    sys.exit(main())
