"""`Checkpoint`: a fewbits file, opened and checked."""

from __future__ import annotations

import os
from typing import Literal

from fewbits.checkpoint.metadata import Metadata, part_name
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import Value, check_digests, wrong_digests
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, part_shapes

Check = Literal["digests", "header"]


class Checkpoint:
    """A file that fewbits wrote, opened. Structure is checked at once, digests when asked.

    Args:
        path: the file.
        serializer: reads it; None stands for safetensors.

    Raises:
        FormatError: if it is not a fewbits file, or its parts contradict one another.
        DigestError: if its header is not the one that was written.
        CheckpointError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], serializer: Serializer | None = None) -> None:
        self.path = path
        self._reader = (serializer or SafetensorsSerializer()).reader(path)
        self.metadata = Metadata.from_strings(self._reader.metadata, self._reader.entries, path)
        self.ledger = self.metadata.ledger

    def value(self, name: str) -> Value:
        """The stored form of one tensor of the source, by its name there; it aliases the mapped file."""
        row = self.ledger[self.ledger[name].holder]
        if isinstance(row.spec, QuantSpec) and row.layout is not None:
            names = part_shapes(row.layout, row.spec, row.dtype)
            parts = {part: self._reader.read(part_name(row.name, part)) for part in names}
            return QuantizedTensor.from_parts(parts, spec=row.spec, layout=row.layout, dtype=row.dtype)
        return self._reader.read(row.name)

    def damaged(self) -> list[str]:
        """The names, in the file, of all tensors whose bytes do not have their digest."""
        return list(wrong_digests(self._reader, self.metadata.digests))

    def check(self, check: Check) -> None:
        """Check every digest, or, with ``"header"``, nothing more than was checked on opening.

        Raises:
            DigestError: naming the damaged tensors.
            ArgumentError: for another value of `check`.
        """
        if check not in ("digests", "header"):
            raise ArgumentError(f"check must be 'digests' or 'header', not {check!r}")
        if check == "digests":
            check_digests(self._reader, self.metadata.digests, self.path)

    def values(self) -> dict[str, Value]:
        """The stored form of every tensor of the source; tied names share one object."""
        stored = {row.name: self.value(row.name) for row in self.ledger.stored}
        return {row.name: stored[row.holder] for row in self.ledger}
