"""`CompressedTensorsFormat`: writes directories for transformers, vLLM, SGLang, OpenVINO and other readers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.codec import CODEC, Value, part_name
from fewbits.checkpoint.serializer import Entry
from fewbits.formats.base import Described, Readable
from fewbits.formats.compressed_checkpoint import CompressedCheckpoint
from fewbits.formats.compressed_config import QUANT_METHOD
from fewbits.formats.compressed_export import quantization_config
from fewbits.formats.compressed_rules import holds_scales, server_obstacles, unholdable
from fewbits.formats.compressed_scheme import Scheme
from fewbits.formats.model_config import config_beside, read_vocabularies
from fewbits.formats.settings import CONFIG_FILE, QUANTIZATION_KEYS
from fewbits.formats.tensor_files import TensorFilesExporter
from fewbits.numerics.float8 import float8_dtype, float8_values
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

_FLOATS = "with --allow it is stored as floats"


class CompressedTensorsFormat(TensorFilesExporter):
    """The format of compressed-tensors: integer codes of 4 and 8 bits, packed, and FP8.

    With `allow`, weights that the format cannot hold as codes are stored as floats. All other weights keep their codes.
    """

    name = QUANT_METHOD
    written_as = "pt"

    def obstacles(self, source: Described) -> dict[str, str]:
        """Explain what transformers, or a server, would not read."""
        vocabularies = _vocabularies(source)
        missing = {} if vocabularies is not None else {CONFIG_FILE: "of a transformers model is not beside the weights"}
        floats = {name: f"{reason} ({_FLOATS})" for name, reason in unholdable(source.ledger).items()}
        return missing | floats | server_obstacles(self.exported(source), vocabularies or ())

    def exported(self, source: Described) -> Ledger:
        """Return the ledger with the schemes of the result."""
        floats = unholdable(source.ledger)
        return Ledger(_as_floats(row) if row.name in floats else _in_rows(row) for row in source.ledger)

    def entries(self, row: LedgerRow) -> Mapping[str, Entry]:
        """Describe the tensors that hold a weight of the result."""
        return _entries(row)

    def tensors(self, row: LedgerRow, value: Value) -> Mapping[str, Tensor]:
        """Return the tensors that hold a weight of the result."""
        return _tensors(row, value)

    def open(self, target: Path) -> Readable:
        """Open a result as a checkpoint of compressed-tensors."""
        return CompressedCheckpoint(target)

    def config(self, source: Described) -> Mapping[str, Any]:
        """Return the ``quantization_config`` of the result."""
        settings = quantization_config(self.exported(source), _vocabularies(source) or ())
        return {QUANTIZATION_KEYS[0]: settings} if settings else {}


def _vocabularies(source: Described) -> Collection[int] | None:
    config = config_beside(source.path)
    return None if config is None else read_vocabularies(config)


def _as_floats(row: LedgerRow) -> LedgerRow:
    """The row of a weight that is stored as floats."""
    return attrs.evolve(row, fate="kept", spec=None, layout=None)


def _in_rows(row: LedgerRow) -> LedgerRow:
    """The row of a weight with a scale for each row in place of one for the whole tensor, which vLLM does not read."""
    if not isinstance(row.spec, QuantSpec) or row.spec.granularity != "tensor":
        return row
    return attrs.evolve(row, spec=attrs.evolve(row.spec, granularity="channel"))


def _entries(row: LedgerRow) -> dict[str, Entry]:
    """Describe the tensors that hold a weight of the result."""
    entries = CODEC.entries(row)
    if not isinstance(row.spec, QuantSpec):
        return entries
    scale = part_name(row.name, "scale")
    entries[scale] = Entry(entries[scale].shape, _scale_dtype(row, row.spec))
    if Scheme.of(row.spec).format == "pack-quantized":
        return entries
    return {row.name: Entry(row.shape, float8_dtype(row.spec) or torch.int8), scale: entries[scale]}


def _tensors(row: LedgerRow, value: Value) -> dict[str, Tensor]:
    """Return the tensors that hold a weight of the result."""
    spec = row.spec
    if not isinstance(value, QuantizedTensor):
        return {row.name: value}
    if not isinstance(spec, QuantSpec):
        return {row.name: value.dequantize(row.dtype)}
    if value.spec.granularity == "tensor":
        value = _with_scale_for_each_row(value)
    scale = {part_name(row.name, "scale"): value.scale.to(_scale_dtype(row, spec))}
    if Scheme.of(spec).format == "pack-quantized":
        return {part_name(row.name, name): part for name, part in value.parts().items()} | scale
    codes = value.codes()
    return {row.name: codes if float8_dtype(spec) is None else float8_values(codes, spec)} | scale


def _with_scale_for_each_row(value: QuantizedTensor) -> QuantizedTensor:
    rows, params = value.layout.rows, value.params()
    zeros = None if params.zero_point is None else params.zero_point.reshape(1, 1).expand(rows, 1)
    in_rows = QuantParams(params.scale.reshape(1, 1).expand(rows, 1), zeros)
    spec = attrs.evolve(value.spec, granularity="channel")
    return QuantizedTensor.from_codes(value.codes(), in_rows, spec=spec, layout=value.layout, dtype=value.dtype)


def _scale_dtype(row: LedgerRow, spec: QuantSpec) -> torch.dtype:
    """The dtype of the weight, to which readers cast scales, if it holds the scales exactly; else their own dtype."""
    return row.dtype if holds_scales(row.dtype, spec) else spec.for_dtype(row.dtype).scale_dtype or row.dtype
