"""Measure resident memory while converting, and after a hundred forwards of a quantized model.

Each case runs in its own process, which is warmed up first. The exit code is 1 if a promise is broken. Linux only.
MB are 10**6 bytes.

peak: the rise of the peak (VmHWM) while a gibibyte of float32 is converted, less source and result: under 64 MiB.
resident: anonymous and file pages after a hundred forwards of a model with at least a gigabyte stored: at most 1.10
times the stored bytes plus 10 MB; with groups of 32, 1.25 times plus 10 MB. Pages of glibc's heap that nothing uses are
returned to the system first, because how many glibc keeps differs from run to run; the column `free` has their bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli
from benchmarks.report import Failure, Report, aligned
from benchmarks.resident import KINDS, MB, PEAK_CASES, PEAK_LIMIT, ROWS, WAYS
from benchmarks.timing import reason

MEASUREMENTS = ("peak", "resident")
GIGABYTE = 10**9


def child(threads: int, *arguments: object) -> str:
    command = [sys.executable, "-m", "benchmarks.resident", *map(str, arguments)]
    environment, root = os.environ | {"OMP_NUM_THREADS": str(threads)}, Path(__file__).parent.parent
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
    return ran.stdout


def peak_case(threads: int, scheme: str, layers: int, side: int) -> dict[str, Any]:
    figures = json.loads(child(threads, "peak", scheme, layers, side))
    return {"scheme": scheme, "layers": layers, **figures, "held": figures["overhead"] < PEAK_LIMIT}


def resident_case(threads: int, kind: str, way: str, side: int, stored: int, forwards: int) -> dict[str, Any]:
    sizes = kind, side, stored, forwards
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.safetensors" for name in ("small", "model")] if way == "loaded" else []
        if files:
            child(threads, "write", *sizes, *files)
        figures = json.loads(child(threads, "measure", *sizes, *files))
    limit = KINDS[kind].limit(figures["stored"])
    return {"kind": kind, "way": way, **figures, "limit": limit, "held": figures["resident"] <= limit}


def measure(report: Report, arguments: Any) -> None:
    side, stored, forwards = arguments.side, int(arguments.stored * GIGABYTE), arguments.forwards
    cases: list[tuple[str, Any, tuple[Any, ...]]] = []
    if "peak" in arguments.only:
        cases += [("peak", peak_case, case) for case in PEAK_CASES]
    if "resident" in arguments.only:
        each = [(kind, way) for kind in arguments.kind for way in arguments.way]
        cases += [("resident", resident_case, (*case, side, stored, forwards)) for case in each]
    for name, run, case in cases:
        try:
            report.extra.setdefault(name, []).append(run(arguments.threads, *case))
        except Exception as error:  # the others go on
            report.failures.append(Failure({"case": " ".join(map(str, case))}, name, reason(error)))


#: Columns of each table: words, then bytes.
COLUMNS = {
    "peak": (("scheme", "layers"), ("source", "result", "rise", "overhead")),
    "resident": (("kind", "way", "layers"), ("stored", "anonymous", "file", "shared", "resident", "free", "limit")),
}


def table(report: Report) -> str:
    return "\n\n".join(_table(name, report.extra[name]) for name in MEASUREMENTS if report.extra.get(name))


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    words, sizes = COLUMNS[name]
    lines = [(*words, *sizes, "")]
    for row in rows:
        figures = [f"{row[key] / MB:.1f}" for key in sizes]
        lines.append((*(str(row[key]) for key in words), *figures, "held" if row["held"] else "NOT HELD"))
    return f"{name}, MB\n{aligned(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=None, check=False)
    made.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    made.add_argument("--kind", nargs="+", choices=[*KINDS], default=[*KINDS])
    made.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    made.add_argument("--stored", type=float, default=1.0, metavar="GB", help="bytes stored at least, in 10**9; 1")
    made.add_argument("--side", type=cli.positive, default=4096, help="outputs and inputs of each layer; 4096")
    made.add_argument("--forwards", type=cli.positive, default=len(ROWS), help=f"at most {len(ROWS)}")
    arguments = made.parse_args(argv)
    report = cli.begin("memory", arguments)
    measure(report, arguments)
    cli.finish(report, table(report), arguments)
    found = [*report.extra.get("peak", []), *report.extra.get("resident", [])]
    return int(bool(report.failures) or not all(row["held"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
