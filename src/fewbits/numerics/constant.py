"""Codes that stay the same where the source does not: what a lost weight looks like, or a part that was never filled.

Rounding may give one code throughout a row too: of one column, of nearly equal elements, of nothing but elements that
are small beside the scale of a whole tensor. These are within half a step of the source, and are not counted.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fewbits.numerics.affine import error_bound
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.sums import group_sums

#: A row whose signal is less than so many times its noise (10 dB) has lost what was in it.
_LOST = 10
#: Columns that are looked at first.
_LOOKED_AT = 16


def constant_rows(
    x: Tensor, decoded: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> int:
    """How many rows have one code throughout that rounding would not give, and have lost what was in them.

    Args:
        x: float64, (rows, columns), as it was.
        decoded: likewise, what the codes stand for.
        codes: integer, likewise.
        scale: of these rows.
        zero_point: likewise; None if symmetric.
        spec: how the codes look.
    """
    which = _uniform(codes)
    which = which[~_is_uniform(x[which])]
    if not len(which):
        return 0
    x, error = x[which], (x[which] - decoded[which]).abs_()
    if spec.granularity != "tensor":
        scale, zero_point = scale[which], None if zero_point is None else zero_point[which]
    held = error <= error_bound(x, scale, zero_point, attrs.evolve(spec, rounding="nearest"))
    unit = x.abs().amax(1, keepdim=True)
    noise, signal = group_sums((error / unit).square_()), group_sums((x / unit).square_())
    return int((~held.all(1) & ~(noise * _LOST <= signal)).sum())


def _uniform(codes: Tensor) -> Tensor:
    """The indices of the rows with one code throughout."""
    # A few columns tell nearly all of the others apart.
    which = _is_uniform(codes[:, :: -(-codes.shape[1] // _LOOKED_AT)]).nonzero().flatten()
    return which[_is_uniform(codes[which])]


def _is_uniform(rows: Tensor) -> Tensor:
    return torch.all(rows == rows[:, :1], 1)


class SameRows:
    """Whether all rows of a matrix have the same codes, a block after the other."""

    def __init__(self) -> None:
        self._rows, self._same = 0, True
        self._first: Tensor | None = None

    def add(self, codes: Tensor) -> None:
        """Look at the next rows: (rows, columns), of integers that one byte holds."""
        first = self._go_on(codes[0], len(codes))
        self._same = self._same and bool(torch.all(codes == first))

    def join(self, later: SameRows) -> None:
        """Take in what was found out about the rows that come next."""
        if later._first is not None:
            first = self._go_on(later._first, later._rows)
            self._same = self._same and later._same and torch.equal(later._first, first)

    def __bool__(self) -> bool:
        """Whether there are several rows, and all are the same."""
        return self._same and self._rows > 1

    def _go_on(self, row: Tensor, rows: int) -> Tensor:
        self._rows += rows
        if self._first is None:
            self._first = row.to(torch.int8, copy=True)
        return self._first
