"""`MLXFormat`: writes directories for MLX, where a weight is ``scale * code + bias`` with unsigned codes.

==========  ===============================================================================
``weight``  uint32, (rows, words): packed unsigned codes, the lowest bits first
``scales``  floating, (rows, groups): a scale for each group of 32, 64 or 128 columns
``biases``  like ``scales``: the number that code 0 decodes to
==========  ===============================================================================
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.folder import ShardedReader, find_files, read_json
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.formats.base import Described, Readable
from fewbits.formats.compressed_rules import WEIGHT, class_obstacles, holds_scales, unequal_experts
from fewbits.formats.compressed_scheme import coded
from fewbits.formats.model_config import config_beside, read_vocabularies
from fewbits.formats.settings import CONFIG_FILE, QUANTIZATION_KEYS
from fewbits.formats.tensor_files import TensorFilesExporter
from fewbits.numerics.affine import lowest_values
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import packed_words
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: The key of the settings in ``config.json``.
_KEY = "quantization"

#: The group sizes that MLX has, in the order in which they are tried.
_GROUP_SIZES = (128, 64, 32)


class MLXFormat(TensorFilesExporter):
    """The format of MLX and mlx-lm: symmetric codes of 4 and 8 bits.

    With `allow`, all other weights are stored as floats.
    """

    name = "mlx"
    written_as = "mlx"

    def obstacles(self, source: Described) -> dict[str, str]:
        """Explain which weights cannot keep their codes, and whether there is no model."""
        config = config_beside(source.path)
        known = config is not None and read_vocabularies(config) is not None
        missing = {} if known else {CONFIG_FILE: "of a transformers model is not beside the weights"}
        return missing | _obstacles(source.ledger) | unequal_experts(source.ledger)

    def exported(self, source: Described) -> Ledger:
        """Return the ledger with the schemes of the result."""
        floats = _obstacles(source.ledger)
        return Ledger(_exported(row, as_floats=row.name in floats) for row in source.ledger)

    def entries(self, row: LedgerRow) -> Mapping[str, Entry]:
        """Describe the tensors that hold a weight of the result."""
        return _entries(row)

    def tensors(self, row: LedgerRow, value: Value) -> Mapping[str, Tensor]:
        """Return the tensors that hold a weight of the result."""
        return _tensors(row, value)

    def open(self, target: Path) -> Readable:
        """Open a result."""
        return MLXCheckpoint(target)

    def config(self, source: Described) -> Mapping[str, Any]:
        """Return the settings for MLX, under both names that mlx-lm writes."""
        sizes = {row.name: (spec.group_size, spec.bits) for row, spec in coded(self.exported(source))}
        if not sizes:
            return {}
        (group_size, bits), _ = Counter(sizes.values()).most_common(1)[0]
        others = {
            name.removesuffix(WEIGHT): {"group_size": size, "bits": width}
            for name, (size, width) in sizes.items()
            if (size, width) != (group_size, bits)
        }
        settings = {"group_size": group_size, "bits": bits, **others}
        return {_KEY: settings, QUANTIZATION_KEYS[0]: settings}


class MLXCheckpoint:
    """A directory that `MLXFormat` wrote.

    Attributes:
        path: the directory.
        ledger: every tensor; weights have their names before quantization.

    Raises:
        FormatError: if it has no settings of MLX.
        CheckpointError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        files = find_files(Path(path), (SafetensorsSerializer.suffix,))
        self._tensors = ShardedReader(files, {file.name: SafetensorsSerializer().reader(file) for file in files.paths})
        config = Path(path) / CONFIG_FILE
        settings = read_json(config).get(_KEY, {}) if config.is_file() else {}
        entries = self._tensors.entries
        modules = {name.removesuffix(WEIGHT) for name, entry in entries.items() if entry.dtype == torch.uint32}
        parts = {f"{module}.{part}" for module in modules for part in ("scales", "biases")}
        self.ledger = Ledger(self._row(name, settings) for name in entries if name not in parts)

    def _row(self, name: str, settings: Mapping[str, Any]) -> LedgerRow:
        entry, module = self._tensors.entries[name], name.removesuffix(WEIGHT)
        scales = self._tensors.entries.get(f"{module}.scales")
        if scales is None:
            return LedgerRow(name, entry.shape, entry.dtype, "kept", "not quantized", entry.nbytes, entry.nbytes)
        own = settings.get(module, settings)
        bits, group_size = own.get("bits"), own.get("group_size")
        if bits not in (4, 8) or group_size not in _GROUP_SIZES:
            raise FormatError(f"{self.path}: {_KEY} in config.json does not describe {name}: {own!r:.100}")
        shape = (scales.shape[0], scales.shape[1] * group_size)
        spec = QuantSpec(bits, "group", group_size, scale_dtype=scales.dtype, rounding="free")
        nbytes = Entry(shape, scales.dtype).nbytes
        reason = "quantized in the format of MLX"
        return LedgerRow(
            name, shape, scales.dtype, "quantized", reason, nbytes, entry.nbytes, spec=spec, layout=Layout.of(shape)
        )

    def value(self, name: str) -> Value:
        """Return one tensor in its stored form.

        Raises:
            FormatError: if the codes are not symmetric.
        """
        row, module = self.ledger[name], name.removesuffix(WEIGHT)
        tensor = self._tensors.read_whole(name)
        if not isinstance(row.spec, QuantSpec) or row.layout is None:
            return tensor
        scale, bias = (self._tensors.read_whole(f"{module}.{part}") for part in ("scales", "biases"))
        if not same_bits(bias, lowest_values(scale, row.spec)):
            raise FormatError(f"{self.path}: {module}.biases are not those of symmetric codes")
        return QuantizedTensor(tensor.view(torch.int32), scale, None, spec=row.spec, layout=row.layout, dtype=row.dtype)


