"""Codes that stay the same where the source does not: what a lost weight looks like, or a part that was never filled.

Rounding may give one code throughout a row too: of one column, of nearly equal elements, of nothing but elements that
are small beside the scale of a whole tensor. These are within half a step of the source, and are not counted.
"""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import Tensor

from fewbits.numerics.affine import error_bound
from fewbits.numerics.noise import group_sums
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec

#: A row whose signal is less than so many times its noise (10 dB) has lost what was in it.
_LOST = 10
#: Columns that are looked at first.
_LOOKED_AT = 16


def constant_rows(x: Tensor, decoded: Tensor, codes: Tensor, params: QuantParams, spec: QuantSpec) -> int:
    """How many rows have one code throughout that rounding would not give, and have lost what was in them.

    Args:
        x: float64, (rows, columns), as it was.
        decoded: likewise, what the codes stand for.
        codes: integer, likewise.
        params: of these rows.
        spec: how the codes look.
    """
    which = _uniform(codes)
    if len(which):
        which = which[~_is_uniform(x[which])]
    if not len(which):
        return 0
    x, error = x[which], (x[which] - decoded[which]).abs_()
    held = error <= error_bound(x, params.rows(which), attrs.evolve(spec, rounding="nearest"))
    unit = x.abs().amax(1, keepdim=True)
    noise, signal = group_sums((error / unit).square_()), group_sums((x / unit).square_())
    return int((~held.all(1) & ~(noise * _LOST <= signal)).sum())


def _uniform(codes: Tensor) -> Tensor:
    """The indices of the rows with one code throughout."""
    # A few columns tell nearly all of the others apart.
    which = _is_uniform(codes[:, :: -(-codes.shape[1] // _LOOKED_AT)]).nonzero().flatten()
    return which[_is_uniform(codes[which])] if len(which) else which


def _is_uniform(rows: Tensor) -> Tensor:
    return torch.all(rows == rows[:, :1], 1)


@attrs.define
class SameRows:
    """Whether all rows of a matrix have the same codes, a block after the other.

    Attributes:
        rows: how many there were.
        same: whether all of them are the same.
        first: a digest of the first of them; None if there is none, or it does not matter any more.
    """

    rows: int = 0
    same: bool = True
    first: str | None = None

    def add(self, codes: Tensor) -> None:
        """Look at the next rows: integers, (rows, columns)."""
        same = self.same and bool(torch.all(codes == codes[:1]))
        self.join(SameRows(len(codes), same, _digest(codes[0]) if same else None))

    def join(self, later: SameRows) -> None:
        """Take in what was found out about the rows that come next."""
        if later.rows:
            self.same = self.same and later.same and self.first in (None, later.first)
            self.first = later.first if self.same else None
            self.rows += later.rows

    def to_dict(self) -> dict[str, int | bool | str | None]:
        """All of it, for JSON; ``SameRows(**fields)`` reads it."""
        return {"rows": self.rows, "same": self.same, "first": self.first}

    def __bool__(self) -> bool:
        """Whether there are several rows, and all are the same."""
        return self.same and self.rows > 1


def _digest(row: Tensor) -> str:
    return hashlib.sha256(repr(row.tolist()).encode()).hexdigest()
