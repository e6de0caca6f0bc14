"""One weight of a compressed-tensors checkpoint: which tensors hold it, and how their shapes say it is quantized.

============================  =====================================================================================
``weight_packed``             int32, (rows, words): codes plus ``2**(bits-1)``, as `fewbits.numerics.packing` packs them
``weight_shape``              int64 or int32, (dimensions,): beside ``weight_packed``
``weight``                    in place of these: int8, a code a byte, or float8
``weight_scale``              floating: (1,), (rows, 1), (rows, groups), or one for each block of rows and columns
``weight_zero_point``         asymmetric only: int32, packed along the rows, or int8, the shape of the scales
``weight_g_idx``              integer, (columns,): the group of each column, where they do not lie in order
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

#: What may lie beside the codes of a weight.
COMPANIONS = ("scale", "zero_point", "shape", "g_idx", "global_scale")

_BITS = range(2, 9)


@attrs.frozen
class CompressedWeight:
    """How one weight is stored.

    Attributes:
        name: of the weight it was made from.
        codes: the tensor that holds its codes.
        form: how that holds them.
        spec: how they look.
        layout: how the weight was cut.
        zero_point: how the zero points are held; None if symmetric.
        ordered: whether a ``g_idx`` says which group each column is of.
        block_rows: how many rows share a scale.
        scheme: the spec in words.
        inferred: whether only the shapes say so.
    """

    name: str
    codes: str
    form: Form
    spec: QuantSpec
    layout: Layout
    zero_point: Literal["packed", "bytes"] | None
    ordered: bool
    block_rows: int
    scheme: str
    inferred: bool

    def part(self, part: str) -> str:
        """The name of one of its tensors."""
        return part_name(self.name, part)


@attrs.frozen
class _Cut:
    """Which elements share a scale."""

    granularity: Granularity
    group_size: int | None = None
    block_rows: int = 1


class _UnfitError(Exception):
    """A weight's tensors do not fit a scheme."""


def codes_names(entries: Mapping[str, Entry]) -> dict[str, str]:
    """The weights among the tensors of a file, by name, and which tensor holds the codes of each."""
    found = {}
    for name, entry in entries.items():
        stem = name.removesuffix("_packed")
        if stem != name and part_name(stem, "scale") in entries:
            found[stem] = name
        elif entry.dtype in (torch.int8, *FLOAT8_DTYPES) and part_name(name, "scale") in entries:
            found.setdefault(name, name)
    return found


def describe(
    name: str, codes: str, entries: Mapping[str, Entry], shape: Sequence[int] | None, config: CompressionConfig | None
) -> CompressedWeight:
    """How one weight is stored.

    Args:
        name: of the weight.
        codes: of the tensor with its codes.
        entries: every tensor of the checkpoint.
        shape: the content of ``weight_shape``; None if the file has none.
        config: read from ``config.json``; None infers everything from shapes.

    Raises:
        FormatError: if its tensors contradict one another or the config, or are of a kind that is not read.
    """
    entry, scale = entries[codes], entries[part_name(name, "scale")]
    if codes != name and name in entries:
        raise FormatError(f"{name} is there twice, as it is and as {codes}")
    form = _form(name, codes, entry)
    if scale.dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name}_scale is {dtype_name(scale.dtype)}; scales of that dtype are not read")
    layout = _layout(name, form, entry, scale, shape)
    zero = entries.get(part_name(name, "zero_point"))
    reasons, fits = [], []
    for scheme in (config.schemes if config is not None else ()) or (None,):
        try:
            fits.append(_fit(scheme, form, entry, scale, layout, zero is not None))
        except _UnfitError as error:
            reasons.append(str(error))
    if not fits:
        raise FormatError(f"{name} is not what {'config.json says' if config else 'can be read'}: {'; '.join(reasons)}")
    if form == "packed" and len({spec for spec, _ in fits}) > 1:
        raise FormatError(f"{name} fits several groups of config.json: {', '.join(str(spec) for spec, _ in fits)}")
    # Codes of one byte decode alike in all: the widest leaves none of them out.
    spec, block_rows = max(fits, key=lambda fit: fit[0].bits)
    ordered = part_name(name, "g_idx") in entries
    return CompressedWeight(
        name=name,
        codes=codes,
        form=form,
        spec=spec,
        layout=layout,
        zero_point=None if spec.symmetric else _zero_point(name, zero, scale, spec, layout),
        ordered=_check_order(name, entries[part_name(name, "g_idx")], spec, layout) if ordered else False,
        block_rows=block_rows,
        scheme=_in_words(spec, entry, block_rows),
        inferred=config is None or not config.schemes,
    )


def _form(name: str, codes: str, entry: Entry) -> Form:
    if len(entry.shape) < 2 or not entry.numel:
        raise FormatError(f"{codes} has shape {entry.shape}; codes of a weight have rows and columns")
    if codes == name:
        return "bytes" if entry.dtype == torch.int8 else "float8"
    if entry.dtype != torch.int32:
        raise FormatError(f"{codes} is {dtype_name(entry.dtype)}; only codes packed in int32 are read")
    return "packed"


def _layout(name: str, form: Form, entry: Entry, scale: Entry, shape: Sequence[int] | None) -> Layout:
    if form != "packed":
        one_a_row = scale.shape == (entry.shape[0], *[1] * (len(entry.shape) - 1))
        return Layout.of(entry.shape, inputs=range(1, len(entry.shape)) if one_a_row else (-1,))
    if shape is None:
        raise FormatError(f"{name}_packed has no {name}_shape beside it, which says how many columns there are")
    if tuple(shape[:-1]) != entry.shape[:-1] or not 0 < shape[-1] < 1 << 40:
        raise FormatError(f"{name}_shape says {tuple(shape)}, and {name}_packed has shape {entry.shape}")
    return Layout.of(shape)


