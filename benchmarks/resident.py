"""What one model takes in resident memory after a hundred forwards, measured in a process of its own.

Run by `benchmarks.memory`. The process is warmed first: a tiny model of the same kind is made, or loaded, and run. Then
layers are quantized one at a time, their floats dropped, or all are loaded from a file, and run. What resident memory
has risen by, anonymous and file pages both, is compared with the bytes that are stored.
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

MB = 10**6
#: Inputs of a hundred forwards: mostly one row, some with so many that blocks of the weight are expanded.
ROWS = (1,) * 96 + (32, 32, 256, 256)


@attrs.frozen
class Stored:
    """A kind of model.

    Attributes:
        scheme: of its layers.
        group_size: of grouped schemes.
        allowed: resident bytes for each stored byte.
        slack: resident bytes besides.
    """

    scheme: str
    group_size: int | None
    allowed: float
    slack: int = 50 * MB

    def quantizer(self) -> fewbits.Quantizer:
        """A new one."""
        return fewbits.Int8PerChannel() if self.group_size is None else fewbits.Int4Grouped(self.group_size)

    def converted(self, model: nn.Module) -> tuple[nn.Module, int]:
        """The quantized model, and its bytes."""
        quantizer = self.quantizer()
        quantizer.prepare(model)
        return quantizer.convert(), quantizer.ledger.bytes_after

    def limit(self, stored: int) -> int:
        """What may be resident of so many stored bytes."""
        return int(self.allowed * stored) + self.slack


KINDS = {
    "int8": Stored("int8", None, 1.10),
    "int4-g128": Stored("int4", 128, 1.10),
    "int4-g32": Stored("int4", 32, 1.25),
}
WAYS = ("converted", "loaded")
#: Outputs and inputs of the layers that warm the process up.
SMALL = 256


def resident() -> dict[str, int]:
    """Bytes of this process in memory, by kind of page."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem"}
    return {name: int(fields[key].split()[0]) * 1024 for name, key in kinds.items()}


def write(kind: str, side: int, stored: int, path: Path) -> None:
    """Write a model of the kind to a file. Its floats take next to no memory: all rows of a layer are the same."""
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
    """Layers of float32, quantized one by one until so many bytes are stored; and the bytes."""
    model, total = nn.Sequential(), 0
    while total < stored:
        layer, size = KINDS[kind].converted(nn.Linear(side, side, bias=False))
        model.append(layer)
        total += size
    return model, total


def loaded(path: Path, side: int) -> tuple[nn.Sequential, int]:
    """The model of a file, and the bytes of its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    model = fewbits.load(path, into=_float_model(side, len(names)))
    return model, stored_bytes(model)


def stored_bytes(model: nn.Module) -> int:
    """What a state dict of the model holds, a layer at a time: the canonical form, whatever is in memory."""
    return sum(t.numel() * t.element_size() for layer in model.children() for t in layer.state_dict().values())


def run(model: nn.Module, side: int, rows: Sequence[int] = ROWS) -> None:
    """One forward for each of these numbers of rows."""
    with torch.inference_mode():
        for count in rows:
            model(torch.randn(count, side))


def measure(
    kind: str, side: int, stored: int, files: Sequence[Path] = (), rows: Sequence[int] = ROWS
) -> dict[str, int]:
    """What is stored, and what resident memory has risen by; in this process.

    Args:
        kind: one of `KINDS`.
        side: outputs and inputs of each layer.
        stored: bytes to be stored at least.
        files: of a small model and of the one to be measured, if they are to be loaded.
        rows: of the inputs of each forward.
    """
    run(loaded(files[0], SMALL)[0] if files else converted(kind, SMALL, 1)[0], SMALL, rows)
    gc.collect()
    before = resident()
    model, size = loaded(files[1], side) if files else converted(kind, side, stored)
    run(model, side, rows)
    gc.collect()
    rise = {name: pages - before[name] for name, pages in resident().items()}
    return {"layers": len(model), "stored": size, **rise, "resident": sum(rise.values())}


def main(argv: Sequence[str]) -> None:
    """Measure or write, as `benchmarks.memory` asks; what was measured is printed as JSON."""
    what, kind, side, stored, forwards, *files = argv
    if what == "write":
        write(kind, SMALL, 1, Path(files[0]))
        write(kind, int(side), int(stored), Path(files[1]))
    else:
        rows = ROWS[-int(forwards) :]
        print(json.dumps(measure(kind, int(side), int(stored), [Path(file) for file in files], rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
