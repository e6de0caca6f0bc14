"""The command line of fewbits as a process, and the headers of the files that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: The root of the repository.
ROOT = Path(__file__).parents[2]


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length))
    fields.pop("__metadata__", None)
    return 8 + length, fields


def tensor_bytes(path: Path) -> int:
    ranges = [entry["data_offsets"] for entry in header_of(path)[1].values()]
    return sum(end - start for start, end in ranges)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fewbits", *map(str, arguments)]


def environment(threads: int) -> dict[str, str]:
    """This process's environment, with so many threads for torch, in which `benchmarks` and `stress` are found."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}


def run(arguments: list[str], threads: int, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment(threads), cwd=ROOT, timeout=timeout
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]
