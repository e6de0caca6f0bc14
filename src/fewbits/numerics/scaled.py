"""Dequantize float8 weights with separate scales, as other tools store them, to bfloat16, some elements at a time.

A weight is its code times the scale of its block, multiplied in float32 and rounded to bfloat16, as the programs that
run such weights do. An element depends only on its code and its scale, so that cutting a tensor anywhere gives the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from fewbits.errors import NonFiniteError, NumericsError, RangeError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.float8 import float8_numbers
from fewbits.numerics.layout import BLOCK_ELEMENTS, index_at

#: Dtypes of the codes.
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

#: The dtype that codes and scales are dequantized to.
FP8_TARGET = torch.bfloat16

_LARGEST: float = torch.finfo(FP8_TARGET).max

#: Reads consecutive elements of a contiguous tensor, from the first position up to the second, as a 1-D tensor.
Elements = Callable[[int, int], Tensor]


@attrs.frozen
class ScaleGrid:
    """Maps each element of a tensor to its scale.

    The tensor is seen as a stack of matrices. Each matrix is cut into blocks, beginning at its first row and column;
    the last blocks may be smaller. Each block has one scale. The scales are in the order of the blocks, row by row.

    Attributes:
        rows: the number of rows of one matrix.
        columns: the number of columns of one matrix.
        block: rows and columns of a block.
    """

    rows: int
    columns: int
    block: tuple[int, int]

    @classmethod
    def fit(
        cls, shape: Sequence[int], scale_shape: Sequence[int], blocks: Sequence[tuple[int, int]]
    ) -> ScaleGrid | None:
        """Find the grid that fits scales of this shape to a tensor; None if no grid fits.

        Three kinds of scales fit: one scale for the whole tensor; one for each index of its first axis or axes, such as
        its rows, with or without axes of length 1 for the others; one for each block of its last two axes.

        Args:
            shape: the shape of the tensor.
            scale_shape: the shape of its scales.
            blocks: the block sizes to try, (rows, columns); the first that fits is used.

        >>> ScaleGrid.fit((300, 200), (3, 2), [(128, 128)])
        ScaleGrid(rows=300, columns=200, block=(128, 128))
        >>> ScaleGrid.fit((300, 200), (300, 1), [])
        ScaleGrid(rows=1, columns=200, block=(1, 200))
        >>> ScaleGrid.fit((300, 200), (200,), [(128, 128)]) is None
        True
        """
        shape, scale_shape = tuple(shape), tuple(scale_shape)
        for axes in range(max(len(shape), 1)):
            leading = shape[:axes]
            if scale_shape in (leading, leading + (1,) * (len(shape) - axes), leading or (1,)):
                columns = math.prod(shape[axes:])
                return cls(1, columns, (1, columns))
        for block in blocks if len(shape) > 1 else ():
            if scale_shape == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
                return cls(shape[-2], shape[-1], block)
        return None

    def rectangles(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the range of elements into parts of limited size, each within one row or made of whole rows."""
        while start < stop:
            end = min(stop, start + self.columns - start % self.columns, start + BLOCK_ELEMENTS)
            if start % self.columns == 0 and stop - start >= self.columns <= BLOCK_ELEMENTS:
                end = start + min(stop - start, BLOCK_ELEMENTS) // self.columns * self.columns
            yield start, end
            start = end

    def expanded(self, start: int, stop: int, scales: Elements) -> Tensor:
        """Return the checked float32 scales of a rectangle's elements, of shape (rows or 1, columns or 1).

        Raises:
            NumericsError: for a scale that is NaN, Inf or negative.
        """
        across = -(-self.columns // self.block[1])
        top, bottom = start // self.columns, -(-stop // self.columns)
        begin, end = start % self.columns, (stop - 1) % self.columns + 1  # all columns if there are several rows
        left, right = begin // self.block[1], -(-end // self.block[1])
        first, last = self._below(top), self._below(bottom - 1)
        found = _checked(scales, first * across + left, last * across + right).view(last - first + 1, right - left)
        if right - left > 1:
            width = [min(end, (at + 1) * self.block[1]) - max(begin, at * self.block[1]) for at in range(left, right)]
            found = found.repeat_interleave(torch.tensor(width, device=found.device), 1)
        if first == last or last - first == bottom - 1 - top:
            return found
        return found[(self._below(torch.arange(top, bottom)) - first).to(found.device)]

    def scale_of(self, elements: Tensor) -> Tensor:
        """Return the positions of the scales of these elements; both are positions in flattened tensors."""
        across = -(-self.columns // self.block[1])
        return self._below(elements // self.columns) * across + elements % self.columns // self.block[1]  # type: ignore[no-any-return]

    def _below(self, row: Any) -> Any:
        """Return the index of the row of blocks that holds a row, counted over all matrices."""
        return row // self.rows * -(-self.rows // self.block[0]) + row % self.rows // self.block[0]


@torch.no_grad()
def dequantize_scaled(
    codes: Elements, scales: Elements, grid: ScaleGrid, out: Tensor, *, first: int, shape: Sequence[int]
) -> None:
    """Fill `out` with dequantized elements, beginning with element `first`.

    Memory besides `out` is limited to a few pieces of `fewbits.numerics.layout.BLOCK_ELEMENTS`.

    Args:
        codes: reads codes, in one of `FP8_DTYPES`.
        scales: reads scales, in one of `fewbits.numerics.dtypes.SCALE_DTYPES`.
        grid: maps each code to its scale.
        out: contiguous, in `FP8_TARGET`.
        first: the position of the first element of `out` in the whole tensor.
        shape: the shape of the whole tensor, for error messages.

    Raises:
        NonFiniteError: for a code or a scale that is NaN or Inf.
        RangeError: for a product beyond the largest bfloat16.
        NumericsError: for a negative scale, or a scale of 0 with a code that is not 0.
    """
    flat = out.view(-1)
    for start, stop in grid.rectangles(first, first + out.numel()):
        values = decoded(codes(start, stop)).view(-1, min(grid.columns, stop - start))
        scale = grid.expanded(start, stop, scales)
        if float(scale.min()) == 0:
            _refuse_lost(values, scale, start, shape)
        products = values * scale
        low, high = map(float, torch.aminmax(products))
        if not -_LARGEST <= low <= high <= _LARGEST:
            _refuse(values.flatten(), products.flatten(), start, shape)
        flat[start - first : stop - first] = products.view(-1)


def decoded(codes: Tensor) -> Tensor:
    """Convert codes to float32, exactly."""
    # A table of all 256 codes is several times faster than torch's conversion.
    return float8_numbers(codes.dtype, codes.device).index_select(0, codes.view(torch.uint8).int())


def _checked(scales: Elements, start: int, stop: int) -> Tensor:
    """Read some scales in float32, and refuse NaN, Inf and negative ones."""
    found = scales(start, stop).to(torch.float32)
    bad = ~(found >= 0) | found.isinf()
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        kind = NumericsError if math.isfinite(float(found[at])) else NonFiniteError
        raise kind(f"scale {start + at} is {float(found[at])}; scales must be finite and not negative")
    return found


def _refuse_lost(values: Tensor, scale: Tensor, start: int, shape: Sequence[int]) -> None:
    """Refuse a scale of 0 with a code that is not 0; a block of zeros may have it."""
    lost = ((scale == 0) & (values != 0)).flatten().nonzero()
    if len(lost):
        raise NumericsError(
            f"the scale of the element at index {index_at(start + int(lost[0]), shape)} is 0, but its code is not 0: "
            "the scales have not been written, or are damaged"
        )


def _refuse(values: Tensor, products: Tensor, start: int, shape: Sequence[int]) -> NoReturn:
    """Raise an error that names the first element beyond the range of bfloat16."""
    at = int((~(products.abs() <= _LARGEST)).nonzero()[0])
    value, where = float(values[at]), f"the element at index {index_at(start + at, shape)}"
    if not math.isfinite(value):
        raise NonFiniteError(f"{where} is {value}; only finite numbers can be dequantized: repair the tensor")
    raise RangeError(
        f"{where} is {value:g}; times its scale it is beyond the largest {dtype_name(FP8_TARGET)} ({_LARGEST:g}): the "
        "scales are damaged, or not meant for this tensor"
    )
