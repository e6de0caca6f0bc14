"""Find rows whose codes are all equal though the source's elements differ: the weight was lost, or never filled.

Rounding can also give a row a single code: the row has one column, its elements are nearly equal, or they are all small
compared with the scale of the whole tensor. Such rows are within half a step of the source and are not counted. Where
codes are free, because errors were fed forward or scales were tuned afterwards, the limit is a whole step.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fewbits.numerics.affine import bound_and_clipped
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
    bound, _ = bound_and_clipped(x, params.rows(which), attrs.evolve(spec, rounding="nearest"))
    if spec.rounding == "free":
        bound = 2 * bound
    unit = x.abs().amax(1, keepdim=True)
    noise, signal = group_sums((error / unit).square_()), group_sums((x / unit).square_())
    return int((~(error <= bound).all(1) & ~(noise * _LOST <= signal)).sum())


def _uniform(codes: Tensor) -> Tensor:
    """Return the indices of the rows whose codes are all equal."""
    # A few columns, spread over the row, rule out nearly all rows.
    which = _is_uniform(codes[:, :: -(-codes.shape[1] // _LOOKED_AT)]).nonzero().flatten()
    return which[_is_uniform(codes[which])] if len(which) else which


def _is_uniform(rows: Tensor) -> Tensor:
    return torch.all(rows == rows[:, :1], 1)
