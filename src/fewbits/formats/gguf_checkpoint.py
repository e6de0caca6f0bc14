"""`GGUFCheckpoint`: reads the tensors of a GGUF file, as llama.cpp has it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.gguf_blocks import has_zero_points, read_blocks
from fewbits.formats.gguf_file import GGUFFile, StoredTensor, decode
from fewbits.formats.gguf_names import row_order, transformers_name
from fewbits.numerics.layout import Layout
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

_MAGIC = b"GGUF"

#: Rows whose scales are looked at together.
_ROWS = 64


class GGUFCheckpoint(ForeignCheckpoint):
    """A GGUF file of one part.

    Codes of Q4_0, Q5_0 and Q8_0 stay unchanged; those of Q4_1 and Q5_1 too, if every offset is a zero point, which is
    rare. To know that, the scales of such tensors are read on opening, up to the first offset that is none. Blocks of
    all other types are decoded to float32 by the ``gguf`` package.

    Names are those of transformers for the architectures in `fewbits.formats.gguf_names.RENAMED`, with rows of q and k
    in its order. Otherwise they are those in the file. The ledger counts decoded numbers as the bytes before.

    Args:
        path: the file.

    Attributes:
        file: the open file.

    Raises:
        FormatError: if it is malformed, has several parts, or has blocks that the package does not decode.
        CheckpointError: if it cannot be read.
        ArgumentError: if the package ``gguf`` is not installed.
    """

    format = "GGUF"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.file = GGUFFile(path)
        tensors = self.file.tensors.values()
        self._tensors = {transformers_name(self.file.architecture, tensor.name): tensor for tensor in tensors}
        if len(self._tensors) != len(tensors):
            raise FormatError(f"{path} has two tensors that transformers has under the same name")
        self._check_decoders()
        self.ledger = Ledger(self._row(name, tensor) for name, tensor in sorted(self._tensors.items()))
        types = Counter(tensor.type for tensor in tensors)
        self.about = (f"read as GGUF: {', '.join(f'{count} {type}' for type, count in types.items())}",)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell from the first bytes whether a file is a GGUF file."""
        with as_checkpoint_error(f"{path} cannot be read"):
            if not path.is_file():
                return False
            with open(path, "rb") as file:
                return file.read(len(_MAGIC)) == _MAGIC

    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if a scale is NaN or Inf.
        """
        row, tensor = self.ledger[name], self._tensors[name]
        order = None if not row.shape else row_order(self.file, tensor.name, row.shape[0])
        if row.fate == "quantized" and tensor.block_type is not None:
            data = tensor.read()
            data = data if order is None else data[order.argsort()]
            try:
                return read_blocks(tensor.block_type, data, row.shape)
            except FormatError as error:
                raise FormatError(f"{self.path}: {name}: {error}") from None
        numbers = tensor.decode()
        return numbers if order is None else numbers[order.argsort()]

    def _check_decoders(self) -> None:
        """Refuse types of blocks that the package cannot decode: it tries one row of each type."""
        for tensor in {tensor.type: tensor for tensor in self._tensors.values()}.values():
            if not tensor.is_plain:
                try:
                    decode(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.type)
                except FormatError as error:
                    raise FormatError(f"{self.path}: {tensor.name}: {error}") from None

    def _row(self, name: str, tensor: StoredTensor) -> LedgerRow:
        coded = _keeps_codes(tensor)
        row = LedgerRow(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            fate="quantized" if coded else "kept",
            reason=_reason(tensor, coded),
            bytes_before=Entry(tensor.shape, tensor.dtype).nbytes,
            bytes_after=0,
            spec=tensor.block_type.spec if coded and tensor.block_type else None,
            layout=Layout.of(tensor.shape) if coded else None,
        )
        return CODEC.sized(row)


def _keeps_codes(tensor: StoredTensor) -> bool:
    kind = tensor.block_type
    if kind is None or 0 in tensor.shape:
        return False
    if not kind.offset:
        return True
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    return all(has_zero_points(kind, torch.from_numpy(rows[i : i + _ROWS].copy())) for i in range(0, len(rows), _ROWS))


def _reason(tensor: StoredTensor, coded: bool) -> str:
    if coded:
        return f"{tensor.type} of GGUF"
    if tensor.is_plain:
        return "not quantized"
    offsets = ": its offsets are no zero points" if tensor.block_type else ""
    return f"{tensor.type} of GGUF, dequantized{offsets}"
