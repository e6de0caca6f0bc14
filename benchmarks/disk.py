"""Helpers for benchmarks and stress tests of checkpoints on disk: sizes, free space, digests."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from fewbits._sizes import parse_size
from fewbits.errors import ArgumentError

MB = 10**6
#: A file system in memory, if the system has one.
SHM = Path("/dev/shm")
#: Space to leave free.
SPARE = 256 * MB


def size(text: str) -> int:
    try:
        return parse_size(text, "a size")
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in files(folder)}


def digest(path: Path) -> str:
    found, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            found.update(piece[:count])
    return found.hexdigest()


def in_memory(path: Path) -> bool:
    return SHM.exists() and path.stat().st_dev == SHM.stat().st_dev


def room(path: Path) -> int:
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    return min(free, available()) if in_memory(path) else free


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def need_room(made: argparse.ArgumentParser, path: Path, needed: int) -> None:
    found = room(path)
    if found < needed + SPARE:
        where = "memory (files there lie in it)" if in_memory(path) else "disk"
        made.error(
            f"{path}: {needed / MB:,.0f} MB of {where} are needed and {SPARE / MB:,.0f} to spare, "
            f"{found / MB:,.0f} are free"
        )
