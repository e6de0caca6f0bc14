"""The formats that `fewbits.convert` reads and writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import FormatError
from fewbits.formats.awq import AWQ
from fewbits.formats.base import Exporter, ForeignCheckpoint
from fewbits.formats.block_fp8 import BlockFP8
from fewbits.formats.compressed_checkpoint import CompressedCheckpoint
from fewbits.formats.compressed_format import CompressedTensorsFormat
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.formats.gguf_checkpoint import GGUFCheckpoint
from fewbits.formats.gguf_export import GGUF
from fewbits.formats.gptq import GPTQ
from fewbits.formats.mlx import MLXFormat

#: Formats that can be written, by name.
EXPORTERS: Mapping[str, type[Exporter]] = {
    exporter.name: exporter for exporter in (FewbitsFormat, CompressedTensorsFormat, GGUF, MLXFormat)
}

#: Formats of other tools that can be read; the first that recognizes a checkpoint is taken.
FOREIGN: tuple[type[ForeignCheckpoint], ...] = (GGUFCheckpoint, BlockFP8, CompressedCheckpoint, GPTQ, AWQ)


def recognized(
    path: str | os.PathLike[str], serializer: Serializer | None = None
) -> Checkpoint | type[ForeignCheckpoint]:
    """Open a fewbits checkpoint, or find the reader for a checkpoint of another tool. Only headers are read.

    Args:
        path: the file, the directory of several files, or the index in it.
        serializer: reads a fewbits checkpoint. None means safetensors, and allows checkpoints of other tools.

    Raises:
        FormatError: if the checkpoint has no known format, or is malformed.
        DigestError: if a header of a fewbits checkpoint is damaged.
        CheckpointError: if the files cannot be opened.
    """
    # In this order, the headers of a fewbits checkpoint are read once.
    try:
        return Checkpoint(path, serializer)
    except FormatError:
        reader = next((reader for reader in FOREIGN if reader.recognizes(Path(path))), None)
        if reader is None or serializer is not None:
            raise
        return reader


def open_quantized(
    path: str | os.PathLike[str], serializer: Serializer | None = None
) -> Checkpoint | ForeignCheckpoint:
    """Open a quantized checkpoint of any known format; see `recognized`."""
    found = recognized(path, serializer)
    return found if isinstance(found, Checkpoint) else found(path)
