"""Run the command line of fewbits in its own process, and measure its time, memory and bytes above ``import fewbits``.

A peak cannot be reset, hence the own process.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

import fewbits  # imported before the first measurement, so that it does not count
from fewbits.cli import main as command_line
from stress import process


@attrs.frozen
class Measured:
    """The measurements of one run of the command line.

    Attributes:
        code: the exit code; negative for a signal.
        output: its standard output.
        complaint: the last line of its standard error.
        wall: seconds of the whole process, imports included.
        figures: `seconds`, `rise` of resident memory in bytes, bytes `read` and `written` by system calls; empty if the
            process was killed.
    """

    code: int
    output: str
    complaint: str
    wall: float
    figures: dict[str, Any]


def measure(*arguments: object, threads: int, limit: int | None = None) -> Measured:
    """Run the command line in a new process.

    Args:
        arguments: of ``fewbits``.
        threads: of torch.
        limit: bytes of data that the system allows the process beyond those after the import of fewbits; None for no
            limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        start = time.perf_counter()
        ran = process.run(
            [sys.executable, "-m", "stress.measured", str(file), str(limit or 0), *map(str, arguments)], threads
        )
        wall = time.perf_counter() - start
        figures = json.loads(file.read_text()) if file.exists() else {}
    return Measured(ran.returncode, ran.stdout, process.last_line(ran.stderr), wall, figures)


def sizes() -> dict[str, int]:
    """Read the memory of this process in bytes, by the names of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}


def transferred() -> dict[str, int]:
    """Read the bytes that this process has read and written, cached or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}


def run(limit: int, arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the command line in this process; return its exit code and measurements."""
    memory, done, start = sizes(), transferred(), time.perf_counter()
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (memory["VmData"] + limit,) * 2)
    sys.argv = ["fewbits", *arguments]
    try:
        command_line()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    seconds, now = time.perf_counter() - start, transferred()
    return code, {
        "version": fewbits.__version__,
        "seconds": seconds,
        "rise": sizes()["VmHWM"] - memory["VmRSS"],
        "read": now["rchar"] - done["rchar"],
        "written": now["wchar"] - done["wchar"],
    }


def main(argv: Sequence[str]) -> int:
    """Measure one run, and write the figures to a file, since standard output belongs to the command line."""
    file, limit, *arguments = argv
    code, figures = run(int(limit), arguments)
    Path(file).write_text(json.dumps(figures))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
