"""`CompressedCheckpoint`: reads a checkpoint of compressed-tensors for `fewbits.load` and `fewbits.convert`."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import torch

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.serializer import Entry
from fewbits.formats.base import ForeignCheckpoint, checked, kept_row, quantized_row
from fewbits.formats.compressed_config import QUANT_METHOD
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.compressed_weight import codes_names
from fewbits.formats.foreign_files import foreign_tensors
from fewbits.formats.settings import read_settings
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


class CompressedCheckpoint(ForeignCheckpoint):
    """A checkpoint of compressed-tensors in which every tensor can be read.

    A weight whose columns are in another order (``g_idx``) is dequantized, with its columns in the original order.
    Scales and zero points of activations are left out; an event (`tensors_left_out`) names them.

    Args:
        path: the file, the directory, or the index in it.

    Raises:
        FormatError: if a tensor cannot be read (the message names all of them), or the config names transforms.
        CheckpointError: if the checkpoint cannot be opened.
    """

    format = QUANT_METHOD

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._files = CompressedTensors(path)
        self._files.refuse_unreadable()
        self.about = self._files.about
        self.ledger = Ledger(map(self._row, self._files.ledger))

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell whether a checkpoint has weights of compressed-tensors, or a config that names the format."""
        if (opened := foreign_tensors(path)) is None:
            return False
        files, tensors = opened
        if codes_names(tensors.entries):
            return True
        settings = read_settings(files)
        return settings is not None and settings.values.get("quant_method") == QUANT_METHOD

    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if a scale, a code or a zero point is invalid.
        """
        stored = self._files.ledger[name]
        value, order = self._files.chunk(Chunk.whole(stored)), self._files.order(stored)
        if not isinstance(value, QuantizedTensor):
            return value
        value = checked(name, attrs.evolve(value, spec=_free(value.spec)))
        return value if order is None else value.dequantize()[..., torch.argsort(order)]

    def _row(self, row: LedgerRow) -> LedgerRow:
        if not isinstance(row.spec, QuantSpec) or row.layout is None:
            return row
        if self._files.order(row) is not None:
            reason = "dequantized, because its columns are in another order (g_idx)"
            return kept_row(row.name, Entry(row.shape, row.dtype), reason)
        return quantized_row(row.name, row.layout, _free(row.spec), row.dtype, row.reason)


def _free(spec: QuantSpec) -> QuantSpec:
    """Return a spec that does not promise the nearest code: the tool may have clipped weights or fed errors forward."""
    return attrs.evolve(spec, rounding="free")
