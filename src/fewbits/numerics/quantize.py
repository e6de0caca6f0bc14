"""Quantize floating weights to `QuantizedTensor`, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError, NonFiniteError, NumericsError, RangeError
from fewbits.numerics.affine import encode
from fewbits.numerics.dtypes import FLOAT_DTYPES, compute_dtype, dtype_name
from fewbits.numerics.layout import Layout, WeightMatrix, block_rows, index_at
from fewbits.numerics.packing import pack, packed_words
from fewbits.numerics.params import QuantParams, check_params, empty_params
from fewbits.numerics.parts import pack_params
from fewbits.numerics.scales import choose_params, extremes, rounded_up_to_two_levels
from fewbits.numerics.scratch import Scratch, scratch
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor

#: Takes some whole rows of a weight's matrix and the spec, and returns scale and zero point for these rows. The rows
#: come in float32 or float64, a block at a time. If one scale serves the whole tensor, all rows come at once, in the
#: weight's dtype.
ChooseParams = Callable[[Tensor, QuantSpec], QuantParams]

#: How many ordinary blocks are quantized at a time. A block of any size costs some fifty calls of torch, so larger
#: blocks are faster. They fit in the cache: quantizing has fewer intermediate results than other work on blocks.
_BLOCKS_AT_ONCE = 4


def min_max(rows: Tensor, spec: QuantSpec) -> QuantParams:
    """Take scales from the extremes, so that nothing clips; the default `ChooseParams`."""
    return choose_params(*extremes(rows, spec), spec)


@torch.no_grad()
def quantize(
    weight: Tensor | WeightMatrix, spec: QuantSpec, choose: ChooseParams = min_max, *, layout: Layout | None = None
) -> QuantizedTensor:
    """Round a tensor to the nearest codes.

    Args:
        weight: float16, bfloat16, float32 or float64, any shape and strides.
        spec: the spec of the codes.
        choose: picks scales and zero points.
        layout: the layout that cuts `weight` into rows and columns; None takes the last axis as the input.

    Raises:
        ArgumentError: if `weight` has no elements, or another dtype.
        NonFiniteError: if the tensor holds NaN or Inf; the message names the first bad index.
        RangeError: if a scale is beyond the largest number of the dtype it is stored in.
        NumericsError: if `choose` returns scales or zero points that do not fit the spec.

    >>> quantize(torch.tensor([[0.0, 0.5, -1.0]]), QuantSpec(bits=8, granularity="channel")).codes()
    tensor([[   0,   64, -127]], dtype=torch.int8)
    """
    matrix = weight if isinstance(weight, WeightMatrix) else WeightMatrix(weight, layout or Layout.of(weight.shape))
    spec = spec.for_dtype(matrix.dtype)
    (rows, columns), device = matrix.layout.matrix_shape, matrix.tensor.device
    if not rows * columns or matrix.dtype not in FLOAT_DTYPES:
        raise ArgumentError(
            f"a {dtype_name(matrix.dtype)} tensor of shape {matrix.layout.shape} cannot be quantized; it must have "
            f"elements, in one of {', '.join(map(dtype_name, FLOAT_DTYPES))}"
        )
    packed = torch.empty(rows, packed_words(columns, spec.bits), dtype=torch.int32, device=device)
    # Allocate all scales at once: small tensors that outlive a block would keep the block's memory from being reused.
    params = empty_params(spec, rows, columns, device)
    memory = scratch()
    per_tensor = spec.granularity == "tensor"
    if per_tensor:
        check_finite(matrix.tensor)
        _choose_into(params, choose, matrix.whole(), spec)
    for start, stop, values in matrix.blocks(_BLOCKS_AT_ONCE):
        chosen, block = params.rows(slice(start, stop)), _row_after_row(values, compute_dtype(matrix.dtype), memory)
        if not per_tensor:
            if not _is_finite(block):
                check_finite(matrix.tensor)
            _choose_into(chosen, choose, block, spec)
        codes = encode(block, chosen, spec, memory)
        pack(codes, spec.bits, packed[start:stop], memory)
    return QuantizedTensor(packed, spec=spec, layout=matrix.layout, dtype=matrix.dtype, **pack_params(params, spec))


@torch.no_grad()
def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy in another floating dtype.

    Raises:
        NonFiniteError: if the tensor holds NaN or Inf; the message names the first bad index.
        RangeError: if a value is beyond the largest number of `dtype`; the message names the first bad index.
    """
    matrix = WeightMatrix(tensor, Layout.of(tensor.shape))
    result = torch.empty(matrix.layout.matrix_shape, dtype=dtype, device=tensor.device)
    for start, stop, values in matrix.blocks():
        if not _is_finite(result[start:stop].copy_(values)):
            check_finite(tensor)
            check_finite(tensor, dtype)
    return result.reshape(tensor.shape)