def _fit(
    scheme: WeightScheme | None, form: Form, entry: Entry, scale: Entry, layout: Layout, zero_points: bool
) -> tuple[QuantSpec, int]:
    """The spec of a weight by a scheme of the config, or by shapes alone, and how many rows share a scale.

    Raises:
        _UnfitError: if it is not that scheme's.
    """
    cut = _inferred_cut(scale, layout) if scheme is None else _cut_of(scheme, scale, layout)
    if zero_points and cut.block_rows > 1:
        raise _UnfitError("zero points of blocks are not read")
    if form == "float8":
        if scheme is not None and (scheme.kind, scheme.bits) != ("float", 8):
            raise _UnfitError(f"{scheme}, and it is {dtype_name(entry.dtype)}")
        if zero_points:
            raise _UnfitError("zero points of float8 are not read")
        return float8_spec(entry.dtype, cut.granularity, cut.group_size, scale.dtype), cut.block_rows
    if scheme is not None and (scheme.kind != "int" or scheme.bits not in _BITS):
        raise _UnfitError(f"{scheme}, and its codes are integers of 2 to 8 bits")
    if scheme is not None and not scheme.symmetric and not zero_points:
        raise _UnfitError(f"{scheme}, and there are no zero points")
    spec = QuantSpec(
        8 if form == "bytes" and scheme is None else _bits(scheme, form, entry, layout),
        cut.granularity,
        group_size=cut.group_size,
        symmetric=not zero_points if scheme is None else scheme.symmetric,
        scale_dtype=scale.dtype,
    )
    return spec, cut.block_rows


def _bits(scheme: WeightScheme | None, form: Form, entry: Entry, layout: Layout) -> int:
    widths = _BITS if scheme is None else [scheme.bits]
    if form == "packed":
        widths = [bits for bits in widths if packed_words(layout.columns, bits) == entry.shape[-1]]
    if len(widths) != 1:
        asked = "" if scheme is None else f"{scheme}, and "
        one_of = f" may be codes of {' or '.join(map(str, widths))} bits" if widths else " hold no such codes"
        raise _UnfitError(f"{asked}{entry.shape[-1]} words for {layout.columns} columns{one_of}")
    return widths[0]


def _cut_of(scheme: WeightScheme, scale: Entry, layout: Layout) -> _Cut:
    rows, columns = layout.matrix_shape
    found = matrix_form(scale.shape)
    expected, cut = {
        "tensor": ((1, 1), _Cut("tensor")),
        "channel": ((rows, 1), _Cut("channel")),
        "group": ((rows, _ceil(columns, scheme.group_size or 1)), _Cut("group", scheme.group_size)),
        "block": (
            (_ceil(rows, (scheme.block or (1, 1))[0]), _ceil(columns, (scheme.block or (1, 1))[1])),
            _Cut("group", (scheme.block or (1, 1))[1], (scheme.block or (1, 1))[0]),
        ),
    }.get(scheme.strategy, (None, None))
    if cut is None:
        raise _UnfitError(f"{scheme}; that strategy is not read")
    if found != expected or (scheme.strategy == "block" and len(layout.shape) != 2):
        raise _UnfitError(f"{scheme}, and its scales have shape {scale.shape} for {rows} rows of {columns}")
    return cut


def _inferred_cut(scale: Entry, layout: Layout) -> _Cut:
    rows, columns = layout.matrix_shape
    found, groups = matrix_form(scale.shape)
    if (found, groups) == (1, 1):
        return _Cut("tensor")
    if found != rows or not groups or columns % groups:
        raise _UnfitError(
            f"scales of shape {scale.shape} for {rows} rows of {columns}, which only config.json can explain"
        )
    return _Cut("channel") if groups == 1 else _Cut("group", columns // groups)


def matrix_form(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of scales as (rows, groups)."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def _zero_point(
    name: str, zero: Entry | None, scale: Entry, spec: QuantSpec, layout: Layout
) -> Literal["packed", "bytes"]:
    rows, groups = matrix_form(scale.shape)
    if zero is not None and zero.dtype == torch.int8 and matrix_form(zero.shape) == (rows, groups):
        return "bytes"
    packed = (packed_words(rows, spec.bits), groups)
    if zero is not None and zero.dtype == torch.int32 and matrix_form(zero.shape) == packed and len(layout.shape) == 2:
        return "packed"
    raise FormatError(
        f"{name}_zero_point is {zero}; it should be int8 in the shape of the scales, or int32 in shape {packed}"
    )


def _check_order(name: str, order: Entry, spec: QuantSpec, layout: Layout) -> bool:
    if order.dtype not in (torch.int32, torch.int64) or order.shape != (layout.columns,) or spec.granularity != "group":
        raise FormatError(f"{name}_g_idx is {order}; it should be an integer for each of {layout.columns} columns")
    return True


def _in_words(spec: QuantSpec, entry: Entry, block_rows: int) -> str:
    if spec.levels is None:
        return str(spec)
    size = "" if spec.group_size is None else f" {spec.group_size}"
    rows = "" if block_rows == 1 else f" of {block_rows} rows"
    return f"{dtype_name(entry.dtype)} {spec.granularity}{size}{rows}"


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def parts_of(name: str, codes: str, entries: Mapping[str, Entry]) -> list[str]:
    """The tensors of a weight that are there, its name among them if one has that."""
    candidates = dict.fromkeys((codes, name, *(part_name(name, companion) for companion in COMPANIONS)))
    return [part for part in candidates if part in entries]
