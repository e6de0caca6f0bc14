"""Error feedback: round the columns of a weight one after the other, and correct the columns that follow."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fewbits.numerics.affine import ColumnRounder, decode, encode
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import refit
from fewbits.numerics.spec import QuantSpec
from fewbits.rounding.linear_algebra import damped, feedback_factor, product

#: Columns whose errors are collected before they are passed on to the columns after them. More columns would spend more
#: time on updates of one column by another, fewer on products of flat matrices.
_BLOCK = 16

#: Rows that are rounded at a time: so few that torch keeps the update of a block, of fewer than 32,768 elements, on one
#: thread. Waiting for other threads would take longer than such small work.
_ROWS = 2032


@attrs.frozen(eq=False)
class Candidate:
    """Parameters and codes of some rows, and the error of each row.

    Attributes:
        params: scale and zero point.
        codes: uint8, (rows, columns).
        error: (rows,).
    """

    params: QuantParams
    codes: Tensor
    error: Tensor

    def better(self, other: Candidate) -> Candidate:
        """Return the rows of the other candidate where its error is less, and the rows of this one elsewhere."""
        less = other.error < self.error
        rows = less.unsqueeze(1)
        params = self.params if self.params.scale.dim() == 1 else other.params.where(rows, self.params)
        return Candidate(params, torch.where(rows, other.codes, self.codes), torch.where(less, other.error, self.error))


class Feedback:
    """Rounds rows so that ``(target - q) moment (target - q)^T`` is small.

    Args:
        moment: the second moment of the inputs, float64, (columns, columns).
        cross: the mean of ``reference x^T``, if the target is to give, with the inputs `x`, what the weight gives with
            the reference inputs; None if the target is the weight. The damping is then part of the objective: without
            it, the correction would follow directions that the inputs hardly have.
        damping: as a share of the mean of the diagonal.
    """

    def __init__(self, moment: Tensor, cross: Tensor | None, damping: float) -> None:
        dead = moment.diagonal() == 0
        # An input that is always zero says nothing about its column. With a diagonal entry the moment is invertible,
        # and the column is rounded to nearest.
        mean = float(moment.diagonal().sum()) / max(1, int((~dead).sum()))
        filled = torch.diag(dead * (mean or 1.0))
        moment = moment + filled
        self._order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        ordered = moment[self._order][:, self._order]
        upper, damping = feedback_factor(ordered, damping)
        #: What the error of a column adds to the columns after it.
        self._passed_on = upper / upper.diagonal().unsqueeze(1)
        self._correction: Tensor | None = None
        self.moment = moment
        if cross is not None:
            self.moment = damped(moment, damping)
            # The inverse of the damped moment is U^T U, in the order of the columns.
            inverse = torch.empty_like(moment)
            inverse[self._order.unsqueeze(1), self._order] = upper.mT @ upper
            self._correction = (self.moment - moment + cross + filled) @ inverse

    def target(self, weight: Tensor) -> Tensor:
        """Return the rows that the codes should come close to, in the dtype of `weight`."""
        return weight if self._correction is None else product(weight, self._correction)

    def candidate(self, target: Tensor, params: QuantParams, codes: Tensor, spec: QuantSpec) -> Candidate:
        """Measure the error of some codes."""
        error = target - decode(codes, params, spec, target.dtype)
        return Candidate(params, codes, _sums(product(error, self.moment), error))

    def fitted(
        self, target: Tensor, params: QuantParams, codes: Tensor, spec: QuantSpec
    ) -> tuple[Candidate, QuantParams]:
        """Measure the error of some codes, and fit the scales to them; see `_fit`."""
        error = target - decode(codes, params, spec, target.dtype)
        pushed = product(error, self.moment)
        before = Candidate(params, codes, _sums(pushed, error))
        return before, self._fit(pushed, params, codes, spec)

    def sweep(self, target: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Round all columns; return the codes, uint8."""
        rounded, passed_on = torch.empty_like(target), self._passed_on.to(target.dtype)
        for start in range(0, len(target), _ROWS):
            rows = slice(start, start + _ROWS)
            rounded[rows] = self._swept(target[rows], params.rows(rows), spec, passed_on)
        return encode(rounded, params, spec)

    def _swept(self, target: Tensor, params: QuantParams, spec: QuantSpec, passed_on: Tensor) -> Tensor:
        """Round some rows, to numbers that codes decode to."""
        # Columns of the weight are rows here, so that each is contiguous.
        rest = target.mT[self._order]
        rounded = torch.empty_like(rest)
        rounder = ColumnRounder(params, spec, rest.dtype)
        groups = (self._order // spec.width(len(rest))).tolist()
        for start in range(0, len(rest), _BLOCK):
            stop = min(start + _BLOCK, len(rest))
            block, inner = rest[start:stop], passed_on[start:stop, start:stop]
            errors = torch.empty_like(block)
            columns = zip(block, rounded[start:stop], errors, strict=True)
            for i, (column, value, error) in enumerate(columns):
                rounder.round(column, groups[start + i], out=value)
                torch.sub(column, value, out=error)
                block[i + 1 :].addr_(inner[i, i + 1 :], error, alpha=-1)
            rest[stop:] -= passed_on[start:stop, stop:].mT @ errors
        return torch.empty_like(rest).index_copy_(0, self._order, rounded).mT

    def _fit(self, pushed: Tensor, params: QuantParams, codes: Tensor, spec: QuantSpec) -> QuantParams:
        """Fit the scales to the codes, one group after the other.

        With all other scales as they are, the error is least for ``s_g = z_g M (target - others)^T / (z_g M z_g^T)``,
        where ``z_g`` are the steps of the group. `pushed` is ``(target - q) M``; it changes with the scales.
        """
        dtype, columns = pushed.dtype, pushed.shape[1]
        moment = self.moment.to(dtype)
        unit = QuantParams(torch.ones_like(params.scale), params.zero_point)
        steps = decode(codes, unit, spec, dtype)
        scale = params.scale.clone()
        width = spec.width(columns)
        for group in range(scale.shape[1]):
            first, last = group * width, min((group + 1) * width, columns)
            own = steps[:, first:last]
            before = _of_group(params, group)
            curvature = _sums(product(own, moment[first:last, first:last]), own)
            slope = _sums(pushed[:, first:last], own) / before.scale.squeeze(1).double()
            fitted = (slope + curvature).clamp(min=0).unsqueeze(1), curvature.unsqueeze(1)
            after = refit(before, *fitted, spec).scale
            change = (before.scale.double() - after.double()).to(dtype)
            pushed += product(own * change, moment[first:last])
            scale[:, group : group + 1] = after
        return attrs.evolve(params, scale=scale)


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """Sum the products of two matrices along each row, in float64."""
    return (left * right).double().sum(1)


def _of_group(params: QuantParams, group: int) -> QuantParams:
    """Return the parameters of one group, as those of a matrix with one column."""
    zero_point = None if params.zero_point is None else params.zero_point[:, group : group + 1]
    return QuantParams(params.scale[:, group : group + 1], zero_point, params.row_scale)
