"""Find rows whose codes are all equal though the source's elements differ: the weight was lost, or never filled.

Rounding can also give a row a single code: the row has one column, its elements are nearly equal, or they are all small
compared with the scale of the whole tensor. Such rows are within half a step of the source and are not counted.
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

#: A row with a lower ratio of signal to noise (10 dB) has lost its content.
_LOST = 10
#: About how many columns `_uniform` compares first.
_LOOKED_AT = 16


def constant_rows(x: Tensor, decoded: Tensor, codes: Tensor, params: QuantParams, spec: QuantSpec) -> int:
    """Count the rows that lost their content: all codes are equal, and rounding cannot have made them so.

    Args:
        x: the source, float64, (rows, columns).
        decoded: the decoded codes, float64, (rows, columns).
        codes: integer, (rows, columns).
        params: the parameters of these rows.
        spec: the spec of the codes.
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
    """Return the indices of the rows whose codes are all equal."""
    # A few columns, spread over the row, rule out nearly all rows.
    which = _is_uniform(codes[:, :: -(-codes.shape[1] // _LOOKED_AT)]).nonzero().flatten()
    return which[_is_uniform(codes[which])] if len(which) else which


def _is_uniform(rows: Tensor) -> Tensor:
    return torch.all(rows == rows[:, :1], 1)


@attrs.define
class SameRows:
    """Tracks, block by block, whether all rows of a matrix have the same codes.

    Attributes:
        rows: the number of rows seen.
        same: whether all of them have the same codes.
        first: a digest of the first row; None before the first row, and after two rows differed.
    """

    rows: int = 0
    same: bool = True
    first: str | None = None

    def add(self, codes: Tensor) -> None:
        """Add the next rows: integers, (rows, columns)."""
        same = self.same and bool(torch.all(codes == codes[:1]))
        self.join(SameRows(len(codes), same, _digest(codes[0]) if same else None))

    def join(self, later: SameRows) -> None:
        """Add the result for the rows that follow these."""
        if later.rows:
            self.same = self.same and later.same and self.first in (None, later.first)
            self.first = later.first if self.same else None
            self.rows += later.rows

    def to_dict(self) -> dict[str, int | bool | str | None]:
        """Return the fields for JSON; ``SameRows(**fields)`` restores them."""
        return {"rows": self.rows, "same": self.same, "first": self.first}

    def __bool__(self) -> bool:
        """Tell whether there are at least two rows and all have the same codes."""
        return self.same and self.rows > 1


def _digest(row: Tensor) -> str:
    return hashlib.sha256(repr(row.tolist()).encode()).hexdigest()
