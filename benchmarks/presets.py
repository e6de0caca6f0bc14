"""Named sets of cases for `benchmarks.linear`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import attrs
import torch

from benchmarks import ours
from benchmarks.contender import short

GROUP_SIZE = 128
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@attrs.frozen
class Case:
    outputs: int
    inputs: int
    group_size: int = GROUP_SIZE

    @property
    def shape(self) -> str:
        return f"{self.outputs}x{self.inputs}"

    def __str__(self) -> str:
        return f"{self.shape} g{self.group_size}"


@attrs.frozen
class Preset:
    about: str
    cases: Sequence[Case] = (Case(4096, 4096),)
    rows: Sequence[int] = (1, 4, 32, 256)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    dense: Sequence[torch.dtype] = ()
    schemes: Sequence[str] = ours.USUAL
    peers: bool = False

    def floats(self) -> list[torch.dtype]:
        return list(dict.fromkeys([torch.float32, *self.dtypes, *self.dense]))


ODD_SHAPES = (
    Case(4096, 4096, 32),
    Case(4096, 4096, 64),
    Case(4096, 4096, 256),
    Case(4095, 4097),
    Case(4096, 4160),
    Case(576, 1536),
    Case(1536, 576),
    Case(1536, 576, 64),
)

PRESETS: Mapping[str, Preset] = {
    "table": Preset("the table of the results page", dense=FLOATS, peers=True),
    "cliffs": Preset("rows between those of the table", rows=(2, 8, 16, 24, 64, 128, 1024), schemes=("int8", "int4")),
    "schemes": Preset("every scheme, in its own groups", schemes=ours.ALL),
    "dtypes": Preset("inputs in bfloat16 and float16", dtypes=FLOATS, schemes=("int8", "int4"), peers=True),
    "shapes": Preset("shapes and groups that kernels refuse", ODD_SHAPES, rows=(1, 32, 256), schemes=("int8", "int4")),
}


def resolved(arguments: argparse.Namespace) -> Preset:
    preset = PRESETS[arguments.preset]
    given = {
        "cases": _cases(arguments, preset),
        "rows": arguments.rows,
        "dtypes": arguments.dtype,
        "schemes": arguments.scheme,
        "peers": arguments.peers,
    }
    return attrs.evolve(preset, **{key: value for key, value in given.items() if value is not None})


def _cases(arguments: argparse.Namespace, preset: Preset) -> list[Case] | None:
    if arguments.shape is None and arguments.group_size is None:
        return None
    shapes = arguments.shape or list(dict.fromkeys((case.outputs, case.inputs) for case in preset.cases))
    groups = arguments.group_size or [GROUP_SIZE]
    return [Case(*shape, group) for shape in shapes for group in groups]


def shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not OUTPUTSxINPUTS")
    return int(parts[0]), int(parts[1])


def scheme(text: str) -> str:
    if text not in ours.SCHEMES:
        raise argparse.ArgumentTypeError(f"unknown scheme {text}; the schemes are {', '.join(ours.SCHEMES)}")
    return text


def listing() -> str:
    return "presets:\n" + "\n".join(
        f"  {name:8} {p.about}: {', '.join(map(str, p.cases))}; rows {', '.join(map(str, p.rows))}; "
        f"{', '.join(short(d) for d in p.dtypes)}"
        for name, p in PRESETS.items()
    )
