"""The files of an interrupted run of fewbits, for the stress programs that interrupt runs.

They lie in a hidden directory beside the result, ``.fewbits-*.work``. A journal for each file has a line of JSON for
each written chunk of a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

import fewbits
from fewbits.checkpoint.chunks import CHUNK_ELEMENTS, chunk_elements


@attrs.frozen
class Job:
    """A conversion to interrupt.

    Attributes:
        source: the checkpoint.
        scheme: its name.
        options: of the command line, the same for every run.
        item: bytes of an element of each stored tensor, by name.
        total: bytes of all stored tensors.
        chunk: bytes of the largest chunk.
    """

    source: Path
    scheme: str
    options: tuple[str, ...]
    item: Mapping[str, int]
    total: int
    chunk: int

    @classmethod
    def of(cls, source: Path, scheme: str, *options: object) -> Job:
        """Plan the conversion without reading a tensor."""
        rows = fewbits.plan(source, scheme).ledger.stored
        return cls(
            source,
            scheme,
            tuple(map(str, options)),
            {row.name: row.dtype.itemsize for row in rows},
            sum(row.bytes_before for row in rows),
            max(chunk_elements(row, CHUNK_ELEMENTS) * row.dtype.itemsize for row in rows),
        )

    def arguments(self, output: Path, *more: str) -> list[str]:
        """Make the arguments of the command line."""
        return [
            "quantize",
            str(self.source),
            "-o",
            str(output),
            "--scheme",
            self.scheme,
            "--json",
            *self.options,
            *more,
        ]

    def recorded(self, output: Path) -> int:
        """Count the bytes of the source that the journals beside an output record as done."""
        done: dict[str, int] = {}
        for line in _lines(output.parent):
            if line.get("tensor") in self.item:
                done[line["tensor"]] = max(done.get(line["tensor"], 0), line["stop"])
        return sum(stop * self.item[name] for name, stop in done.items())


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the complete lines of all journals in a directory."""
    for path in folder.glob(".fewbits-*.work/journal/*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)
