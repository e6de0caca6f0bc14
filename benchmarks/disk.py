"""What the benchmarks of checkpoints on disk share: sizes, room, bytes of files, the command line as a process."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fewbits._sizes import parse_size
from fewbits.errors import ArgumentError

MB = 10**6
#: Where files lie in memory, if the system has such a place.
SHM = Path("/dev/shm")
#: How much room is left over besides what a benchmark writes.
SPARE = 256 * MB


def size(text: str) -> int:
    """An argument such as ``6GB``: bytes."""
    try:
        return parse_size(text, "a size")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_size(folder: Path) -> int:
    """Bytes of all files of a directory, as their lengths say."""
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> list[Path]:
    """All files of a directory and those below."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a directory, by its path there."""
    return {str(path.relative_to(folder)): digest(path) for path in files(folder)}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            found.update(piece[:count])
    return found.hexdigest()


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file: how many bytes its header takes, with those that say so, and what it says of tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length))
    fields.pop("__metadata__", None)
    return 8 + length, fields


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a safetensors file, as its header says."""
    ranges = [entry["data_offsets"] for entry in header_of(path)[1].values()]
    return sum(end - start for start, end in ranges)


def in_memory(path: Path) -> bool:
    """Whether what is written there takes memory."""
    return SHM.exists() and path.stat().st_dev == SHM.stat().st_dev


def room(path: Path) -> int:
    """Bytes that can be written below an existing directory; where files lie in memory, no more than is available."""
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    return min(free, available()) if in_memory(path) else free


def available() -> int:
    """Bytes of memory that programs can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def need_room(made: argparse.ArgumentParser, path: Path, needed: int) -> None:
    """Refuse to begin, with exit code 2, where less can be written."""
    found = room(path)
    if found < needed + SPARE:
        where = "memory (files there lie in it)" if in_memory(path) else "disk"
        made.error(
            f"{path}: {needed / MB:,.0f} MB of {where} are needed and {SPARE / MB:,.0f} to spare, "
            f"{found / MB:,.0f} are free"
        )


def command(*arguments: object) -> list[str]:
    """The command line of fewbits, with the Python that runs this."""
    return [sys.executable, "-m", "fewbits", *map(str, arguments)]


def environment(threads: int) -> dict[str, str]:
    """That of this process, with so many threads for torch."""
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


def run(arguments: list[str], threads: int, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """A process with its output as text, whatever its exit code; the other packages of benchmarks are found from it."""
    root = Path(__file__).parent.parent
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment(threads), cwd=root, timeout=timeout
    )


def last_line(text: str) -> str:
    """The last line that says anything."""
    return (text.strip().splitlines() or ["nothing was said"])[-1]
