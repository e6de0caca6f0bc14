"""`CompressedTensors`: describes a checkpoint of compressed-tensors, and reads its weights in chunks.

Weights become `QuantizedTensor` values with codes packed as in `fewbits.numerics.packing`, so the decoder of fewbits'
own files decodes them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import CODEC, Value, part_name
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.formats.compressed_config import QUANT_METHOD, READABLE_FORMATS, CompressionConfig, read_config
from fewbits.formats.compressed_parts import WeightReader, column_order, stated_shape
from fewbits.formats.compressed_weight import COMPANIONS, CompressedWeight, codes_names, describe, parts_of
from fewbits.formats.foreign_files import foreign_files, open_tensors
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import Fate, LedgerRow

#: Last name components of tensors that belong to a layer's inputs and outputs, or to an attention cache.
_OF_ACTIVATIONS = {
    f"{owner}_{part}"
    for owner in ("input", "output", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale")
}  # fmt: skip

#: Last name components of tensors that mean nothing without the rest of their weight.
_OF_WEIGHTS = {f"weight_{part}" for part in ("packed", *COMPANIONS)}


class CompressedTensors:
    """A checkpoint of compressed-tensors: a file, or a directory of several files with its ``config.json``.

    Args:
        path: the file, the directory, or the index in it.
        originals: shape and dtype of the source's tensors, by name; None if there is no source to compare with.

    Attributes:
        path: the given path.
        tensors: the tensors in the files.
        ledger: every tensor that can be read; weights have their names before quantization.
        problems: the other tensors, by name: the fate that each would have had, and why it cannot be read or
            compared.
        unknown: tensors that are not part of a weight and not in the source.
        of_activations: scales and zero points of activations.
        weights: the readers of the weights in the ledger, by name.
        about: notes on how the checkpoint was read.

    Raises:
        FormatError: if it is not a compressed-tensors checkpoint, or its index or config is invalid.
        CheckpointError: if it cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        originals: Mapping[str, Entry] | None = None,
    ) -> None:
        files = foreign_files(path)
        self._path, self._originals, self._config = path, originals, read_config(files) or CompressionConfig()
        self.tensors = open_tensors(files)
        self._entries = self.tensors.entries
        self.problems: dict[str, tuple[Fate, str]] = {}
        self.weights: dict[str, WeightReader] = {}
        self.unknown: list[str] = []
        self.of_activations: list[str] = []
        rows, parts = self._weight_rows()
        rows += [row for name in self._entries if name not in parts and (row := self._kept_row(name)) is not None]
        self.ledger = Ledger(sorted(rows, key=lambda row: row.name))
        self.about = tuple(self._describe())

    def chunk(self, chunk: Chunk) -> Value:
        """Return a copy of a chunk of a tensor in its stored form. Columns of a weight are sorted by group.

        Args:
            chunk: a chunk of a row of this ledger.

        Raises:
            FormatError: if a code or zero point is invalid.
        """
        weight = self.weights.get(chunk.row.name)
        return CODEC.decode_chunk(chunk, self.tensors.read_chunk if weight is None else weight.read)

    def refuse_unreadable(self) -> None:
        """Refuse a checkpoint with parts that cannot be read, and tell which scales of activations are left out.

        Raises:
            FormatError: if a tensor cannot be read (the message names all of them), or if the config names transforms.
        """
        problems = [f"{name}: {problem}" for name, (_, problem) in self.problems.items()]
        problems += [f"{name} is a part of a weight whose codes are missing" for name in self.unknown]
        if self._config.transforms:
            problems.append("config.json names transforms, so the weights are not those of the original model")
        if problems:
            raise FormatError(f"{self._path} cannot be loaded: {'; '.join(problems)}")
        if self.of_activations:
            emit("warning", "tensors_left_out", file=str(self._path), tensors=self.of_activations)

    def order(self, row: LedgerRow) -> Tensor | None:
        """Return the column indices of a weight, sorted by group; None if the columns are in group order."""
        weight = self.weights.get(row.name)
        return None if weight is None else weight.order

    def in_order(self, row: LedgerRow, source: Tensor) -> Tensor:
        """Return a chunk of the source with its columns in the same order as those that `chunk` returns."""
        order = self.order(row)
        return source if order is None else source[..., order]

    def _weight_rows(self) -> tuple[list[LedgerRow], set[str]]:
        """Ledger rows of the readable weights, and the names of all tensors that are part of a weight."""
        rows: list[LedgerRow] = []
        parts: set[str] = set()
        for name, codes in codes_names(self._entries).items():
            parts.update(parts_of(name, codes, self._entries))
            try:
                rows.append(self._weight_row(name, codes))
            except FormatError as error:
                self.problems[name] = "quantized", str(error)
        return rows, parts

    def _weight_row(self, name: str, codes: str) -> LedgerRow:
        """The ledger row of a weight.

        Raises:
            FormatError: if the weight cannot be read or does not match the source.
        """
        if odd := sorted(self._config.formats - set(READABLE_FORMATS)):
            raise FormatError(f"{name}: config.json names the format {', '.join(odd)}, which fewbits does not read")
        if name.rpartition(".")[0] in self._config.ignore:
            raise FormatError(f"{name} is quantized, but config.json says that its module is not")
        shape = stated_shape(self.tensors, part_name(name, "shape"))
        weight = describe(name, codes, self._entries, shape, self._config)
        original = Entry(weight.layout.shape, self._entries[weight.part("scale")].dtype)
        if self._originals is not None:
            original = self._original(name, original)
        self.weights[name] = WeightReader(self.tensors, weight, column_order(self.tensors, weight))
        nbytes = sum(self._entries[part].nbytes for part in parts_of(name, codes, self._entries))
        return _row(name, original, nbytes, f"quantized in a format of {QUANT_METHOD}", weight)

    def _original(self, name: str, found: Entry) -> Entry:
        original = (self._originals or {}).get(name)
        if original is None:
            raise FormatError(f"{name} is in the result but not in the source")
        if original.shape != found.shape or original.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{name} has shape {found.shape}; in the source it is {dtype_name(original.dtype)} of shape "
                f"{original.shape}"
            )
        return original

    def _kept_row(self, name: str) -> LedgerRow | None:
        """The ledger row of a tensor that is not part of a weight; None if there is nothing to compare it with."""
        entry, last = self._entries[name], name.rpartition(".")[2]
        alone = self._originals is None
        original = entry if self._originals is None else self._originals.get(name)
        if last in _OF_ACTIVATIONS and (alone or original is None):
            self.of_activations.append(name)
        elif original is None or (alone and last in _OF_WEIGHTS):
            self.unknown.append(name)
        elif original.shape != entry.shape or not _is_cast(original.dtype, entry.dtype):
            self.problems[name] = (
                "kept",
                f"{dtype_name(entry.dtype)} of shape {entry.shape}; in the source it is "
                f"{dtype_name(original.dtype)} of shape {original.shape}",
            )
        else:
            return _row(name, original, entry.nbytes, "not quantized")
        return None

    def _describe(self) -> list[str]:
        about = [f"read as {QUANT_METHOD}: {len(self.weights):,} weights"]
        if self.weights and not self._config.schemes:
            schemes = sorted({reader.weight.scheme for reader in self.weights.values()})
            about.append(f"no config.json states the schemes; they were inferred from shapes: {', '.join(schemes)}")
        if not self._config.compressed:
            about.append(
                "config.json does not set quantization_status to compressed: other loaders may ignore the codes"
            )
        if self._config.transforms:
            about.append("config.json names transforms: weights were multiplied by matrices before quantization")
        return about


def _row(name: str, original: Entry, nbytes: int, reason: str, weight: CompressedWeight | None = None) -> LedgerRow:
    return LedgerRow(
        name=name,
        shape=original.shape,
        dtype=original.dtype,
        fate="kept" if weight is None else "quantized",
        reason=reason,
        bytes_before=original.nbytes,
        bytes_after=nbytes,
        spec=None if weight is None else weight.spec,
        layout=None if weight is None else weight.layout,
    )


def _is_cast(before: torch.dtype, after: torch.dtype) -> bool:
    return before == after or (before in FLOAT_DTYPES and after in FLOAT_DTYPES)