def _obstacles(ledger: Ledger) -> dict[str, str]:
    found = ((row.name, _codes_obstacle(row, spec)) for row, spec in coded(ledger))
    reasons = {name: reason for name, reason in found if reason is not None} | class_obstacles(ledger)
    return {name: f"{reason} (with --allow it is stored as floats)" for name, reason in reasons.items()}


def _codes_obstacle(row: LedgerRow, spec: QuantSpec) -> str | None:
    if spec.levels is not None or spec.bits not in (4, 8):
        return f"is {spec}; MLX takes integers of 4 or 8 bits"
    if not spec.symmetric:
        return "has zero points, whose products with the scales MLX would round"
    if spec.scale_bits is not None:
        return "has two levels of scales (scale_bits); MLX has one level only"
    if spec.activations is not None:
        return "quantizes its inputs too, which MLX does not"
    if _group_size(row, spec) is None:
        size = "" if spec.group_size is None else f" and groups of {spec.group_size}"
        return f"has rows of {row.shape[-1]}{size}, which groups of 32 do not divide"
    if spec.for_dtype(row.dtype).scale_dtype not in FLOAT_DTYPES and not holds_scales(row.dtype, spec):
        return f"has scales that are powers of two, which {dtype_name(row.dtype)} does not hold"
    return None


def _group_size(row: LedgerRow, spec: QuantSpec) -> int | None:
    """Return the largest group size of MLX that divides the groups of a weight; None if there is none."""
    width, columns = spec.group_size or row.shape[-1], row.shape[-1]
    return next((size for size in _GROUP_SIZES if width % size == 0 and columns % size == 0), None)


def _exported(row: LedgerRow, *, as_floats: bool) -> LedgerRow:
    if not isinstance(row.spec, QuantSpec):
        return row
    if as_floats:
        return attrs.evolve(row, fate="kept", spec=None, layout=None)
    dtype = row.dtype if holds_scales(row.dtype, row.spec) else row.spec.scale_dtype
    spec = attrs.evolve(row.spec, granularity="group", group_size=_group_size(row, row.spec), scale_dtype=dtype)
    return attrs.evolve(row, spec=spec)


def _entries(row: LedgerRow) -> dict[str, Entry]:
    if not isinstance(row.spec, QuantSpec):
        return CODEC.entries(row)
    rows, columns = row.shape
    module = row.name.removesuffix(WEIGHT)
    scales = Entry(row.spec.scale_shape(rows, columns), row.spec.scale_dtype or row.dtype)
    codes = Entry((rows, packed_words(columns, row.spec.bits)), torch.uint32)
    return {row.name: codes, f"{module}.scales": scales, f"{module}.biases": scales}


def _tensors(row: LedgerRow, value: Value) -> dict[str, Tensor]:
    if not isinstance(value, QuantizedTensor):
        return {row.name: value}
    if not isinstance(row.spec, QuantSpec):
        return {row.name: value.dequantize(row.dtype)}
    rows, columns = row.shape
    module, size = row.name.removesuffix(WEIGHT), row.spec.width(columns)
    # Groups of MLX divide those of the weight, and share their scales.
    groups = torch.arange(0, columns, size) // value.spec.width(columns)
    scale = value.scale.reshape(-1, value.spec.groups(columns)).expand(rows, -1)[:, groups]
    scale = scale.to(row.spec.scale_dtype or row.dtype).contiguous()
    biases = lowest_values(scale, row.spec)
    return {row.name: value.packed.view(torch.uint32), f"{module}.scales": scale, f"{module}.biases": biases}
