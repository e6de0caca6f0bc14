"""Peak resident memory of `convert`, above a process that has already converted a tiny layer.

Run by `benchmarks.memory`, in a process of its own, because a peak cannot be reset.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import fewbits

#: What the peak may rise by beside source and result, in bytes.
LIMIT = 64 * 2**20

#: (scheme, layers, rows and columns of each): a gibibyte of float32 in many layers, and in one.
CASES = [(scheme, layers, side) for layers, side in ((64, 2048), (1, 16384)) for scheme in ("int8", "int4")]


def resident_peak() -> int:
    """The process's high-water mark of resident memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def convert(scheme: str, layers: int, side: int) -> fewbits.Ledger:
    """Quantize a model of linear layers; what came of it is dropped."""
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    return fewbits.quantize(model, scheme, validate=False).ledger


def measure(scheme: str, layers: int, side: int) -> dict[str, int]:
    """Bytes of source and result, and what the peak rose by; in this process."""
    convert(scheme, 1, 256)
    warm = resident_peak()
    ledger = convert(scheme, layers, side)
    source, result, rise = ledger.bytes_before, ledger.bytes_after, resident_peak() - warm
    return {"source": source, "result": result, "rise": rise, "overhead": rise - source - result}


def main(argv: Sequence[str]) -> None:
    """Measure one case, and print it as JSON."""
    scheme, layers, side = argv
    print(json.dumps(measure(scheme, int(layers), int(side))))


if __name__ == "__main__":
    main(sys.argv[1:])
