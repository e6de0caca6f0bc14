"""Peak resident memory of `convert`, above a process that has already converted a tiny layer.

Run ``python -m benchmarks.memory``. Each case runs in a process of its own, because a peak cannot be reset: it prints
what the peak (VmHWM) rose by, what source and result weigh, and the difference, which must stay under 64 MB. Linux
only. Exits with 1 if a case does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fewbits

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
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    return fewbits.quantize(model, scheme, validate=False).ledger


def measure(scheme: str, layers: int, side: int) -> dict[str, int]:
    """Bytes of source and result, and what the peak rose by; in this process."""
    convert(scheme, 1, 256)
    warm = resident_peak()
    ledger = convert(scheme, layers, side)
    return {"source": ledger.bytes_before, "result": ledger.bytes_after, "rise": resident_peak() - warm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=3, metavar=("SCHEME", "LAYERS", "SIDE"), help=argparse.SUPPRESS)
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(measure(case[0], int(case[1]), int(case[2]))))
        return 0
    held = True
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; MB = 2**20 bytes")
    print(f"{'scheme':8}{'layers':>8}{'source MB':>11}{'result MB':>11}{'peak rise MB':>14}{'overhead MB':>13}")
    for scheme, layers, side in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--case", scheme, str(layers), str(side)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        overhead = figures["rise"] - figures["source"] - figures["result"]
        held &= overhead < LIMIT
        columns = [figures["source"], figures["result"], figures["rise"], overhead]
        widths = (11, 11, 14, 13)
        print(f"{scheme:8}{layers:>8}" + "".join(f"{v / 2**20:>{w}.1f}" for v, w in zip(columns, widths, strict=True)))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
