"""The formats that `fewbits.convert` reads and writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fewbits.checkpoint.reading import Checkpoint
from fewbits.formats.base import Exporter, ForeignCheckpoint, Readable
from fewbits.formats.fewbits_format import FewbitsFormat

#: Formats that can be written, by name.
EXPORTERS: Mapping[str, type[Exporter]] = {exporter.name: exporter for exporter in (FewbitsFormat,)}

#: Formats of other tools that can be read; the first that recognizes a checkpoint is taken.
FOREIGN: tuple[type[ForeignCheckpoint], ...] = ()


def open_quantized(path: str | os.PathLike[str]) -> Readable:
    """Open a quantized checkpoint of any known format. Only headers are read.

    Raises:
        FormatError: if the checkpoint has no known format, or is malformed.
        DigestError: if a header of a fewbits checkpoint is damaged.
        CheckpointError: if the files cannot be opened.
    """
    for reader in FOREIGN:
        if reader.recognizes(Path(path)):
            return reader(path)  # type: ignore[call-arg]
    return Checkpoint(path)
