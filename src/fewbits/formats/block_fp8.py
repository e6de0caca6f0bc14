"""`BlockFP8`: reads FP8 weights with ``weight_scale_inv``, as DeepSeek-V3 and its successors store them."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.folder import file_beside
from fewbits.errors import FormatError, SourceError
from fewbits.formats.base import ForeignCheckpoint, checked, kept_row, quantized_row
from fewbits.formats.foreign_files import foreign_files, foreign_tensors, open_tensors
from fewbits.formats.fp8 import KNOWN_BLOCKS, SCALE_SUFFIXES, ScaledWeight, is_activation_scale, scaled_weights
from fewbits.formats.model_config import read_block_sizes
from fewbits.formats.settings import CONFIG_FILE
from fewbits.numerics.float8 import FLOAT8_DTYPES, float8_codes, float8_spec
from fewbits.numerics.layout import Layout, block_rows
from fewbits.numerics.packing import pack, packed_words
from fewbits.numerics.scaled import FP8_TARGET
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


class BlockFP8(ForeignCheckpoint):
    """A checkpoint with FP8 weights, each with one scale per block, per row or in all.

    Scales of activations are left out; an event (`tensors_left_out`) names them.

    Scales of blocks are repeated for each of their rows.

    Args:
        path: the file, the directory, or the index in it.

    Raises:
        FormatError: if scales do not fit their weight, or a weight has a dtype that fewbits does not read.
        CheckpointError: if the checkpoint cannot be opened.
    """

    format = "block FP8"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        files = foreign_files(path)
        self._tensors = open_tensors(files)
        config = file_beside(files, CONFIG_FILE)
        blocks = (() if config is None else read_block_sizes(config)) or KNOWN_BLOCKS
        try:
            self._weights = scaled_weights(self._tensors.entries, blocks)
        except SourceError as error:
            raise FormatError(f"{path}: {error}") from None
        self._scales = {weight.scale: weight.name for weight in self._weights.values()}
        left = sorted(name for name in self._tensors.entries if is_activation_scale(name))
        if left:
            emit("warning", "tensors_left_out", file=str(path), tensors=left)
        self.ledger = Ledger(self._row(name) for name in sorted(self._tensors.entries) if name not in left)
        self.about = (f"read as {self.format}: {len(self._weights):,} weights",)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell whether a checkpoint has an FP8 weight with ``_scale_inv`` beside it."""
        opened = foreign_tensors(path)
        entries = {} if opened is None else opened[1].entries
        scaled = (entries.get(name.removesuffix(SCALE_SUFFIXES[0])) for name in entries if SCALE_SUFFIXES[0] in name)
        return any(entry is not None and entry.dtype in FLOAT8_DTYPES for entry in scaled)

    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if a code or a scale is NaN or infinite.
        """
        weight, row = self._weights.get(name), self.ledger[name]
        if weight is None or row.layout is None or not isinstance(row.spec, QuantSpec):
            return self._tensors.read_whole(name)
        rows, columns = row.layout.matrix_shape
        scale = self._tensors.read_whole(weight.scale).reshape(-1)
        if row.spec.granularity != "tensor":  # each group has the scale of its first element
            starts = torch.arange(row.spec.groups(columns), device="cpu") * row.spec.width(columns)
            scale = scale[weight.grid.scale_of(torch.arange(rows, device="cpu")[:, None] * columns + starts)]
        value = QuantizedTensor(self._packed(name, rows, columns), scale, None, row.spec, row.layout, row.dtype)
        return checked(name, value)

    def _packed(self, name: str, rows: int, columns: int) -> Tensor:
        packed = torch.empty(rows, packed_words(columns, 8), dtype=torch.int32, device="cpu")
        step = block_rows(columns)  # intermediate results are several times as large as the codes
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            codes = float8_codes(self._tensors.read_chunk(name, start * columns, (stop - start, columns)))
            if codes is None:
                raise FormatError(f"{name} holds NaN or Inf; fetch the file again")
            pack(codes, 8, out=packed[start:stop])
        return packed

    def _row(self, name: str) -> LedgerRow:
        entry, weight = self._tensors.entries[name], self._weights.get(name)
        if (of := self._scales.get(name)) is not None:
            reason = f"scale of {of}"
            return LedgerRow(name, entry.shape, entry.dtype, "merged", reason, entry.nbytes, 0, merged_into=of)
        if weight is None:
            return kept_row(name, entry)
        if entry.dtype not in FLOAT8_DTYPES or not entry.numel:
            raise FormatError(
                f"{name} is {entry.in_words}, which fewbits cannot load as codes; it can quantize the checkpoint"
            )
        layout, reason = Layout.of(entry.shape), f"quantized in the format {self.format}"
        row = quantized_row(name, layout, _spec(weight, layout), FP8_TARGET, reason)
        return attrs.evolve(row, dequantized_from=entry.dtype, bytes_before=entry.nbytes)


def _spec(weight: ScaledWeight, layout: Layout) -> QuantSpec:
    dtype, scales = weight.entry.dtype, weight.scale_entry
    if scales.numel == 1:
        spec = float8_spec(dtype, "tensor", None, scales.dtype)
    elif weight.grid.block[1] >= layout.columns:
        spec = float8_spec(dtype, "channel", None, scales.dtype)
    else:
        spec = float8_spec(dtype, "group", weight.grid.block[1], scales.dtype)
    return spec
