"""Resident memory: the peak while converting, and what a model takes that has run a hundred forwards.

Each case runs in a process of its own, above what that process took once it was warm. Exits with 1 if a promise is not
held. Linux only. MB are 10**6 bytes.

peak: what the peak (VmHWM) rises by while a gibibyte of float32 is converted, less source and result: under 64 MiB.
resident: anonymous and file pages, after a hundred forwards of a model of at least a gigabyte stored: at most 1.10
times the stored bytes and 50 MB; with groups of 32, 1.25 times and 50 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, peak
from benchmarks.plot import Bar, Panel
from benchmarks.report import Failure, Report, aligned
from benchmarks.resident import KINDS, MB, ROWS, WAYS
from benchmarks.timing import reason

MEASUREMENTS = ("peak", "resident")
GIGABYTE = 10**9


def child(threads: int, module: str, *arguments: object) -> str:
    """What a module of this package prints in a process of its own.

    Raises:
        RuntimeError: if it fails, with the last line it wrote.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    environment, root = os.environ | {"OMP_NUM_THREADS": str(threads)}, Path(__file__).parent.parent
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
    return ran.stdout


def peak_case(threads: int, scheme: str, layers: int, side: int) -> dict[str, Any]:
    """The peak while one model is converted."""
    figures = json.loads(child(threads, "peak", scheme, layers, side))
    return {"scheme": scheme, "layers": layers, **figures, "held": figures["overhead"] < peak.LIMIT}


def resident_case(threads: int, kind: str, way: str, side: int, stored: int, forwards: int) -> dict[str, Any]:
    """What one model takes after its forwards."""
    sizes = kind, side, stored, forwards
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.safetensors" for name in ("small", "model")] if way == "loaded" else []
        if files:
            child(threads, "resident", "write", *sizes, *files)
        figures = json.loads(child(threads, "resident", "measure", *sizes, *files))
    limit = KINDS[kind].limit(figures["stored"])
    return {"kind": kind, "way": way, **figures, "limit": limit, "held": figures["resident"] <= limit}


def measure(report: Report, arguments: Any) -> None:
    """Fill a report with the rows of both tables."""
    side, stored, forwards = arguments.side, int(arguments.stored * GIGABYTE), arguments.forwards
    cases: list[tuple[str, Any, tuple[Any, ...]]] = []
    if "peak" in arguments.only:
        cases += [("peak", peak_case, case) for case in peak.CASES]
    if "resident" in arguments.only:
        each = [(kind, way) for kind in arguments.kind for way in arguments.way]
        cases += [("resident", resident_case, (*case, side, stored, forwards)) for case in each]
    for name, run, case in cases:
        try:
            report.extra.setdefault(name, []).append(run(arguments.threads, *case))
        except Exception as error:  # the others go on
            report.failures.append(Failure({"case": " ".join(map(str, case))}, name, reason(error)))


def table(report: Report) -> str:
    """Both tables, in MB."""
    parts = [_peaks(report.extra.get("peak", [])), _residents(report.extra.get("resident", []))]
    return "\n\n".join(part for part in parts if part)


def _peaks(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = ("source", "result", "rise", "overhead")
    return _table("peak while converting, MB", ("scheme", "layers"), sizes, rows)


def _residents(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = ("stored", "anonymous", "file", "shared", "resident", "limit")
    return _table("resident after the forwards, MB", ("kind", "way", "layers"), sizes, rows)


def _table(title: str, words: Sequence[str], sizes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [(*words, *sizes, "")]
    for row in rows:
        figures = [f"{row[key] / MB:.1f}" for key in sizes]
        lines.append((*(str(row[key]) for key in words), *figures, "held" if row["held"] else "NOT HELD"))
    return f"{title}\n{aligned(lines)}" if rows else ""


def panels(report: Report) -> list[Panel]:
    """For ``--plot``: what is stored, what is resident, and what may be."""
    peaks = [
        bar
        for row in report.extra.get("peak", [])
        for bar in _bars(f"{row['scheme']} x{row['layers']}", row, ("rise", "source", "result"))
    ]
    residents = [
        bar
        for row in report.extra.get("resident", [])
        for bar in _bars(f"{row['kind']} {row['way']}", row, ("resident", "stored", "limit"))
    ]
    drawn = [Panel("peak while converting", "MB", peaks, log=False), Panel("resident", "MB", residents, log=False)]
    return [panel for panel in drawn if panel.bars]


def _bars(name: str, row: Mapping[str, Any], keys: Sequence[str]) -> list[Bar]:
    """The first is what was measured; the others are what it is compared with."""
    sizes = {key: row[key] / MB for key in keys}
    return [Bar(f"{name}, {k}", v, (v, v), "ours" if k == keys[0] else "plain") for k, v in sizes.items()]


def among(names: Sequence[str]) -> Any:
    """An argument of some of these names, with commas."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(names)}")
        return text

    return cli.listed(parse)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a promise is not held, or a case could not be measured."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("--only", type=among(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS))
    made.add_argument("--kind", type=among([*KINDS]), default=[*KINDS], metavar="KIND,...", help=", ".join(KINDS))
    made.add_argument("--way", type=among(WAYS), default=[*WAYS], metavar="WAY,...", help=", ".join(WAYS))
    made.add_argument("--stored", type=float, default=1.0, metavar="GB", help="bytes stored at least, in 10**9; 1")
    made.add_argument("--side", type=cli.positive, default=4096, help="outputs and inputs of each layer; 4096")
    made.add_argument("--forwards", type=cli.positive, default=len(ROWS), help=f"at most {len(ROWS)}")
    arguments = made.parse_args(argv)
    report = cli.begin("memory", arguments)
    measure(report, arguments)
    cli.finish(report, table(report), arguments, panels(report))
    found = [*report.extra.get("peak", []), *report.extra.get("resident", [])]
    return int(bool(report.failures) or not all(row["held"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
