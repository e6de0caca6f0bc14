"""Describe one weight of a compressed-tensors checkpoint: the tensors that hold it, and how it is quantized.

============================  =====================================================================================
``weight_packed``             int32, (rows, words): codes plus ``2**(bits-1)``, packed as in `fewbits.numerics.packing`
``weight_shape``              int64 or int32, (dimensions,): beside ``weight_packed``
``weight``                    instead of these two: int8, one code per byte, or float8
``weight_scale``              floating: (1,), (rows, 1), (rows, groups), or one for each block of rows and columns
``weight_zero_point``         asymmetric only: int32, packed along the rows, or int8 in the shape of the scales
``weight_g_idx``              integer, (columns,): the group of each column, if the columns are not in group order
============================  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
import torch

from fewbits.checkpoint.codec import part_name
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.formats.compressed_config import CompressionConfig, WeightScheme
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.float8 import FLOAT8_DTYPES, float8_spec
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import packed_words
from fewbits.numerics.spec import Granularity, QuantSpec

Form = Literal["packed", "bytes", "float8"]

#: Suffixes of the tensors that can accompany the codes of a weight.
COMPANIONS = ("scale", "zero_point", "shape", "g_idx", "global_scale")

_BITS = range(2, 9)


@attrs.frozen
class CompressedWeight:
    """How one weight is stored.

    Attributes:
        name: the name of the weight before quantization.
        codes: the name of the tensor that holds the codes.
        form: how that tensor stores the codes.
        spec: the quantization parameters that fit the tensors.
        layout: how the weight is divided into rows and columns.
        zero_point: how the zero points are stored; None if symmetric.
        block_rows: how many rows share a scale, if each scale covers a block.
        scheme: the scheme as text.
    """

    name: str
    codes: str
    form: Form
    spec: QuantSpec
    layout: Layout
    zero_point: Literal["packed", "bytes"] | None
    block_rows: int
    scheme: str

    def part(self, part: str) -> str:
        """Return the name of one of its tensors."""
        return part_name(self.name, part)


def codes_names(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Find the quantized weights among tensors: a mapping from each weight's name to the name of its codes."""
    found = {}
    for name, entry in entries.items():
        stem = name.removesuffix("_packed")
        if stem != name and part_name(stem, "scale") in entries:
            found[stem] = name
        elif entry.dtype in (torch.int8, *FLOAT8_DTYPES) and part_name(name, "scale") in entries:
            found.setdefault(name, name)
    return found


def describe(
    name: str, codes: str, entries: Mapping[str, Entry], shape: Sequence[int] | None, config: CompressionConfig
) -> CompressedWeight:
    """Describe how one weight is stored.

    Args:
        name: the name of the weight.
        codes: the name of the tensor with its codes.
        entries: every tensor of the checkpoint, by name.
        shape: the contents of ``weight_shape``; None if there is no such tensor.
        config: the settings in ``config.json``; without schemes in it, the shapes say how the weight is quantized.

    Raises:
        FormatError: if the tensors contradict each other or the config, or if fewbits does not read their format.
    """
    entry, scale = entries[codes], entries[part_name(name, "scale")]
    if codes != name and name in entries:
        raise FormatError(f"{name} is stored twice, under its own name and as {codes}")
    form = _form(name, codes, entry)
    if scale.dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name}_scale is {dtype_name(scale.dtype)}; fewbits does not read scales of that dtype")
    layout = _layout(name, form, entry, scale, shape)
    zero = entries.get(part_name(name, "zero_point"))
    reasons, fits = [], []
    for scheme in config.schemes or (None,):
        try:
            known = scheme or _inferred(form, entry, scale, layout, zero is not None)
            fits.append(_fit(known, form, entry, scale, layout, zero is not None))
        except FormatError as error:
            reasons.append(str(error))
    if not fits:
        problem = "does not match config.json" if config.schemes else "cannot be read"
        raise FormatError(f"{name} {problem}: {'; '.join(reasons)}")
    if form == "packed" and len({spec for spec, _ in fits}) > 1:
        raise FormatError(f"{name} fits several groups of config.json: {', '.join(str(spec) for spec, _ in fits)}")
    # One-byte codes decode to the same values under every scheme that fits. The widest scheme allows all of the codes.
    spec, block_rows = max(fits, key=lambda fit: fit[0].bits)
    return CompressedWeight(
        name=name,
        codes=codes,
        form=form,
        spec=spec,
        layout=layout,
        zero_point=None if spec.symmetric else _zero_point(name, zero, scale, spec, layout),
        block_rows=block_rows,
        scheme=_in_words(spec, entry, block_rows),
    )


def _form(name: str, codes: str, entry: Entry) -> Form:
    if len(entry.shape) < 2 or not entry.numel:
        raise FormatError(f"{codes} has shape {entry.shape}; codes must have rows and columns and not be empty")
    if codes == name:
        return "bytes" if entry.dtype == torch.int8 else "float8"
    if entry.dtype != torch.int32:
        raise FormatError(f"{codes} is {dtype_name(entry.dtype)}; packed codes must be int32")
    return "packed"


