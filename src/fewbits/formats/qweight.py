"""`QweightCheckpoint`: what the readers of GPTQ and AWQ have in common.

Both formats replace ``weight``, (outputs, inputs), of a Linear layer by these tensors:

===========  ====================================================================
``qweight``  int32: the codes, packed; the transposed weight
``qzeros``   int32: one zero point for each scale, packed
``scales``   floating, (groups, outputs)
``g_idx``    GPTQ only: integer, (inputs,): the group of each input
===========  ====================================================================

A code ``q`` decodes to ``(q - zero_point) * scale``.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NoReturn

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.formats.base import ForeignCheckpoint, checked, kept_row, quantized_row
from fewbits.formats.foreign_files import foreign_files, foreign_tensors, open_tensors, read_dtype
from fewbits.formats.qweight_settings import SETTINGS_FILES, Settings
from fewbits.formats.settings import read_settings
from fewbits.numerics.dtypes import FLOAT_DTYPES, compute_dtype, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import unpack
from fewbits.numerics.params import QuantParams
from fewbits.numerics.parts import pack_params
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, narrow
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: Last name components of tensors that mean nothing on their own.
_PARTS = ("qweight", "qzeros", "g_idx")


@attrs.frozen(eq=False)
class Packed:
    """The tensors of one weight.

    Attributes:
        prefix: how their names begin.
        bits: bits per code.
        inputs: the number of columns of the weight.
        outputs: the number of rows of the weight.
        width: the number of columns that share a scale.
        groups: the group of each column, (inputs,), int64; None if the columns are in the order of the groups.
    """

    prefix: str
    bits: int
    inputs: int
    outputs: int
    width: int
    groups: Tensor | None


class QweightCheckpoint(ForeignCheckpoint):
    """A checkpoint of GPTQ or AWQ.

    Args:
        path: the file, the directory, or the index in it.

    Attributes:
        method: the name of the format in settings.
        versions: the variants that can be read; the first is the default.
        settings: the settings.
        tensors: the tensors in the files.

    Raises:
        FormatError: if the tensors of a weight contradict each other or the settings, or fewbits does not read them.
        CheckpointError: if the checkpoint cannot be opened.
    """

    method: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        files = foreign_files(path)
        self.tensors = open_tensors(files)
        fields = read_settings(files, SETTINGS_FILES)
        self.settings = Settings.read(fields)
        if fields is not None and self.settings.version not in (None, *self.versions):
            fields.refuse("version", f"is {self.settings.version!r}; fewbits reads {', '.join(self.versions)}")
        self._dtype = read_dtype(files)
        self._weights: dict[str, Packed] = {}
        rows = [self._weight_row(prefix) for prefix in prefixes(self.tensors.entries)]
        self.ledger = Ledger(sorted([*rows, *self._kept_rows()], key=lambda row: row.name))
        self.of_linear = self._weights.keys()
        self.about = (f"read as {self.format}: {len(rows):,} weights",)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell whether a checkpoint has the tensors of the format, and no settings of another tool."""
        opened = foreign_tensors(path)
        found = [] if opened is None else prefixes(opened[1].entries)
        if opened is None or not found:
            return False
        fields = read_settings(opened[0], SETTINGS_FILES)
        method = None if fields is None else fields.get("quant_method", str)
        if method is not None:
            return str(method).lower() == cls.method
        entries = [opened[1].entries.get(f"{found[0]}{part}") for part in ("qweight", "scales")]
        widths = [entry.shape[1] for entry in entries if entry is not None and len(entry.shape) == 2]
        return len(widths) == 2 and cls.has_words(widths[0], widths[1])

    @classmethod
    @abstractmethod
    def has_words(cls, words: int, outputs: int) -> bool:
        """Tell the format from the number of words in a row of ``qweight``."""

    @abstractmethod
    def describe(self, prefix: str) -> tuple[int, int]:
        """Return bits per code and number of inputs of a weight, after its shapes were checked."""

    @abstractmethod
    def codes(self, weight: Packed) -> Tensor:
        """Read the codes of a weight, packed as in `fewbits.numerics.packing`: int32, (outputs, words)."""

    @abstractmethod
    def zero_points(self, weight: Packed) -> Tensor:
        """Read the zero points of a weight: uint8, (groups, outputs)."""

    def groups(self, prefix: str, width: int, shape: tuple[int, int]) -> Tensor | None:
        """Return the group of each input, if they are not in the order of the groups; see `Packed.groups`.

        Args:
            prefix: how the names of the weight's tensors begin.
            width: the number of inputs that share a scale.
            shape: the numbers of groups and inputs.
        """
        return None

    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if a scale or a zero point is invalid.
        """
        weight, row = self._weights.get(name), self.ledger[name]
        if weight is None:
            return self.tensors.read_whole(name)
        scale = self.tensors.read_whole(f"{weight.prefix}scales").T.contiguous()
        zeros, codes = self.zero_points(weight).T, self.codes(weight)
        if weight.groups is not None:
            return _dequantized(row, weight, codes, scale, zeros)
        spec = self._spec(weight)
        params = QuantParams(scale, None if spec.symmetric else zeros.int() + spec.code_min)
        if spec.symmetric:
            self._check_middle(weight, zeros)
        layout = Layout.of((weight.outputs, weight.inputs))
        value = QuantizedTensor(codes, spec=spec, layout=layout, dtype=row.dtype, **pack_params(params, spec))
        return checked(name, value)

    def entry(self, prefix: str, part: str) -> Entry:
        """Return shape and dtype of a tensor of a weight, which must have two axes."""
        name = f"{prefix}{part}"
        entry = self.tensors.entries.get(name)
        if entry is None:
            raise FormatError(f"{prefix}qweight has no {name} beside it; fetch all files of the checkpoint")
        dtypes = FLOAT_DTYPES if part == "scales" else (torch.int32,)
        if len(entry.shape) != 2 or not entry.numel or entry.dtype not in dtypes:
            kinds = ", ".join(map(dtype_name, dtypes))
            raise FormatError(f"{described(name, entry)} cannot be read: it must be a matrix of {kinds}, and not empty")
        return entry

    def refuse(self, prefix: str, part: str, expected: str) -> NoReturn:
        """Raise an error about a tensor whose shape contradicts the others."""
        name = f"{prefix}{part}"
        scales = described(f"{prefix}scales", self.tensors.entries[f"{prefix}scales"])
        raise FormatError(
            f"{described(name, self.tensors.entries[name])} does not fit {scales}: {self.format} needs {expected}"
        )

    def _weight_row(self, prefix: str) -> LedgerRow:
        name = f"{prefix}weight"
        if name in self.tensors.entries:
            raise FormatError(f"{name} is stored twice, under its own name and as {prefix}qweight")
        groups, outputs = self.entry(prefix, "scales").shape
        bits, inputs = self.describe(prefix)
        width = self._width(prefix, groups, inputs)
        weight = Packed(prefix, bits, inputs, outputs, width, self.groups(prefix, width, (groups, inputs)))
        self._weights[name] = weight
        dtype = self._dtype or self.entry(prefix, "scales").dtype
        if weight.groups is not None:
            reason = "dequantized, because its columns are in another order (g_idx)"
            return kept_row(name, Entry((outputs, inputs), dtype), reason)
        reason = f"quantized in the format {self.format}"
        return quantized_row(name, Layout.of((outputs, inputs)), self._spec(weight), dtype, reason)

    def _spec(self, weight: Packed) -> QuantSpec:
        # GPTQ feeds errors forward, and AWQ clips weights, so codes may not be the nearest ones.
        size = None if weight.width == weight.inputs else weight.width
        return QuantSpec(
            weight.bits,
            "channel" if size is None else "group",
            size,
            symmetric=self.settings.symmetric,
            scale_dtype=self.entry(weight.prefix, "scales").dtype,
            rounding="free",
        )

    def _width(self, prefix: str, groups: int, inputs: int) -> int:
        size = self.settings.group_size
        if size is None:
            size = inputs if groups == 1 else inputs // groups
            if inputs % groups:
                self.refuse(prefix, "qweight", f"a group_size in the settings for {inputs} inputs in {groups} groups")
        width = inputs if size == -1 else min(size, inputs)
        if width < 1 or -(-inputs // width) != groups:
            self.refuse(prefix, "qweight", f"groups of {size} (group_size of the settings) for its {inputs} inputs")
        return width

    def _check_middle(self, weight: Packed, zeros: Tensor) -> None:
        low, high = map(int, torch.aminmax(zeros))
        middle = 1 << (weight.bits - 1)
        if (low, high) != (middle, middle):
            raise FormatError(
                f"{weight.prefix}qzeros has zero points from {low} to {high}, but the settings say sym: true, which "
                f"means {middle}; correct sym, or the version of the format ({self.settings.version})"
            )

    def _kept_rows(self) -> list[LedgerRow]:
        parts = {f"{weight.prefix}{part}" for weight in self._weights.values() for part in (*_PARTS, "scales")}
        others = {name: entry for name, entry in self.tensors.entries.items() if name not in parts}
        if lost := [name for name in others if name.rpartition(".")[2] in _PARTS]:
            raise FormatError(f"{', '.join(lost)} is a part of a weight whose codes are missing; fetch all files")
        return [kept_row(name, entry) for name, entry in others.items()]


def prefixes(entries: Mapping[str, Entry]) -> list[str]:
    """Return how the names of the tensors of each weight begin: with the name of the layer and a dot."""
    return [name.removesuffix("qweight") for name in entries if name.rpartition(".")[2] == "qweight"]


def described(name: str, entry: Entry) -> str:
    """Return name, dtype and shape of a tensor, for messages."""
    return f"{name} ({dtype_name(entry.dtype)}, shape {entry.shape})"


def _dequantized(row: LedgerRow, weight: Packed, codes: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Decode a weight whose columns are in any order."""
    dtype = compute_dtype(scale.dtype)
    steps = unpack(codes, weight.bits, weight.inputs).to(dtype) - zeros[:, weight.groups].to(dtype)
    values = steps * scale[:, weight.groups].to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise FormatError(f"{weight.prefix}scales: a scale is NaN or Inf; fetch the file again")
    return narrow(values, row.dtype)
