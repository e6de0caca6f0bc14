"""Move whole rows between quantized weights, with codes, scales and zero points unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from fewbits.numerics.layout import Layout
from fewbits.numerics.params import QuantParams
from fewbits.numerics.parts import pack_params
from fewbits.numerics.spec import QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.row import LedgerRow

#: Columns of a numbered row: enough to notice that an operation changes the order of columns.
_COLUMNS = 4


@attrs.frozen(eq=False)
class RowMoves:
    """How a weight is made of rows of other weights.

    Attributes:
        spec: the spec of the weight.
        layout: the layout of the weight.
        index: which row each row of its matrix is; rows of the other weights are counted through.
    """

    spec: QuantSpec
    layout: Layout
    index: Tensor

    def apply(self, values: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Make the weight of the other weights."""
        packed = torch.cat([value.packed for value in values])
        params = QuantParams.joined([_params_by_row(value) if len(values) > 1 else value.params() for value in values])
        if not torch.equal(self.index, torch.arange(len(packed))):
            packed, params = packed[self.index], params.rows(self.index)
        return QuantizedTensor(
            packed,
            spec=self.spec,
            layout=self.layout,
            dtype=values[0].dtype,
            input_scale=values[0].input_scale,
            **pack_params(params, self.spec),
        )


def _params_by_row(value: QuantizedTensor) -> QuantParams:
    """Return scales and zero points with one for each row, even if the weight has only one scale."""
    params = value.params()
    if value.spec.granularity != "tensor":
        return params
    zero_point = None if params.zero_point is None else params.zero_point.expand(value.layout.rows, 1)
    return QuantParams(params.scale.expand(value.layout.rows, 1), zero_point)


def common_spec(rows: Sequence[LedgerRow]) -> Spec | None:
    """Return the spec of a tensor that is made of stored tensors; None if their specs differ."""
    specs = [None if row.spec is None else row.spec.for_dtype(row.dtype) for row in rows]
    free = any(isinstance(spec, QuantSpec) and spec.rounding == "free" for spec in specs)
    alike = {attrs.evolve(spec, rounding="free") if free and isinstance(spec, QuantSpec) else spec for spec in specs}
    if len(alike) > 1 or len({row.dtype for row in rows}) > 1:
        return None
    spec = alike.pop()
    if not isinstance(spec, QuantSpec) or len(rows) == 1:
        return spec
    if spec.activations == "static":  # each weight has a scale of inputs of its own
        return None
    # With one scale for each weight, the whole has several.
    return attrs.evolve(spec, granularity="channel") if spec.granularity == "tensor" else spec


def is_movable(layout: Layout) -> bool:
    """Tell whether the rows of a layout are whole axes of its tensor, and so are its columns."""
    return layout.view == layout.shape and layout.row_axes < len(layout.view)


def collapsed(layout: Layout) -> Layout:
    """Return the layout of numbered rows: the same axes, and few columns."""
    columns = layout.permutation[layout.row_axes :]
    sizes = {axis: _COLUMNS if axis == max(columns) else 1 for axis in columns}
    return Layout.of([sizes.get(axis, size) for axis, size in enumerate(layout.shape)], inputs=columns)


def numbered(layout: Layout, start: int) -> Tensor:
    """Return a tensor in the collapsed layout whose elements name their row and column; `start` is the first row."""
    matrix = torch.arange(start * _COLUMNS, (start + layout.rows) * _COLUMNS).reshape(-1, _COLUMNS)
    return collapsed(layout).from_matrix(matrix)


def row_numbers(tensor: Tensor, layout: Layout) -> Tensor | None:
    """Read the numbers of rows that an operation has moved; None if it did not move whole rows.

    Args:
        tensor: what the operation made of numbered rows.
        layout: the layout of what it makes of the real tensors.
    """
    small = collapsed(layout)
    if tuple(tensor.shape) != small.shape:
        return None
    matrix = small.permuted(tensor).reshape(-1, _COLUMNS)
    index = matrix[:, 0] // _COLUMNS
    return index if torch.equal(matrix, index[:, None] * _COLUMNS + torch.arange(_COLUMNS)) else None
