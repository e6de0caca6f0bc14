"""Measure the memory of one conversion or one quantized model, for `benchmarks.memory`.

It runs in its own process, because a peak cannot be reset. A tiny model warms the process up. Then layers are
quantized one at a time, or loaded from a file, and run. The rise of resident memory is compared with the stored bytes.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import nn

import fewbits
from fewbits._heap import trim

MB = 10**6
#: How far the peak may rise beyond source and result, in bytes.
PEAK_LIMIT = 64 * 2**20
#: (scheme, layers, rows and columns of each): a gibibyte of float32 in many layers, and in one.
PEAK_CASES = [(scheme, layers, side) for layers, side in ((64, 2048), (1, 16384)) for scheme in ("int8", "int4")]
#: Rows of a hundred forwards: mostly one, and some large enough for kernels that expand blocks of the weight.
ROWS = (1,) * 96 + (32, 32, 256, 256)


@attrs.frozen
class Stored:
    group_size: int | None
    allowed: float

    def quantizer(self) -> fewbits.Quantizer:
        return fewbits.Int8PerChannel() if self.group_size is None else fewbits.Int4Grouped(self.group_size)

    def converted(self, model: nn.Module) -> tuple[nn.Module, int]:
        quantizer = self.quantizer()
        quantizer.prepare(model)
        return quantizer.convert(), quantizer.ledger.bytes_after

    def limit(self, stored: int) -> int:
        return int(self.allowed * stored) + 10 * MB


KINDS = {"int8": Stored(None, 1.10), "int4-g128": Stored(128, 1.10), "int4-g32": Stored(32, 1.25)}
WAYS = ("converted", "loaded")
#: Outputs and inputs of the layers that warm the process up.
SMALL = 256


PAGES = {"anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem"}


def status(key: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024


def resident() -> dict[str, int]:
    return {name: status(key) for name, key in PAGES.items()}


def convert(scheme: str, layers: int, side: int) -> fewbits.Ledger:
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    return fewbits.quantize(model, scheme, validate=False).ledger


def measure_peak(scheme: str, layers: int, side: int) -> dict[str, int]:
    convert(scheme, 1, 256)
    warm = status("VmHWM")
    ledger = convert(scheme, layers, side)
    source, result, rise = ledger.bytes_before, ledger.bytes_after, status("VmHWM") - warm
    return {"source": source, "result": result, "rise": rise, "overhead": rise - source - result}


def write(kind: str, side: int, stored: int, path: Path) -> None:
    quantizer, each = KINDS[kind].quantizer(), KINDS[kind].converted(nn.Linear(side, side, bias=False))[1]
    model = _float_model(side, -(-stored // each))
    for layer in model:
        row = torch.randn(1, side) / side**0.5
        layer.weight = nn.Parameter(row.expand(side, side), requires_grad=False)
    quantizer.prepare(model)
    quantizer.convert()
    quantizer.save(path)


def _float_model(side: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(side, side, bias=False, device="meta") for _ in range(layers)))


def converted(kind: str, side: int, stored: int) -> tuple[nn.Sequential, int]:
    model, total = nn.Sequential(), 0
    while total < stored:
        layer, size = KINDS[kind].converted(nn.Linear(side, side, bias=False))
        model.append(layer)
        total += size
    return model, total


def loaded(path: Path, side: int) -> tuple[nn.Sequential, int]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    model = fewbits.load(path, into=_float_model(side, len(names)))
    return model, stored_bytes(model)


def stored_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for layer in model.children() for t in layer.state_dict().values())


def run(model: nn.Module, side: int, rows: Sequence[int] = ROWS) -> None:
    with torch.inference_mode():
        for count in rows:
            model(torch.randn(count, side))


def measure(
    kind: str, side: int, stored: int, files: Sequence[Path] = (), rows: Sequence[int] = ROWS
) -> dict[str, int]:
    run(loaded(files[0], SMALL)[0] if files else converted(kind, SMALL, 1)[0], SMALL, rows)
    gc.collect()
    trim(holes=0)
    before = resident()
    model, size = loaded(files[1], side) if files else converted(kind, side, stored)
    run(model, side, rows)
    gc.collect()
    untrimmed = sum(resident().values())
    trim(holes=0)
    rise = {name: pages - before[name] for name, pages in resident().items()}
    free = untrimmed - sum(resident().values())
    return {"layers": len(model), "stored": size, **rise, "resident": sum(rise.values()), "free": free}


def main(argv: Sequence[str]) -> None:
    action, *rest = argv
    if action == "peak":
        scheme, layers, width = rest
        print(json.dumps(measure_peak(scheme, int(layers), int(width))))
        return
    kind, side, stored, forwards, *files = rest
    if action == "write":
        write(kind, SMALL, 1, Path(files[0]))
        write(kind, int(side), int(stored), Path(files[1]))
    else:
        rows = ROWS[-int(forwards) :]
        print(json.dumps(measure(kind, int(side), int(stored), [Path(file) for file in files], rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