def _layout(name: str, form: Form, entry: Entry, scale: Entry, shape: Sequence[int] | None) -> Layout:
    if form != "packed":
        one_a_row = scale.shape == (entry.shape[0], *[1] * (len(entry.shape) - 1))
        return Layout.of(entry.shape, inputs=range(1, len(entry.shape)) if one_a_row else (-1,))
    if shape is None:
        raise FormatError(f"{name}_packed has no {name}_shape beside it, so its number of columns is unknown")
    if tuple(shape[:-1]) != entry.shape[:-1] or not 0 < shape[-1] < 1 << 40:
        raise FormatError(f"{name}_shape says {tuple(shape)}, but {name}_packed has shape {entry.shape}")
    return Layout.of(shape)


def _inferred(form: Form, entry: Entry, scale: Entry, layout: Layout, zero_points: bool) -> WeightScheme:
    """The only scheme that the shapes allow.

    Raises:
        FormatError: if they allow no scheme, or several.
    """
    (rows, columns), (found, groups) = layout.matrix_shape, _matrix_form(scale.shape)
    if (found, groups) != (1, 1) and (found != rows or not groups or columns % groups):
        raise FormatError(
            f"scales have shape {scale.shape} for {rows} rows of {columns} columns: the scheme needs a config.json"
        )
    words = entry.shape[-1]
    widths = [bits for bits in _BITS if packed_words(columns, bits) == words] if form == "packed" else [8]
    if len(widths) != 1:
        one_of = f"may be codes of {' or '.join(map(str, widths))} bits" if widths else "do not fit any codes"
        raise FormatError(f"{words} words for {columns} columns {one_of}")
    return WeightScheme(
        bits=widths[0],
        kind="float" if form == "float8" else "int",
        strategy="tensor" if (found, groups) == (1, 1) else "channel" if groups == 1 else "group",
        group_size=columns // groups,
        block=None,
        symmetric=not zero_points,
    )


def _fit(
    scheme: WeightScheme, form: Form, entry: Entry, scale: Entry, layout: Layout, zero_points: bool
) -> tuple[QuantSpec, int]:
    """The spec of a weight with this scheme, and how many rows share a scale.

    Raises:
        FormatError: if the tensors do not match the scheme.
    """
    rows, columns = layout.matrix_shape
    # The granularity of the codes, and the rows and columns that share a scale.
    strategies: dict[str, tuple[Granularity, int, int]] = {
        "tensor": ("tensor", rows, columns),
        "channel": ("channel", 1, columns),
        "group": ("group", 1, scheme.group_size or 1),
        "block": ("group", *(scheme.block or (1, 1))),
    }
    if scheme.strategy not in strategies:
        raise FormatError(f"{scheme}; fewbits does not read that strategy")
    granularity, height, width = strategies[scheme.strategy]
    of_blocks = scheme.strategy == "block"
    if _matrix_form(scale.shape) != (-(-rows // height), -(-columns // width)) or (
        of_blocks and len(layout.shape) != 2
    ):
        raise FormatError(f"{scheme}, but its scales have shape {scale.shape} for {rows} rows of {columns} columns")
    block_rows, group_size = height if of_blocks else 1, width if granularity == "group" else None
    if zero_points and (block_rows > 1 or form == "float8"):
        raise FormatError("fewbits does not read zero points of blocks or of float8 codes")
    if form == "float8":
        if (scheme.kind, scheme.bits) != ("float", 8):
            raise FormatError(f"{scheme}, but the codes are {dtype_name(entry.dtype)}")
        return float8_spec(entry.dtype, granularity, group_size, scale.dtype), block_rows
    if scheme.kind != "int" or scheme.bits not in _BITS:
        raise FormatError(f"{scheme}, but the codes are integers of 2 to 8 bits")
    if not scheme.symmetric and not zero_points:
        raise FormatError(f"{scheme}, but there are no zero points")
    if form == "packed" and packed_words(columns, scheme.bits) != entry.shape[-1]:
        raise FormatError(f"{scheme}, but {entry.shape[-1]} words for {columns} columns do not fit any such codes")
    spec = QuantSpec(
        scheme.bits, granularity, group_size=group_size, symmetric=scheme.symmetric, scale_dtype=scale.dtype
    )
    return spec, block_rows


def _matrix_form(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of scales as (rows, groups)."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def _zero_point(
    name: str, zero: Entry | None, scale: Entry, spec: QuantSpec, layout: Layout
) -> Literal["packed", "bytes"]:
    rows, groups = _matrix_form(scale.shape)
    if zero is not None and zero.dtype == torch.int8 and _matrix_form(zero.shape) == (rows, groups):
        return "bytes"
    packed = (packed_words(rows, spec.bits), groups)
    if zero is not None and zero.dtype == torch.int32 and _matrix_form(zero.shape) == packed and len(layout.shape) == 2:
        return "packed"
    raise FormatError(
        f"{name}_zero_point is {zero}; it must be int8 in the shape of the scales, or int32 of shape {packed}"
    )


def _in_words(spec: QuantSpec, entry: Entry, block_rows: int) -> str:
    if spec.levels is None:
        return str(spec)
    size = "" if spec.group_size is None else f" {spec.group_size}"
    rows = "" if block_rows == 1 else f" of {block_rows} rows"
    return f"{dtype_name(entry.dtype)} {spec.granularity}{size}{rows}"


def parts_of(name: str, codes: str, entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of the existing tensors that a weight consists of; a tensor under its own name is included."""
    candidates = dict.fromkeys((codes, name, *(part_name(name, companion) for companion in COMPANIONS)))
    return [part for part in candidates if part in entries]
