"""What an interrupted run of fewbits has left behind, for the benchmarks that interrupt it.

It lies in a hidden directory beside the result, ``.fewbits-*.work``, with a journal for each file: a line of JSON for
each chunk of a tensor that has been written.
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
    """One conversion that will be interrupted.

    Attributes:
        source: the checkpoint.
        scheme: a name.
        options: of the command line, the same for every run.
        item: bytes of an element of each tensor that is stored, by name.
        total: bytes of all of them.
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
        """What can be told of it without reading a tensor."""
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
        """Of the command line."""
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
        """Bytes of the source that are done, as the journals beside an output say."""
        done: dict[str, int] = {}
        for line in _lines(output.parent):
            if line.get("tensor") in self.item:
                done[line["tensor"]] = max(done.get(line["tensor"], 0), line["stop"])
        return sum(stop * self.item[name] for name, stop in done.items())


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Of all journals of unfinished results in a directory; the line a process died in does not count."""
    for path in folder.glob(".fewbits-*.work/journal/*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)
