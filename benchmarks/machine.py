"""The machine and the versions that a run used."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

#: Assumed where the system reports no cache size: 32 MiB, more than most machines have.
USUAL_CACHE = 32 * 2**20


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "capabilities": [name for name, value in capabilities().items() if value is True],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
    }


def capabilities() -> dict[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def has_vnni() -> bool:
    return bool(capabilities().get("avx512_vnni"))


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or "unknown"
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{fields['model name']} ({', '.join(numbers)})"


def last_level_cache() -> int:
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=USUAL_CACHE)


def _bytes(size: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    size = size.strip()
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