@torch.no_grad()
def check_finite(
    tensor: Tensor, dtype: torch.dtype | None = None, *, first: int = 0, shape: Sequence[int] | None = None
) -> None:
    """Refuse NaN, Inf, and, if `dtype` is given, numbers that become Inf in it.

    Args:
        tensor: a whole tensor, or consecutive elements of one.
        dtype: floating.
        first: the position of the first of these elements in the whole tensor.
        shape: the shape of the whole tensor; None means the shape of `tensor`.

    Raises:
        NonFiniteError: for NaN and Inf.
        RangeError: for a number beyond the range of `dtype`.
    """
    shape = tensor.shape if shape is None else shape
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    columns = tensor[:1].numel()
    step = block_rows(columns)
    for start in range(0, tensor.shape[0], step):
        values = tensor[start : start + step]
        result = values if dtype is None else values.to(dtype)
        if _is_finite(result):
            continue
        at = int((~torch.isfinite(result)).flatten().nonzero()[0])
        value = float(values.flatten()[at])
        index = index_at(first + start * columns + at, shape)
        if dtype is None:
            raise NonFiniteError(
                f"the element at index {index} is {value}; only finite numbers can be quantized: "
                "repair the tensor, or exclude it"
            )
        raise RangeError(
            f"the element at index {index} is {value:.6g}, beyond the largest {dtype_name(dtype)} "
            f"({torch.finfo(dtype).max:.6g}); exclude this tensor, or choose another scheme for it"
        )


def check_chosen(chosen: object, spec: QuantSpec, shape: tuple[int, int]) -> QuantParams:
    """Return the parameters that an observer chose for some rows, if codes can be made with them.

    With two levels of scales, an observer may know only one: its scales are rounded up to two.

    Raises:
        NumericsError: if they do not fit the spec and the shape.
    """
    try:
        if spec.scale_bits is not None and isinstance(chosen, QuantParams) and chosen.row_scale is None:
            chosen = _with_row_scale(chosen, spec, shape)
        return check_params(chosen, spec, shape)
    except NumericsError as error:
        raise NumericsError(f"an observer chose a scale or zero point that cannot be used: {error}") from None


def _with_row_scale(chosen: QuantParams, spec: QuantSpec, shape: tuple[int, int]) -> QuantParams:
    one_level, wide = spec.one_level(), compute_dtype(spec.scale_dtype or torch.float32)
    # An observer may have changed the scales of another one, which are wider with two levels.
    if isinstance(chosen.scale, Tensor) and chosen.scale.dtype == wide:
        one_level = attrs.evolve(one_level, scale_dtype=wide)
    params = check_params(chosen, one_level, shape)
    if not spec.symmetric and (params.scale < 0).any():
        raise NumericsError(f"a scale is negative; {spec} has positive scales only, because it is asymmetric")
    return rounded_up_to_two_levels(params, spec)


def _choose_into(params: QuantParams, choose: ChooseParams, rows: Tensor, spec: QuantSpec) -> None:
    """Write the parameters that are chosen for some rows to `params`."""
    chosen = check_chosen(choose(rows, spec), spec, (rows.shape[0], rows.shape[1]))
    for part, value in zip(attrs.astuple(params, recurse=False), attrs.astuple(chosen, recurse=False), strict=True):
        if part is not None:
            part.copy_(value)


def _row_after_row(values: Tensor, dtype: torch.dtype, memory: Scratch) -> Tensor:
    """Return contiguous rows in `dtype`; not a copy if the rows already are."""
    if values.is_contiguous():
        if values.dtype == dtype:
            return values
        return memory.take("rows", values.shape, dtype, values.device).copy_(values)
    # Copy strided elements together in memory order first, then reorder them into rows, which happens in the cache.
    # Doing both in one step takes several times as long.
    return values.to(dtype, copy=True).contiguous()


def _is_finite(block: Tensor) -> bool:
    """Tell whether a block holds neither NaN nor Inf."""
    # A finite sum proves it. A sum of finite numbers may overflow; only then check each element, which is slow.
    return math.isfinite(float(block.sum())) or bool(torch.isfinite(block).all())
