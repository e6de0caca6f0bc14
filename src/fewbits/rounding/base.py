"""`Rounding`: the strategy that picks the codes of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import check_chosen, check_finite
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.rounding.statistics import InputStatistics, Needs


@attrs.frozen(eq=False)
class RowInputs:
    """The inputs of some rows of a weight. Most weights have one; experts and attention projections have several.

    Attributes:
        rows: which rows of the weight's matrix.
        statistics: of the inputs that these rows are multiplied with.
    """

    rows: slice
    statistics: InputStatistics


class Rounding(ABC):
    """Picks codes and scales for a weight.

    Attributes:
        needs: which statistics of the layer's inputs it uses.
        objective: the sum that it minimizes, as a formula for documents and files.
        nearest: whether every element gets the nearest code; otherwise the error bound of a weight is the distance to
            the farther end of the code range.
        min_inputs: rows that saw fewer inputs are rounded as without data.
    """

    needs: ClassVar[Needs] = "nothing"
    objective: ClassVar[str]
    nearest: ClassVar[bool] = False
    min_inputs: ClassVar[int] = 64

    @abstractmethod
    def choose(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, inputs: InputStatistics | None
    ) -> tuple[QuantParams, Tensor]:
        """Pick scales and codes for some rows of a weight.

        The result for a row may depend only on this row and on the statistics.

        Args:
            weight: finite, (rows, columns), float32 or float64; do not write to it.
            spec: the spec of the codes, with ``spec.scale_dtype`` set.
            params: the observer's choice; if ``spec.granularity`` is "tensor", the scale must stay.
            inputs: the statistics that `needs` names; None if there are none, or too few.

        Returns:
            the parameters to store, and the codes: uint8, (rows, columns), made unsigned by adding ``2**(bits-1)``.
        """

    def spec_for(self, spec: QuantSpec) -> QuantSpec:
        """Return the spec of the codes that this strategy picks: their error bound depends on it."""
        return spec if self.nearest else attrs.evolve(spec, rounding="free")

    def remark(self, rows: int, inputs: Sequence[RowInputs]) -> str:
        """Say for the ledger which rows of a weight were rounded without data; "" if none were."""
        seen = sum(known.rows.stop - known.rows.start for known in inputs if known.statistics.count >= self.min_inputs)
        if self.needs == "nothing" or seen == rows:
            return ""
        which = f"{rows - seen} of its {rows} rows" if seen else "its rows"
        return f"{which} saw fewer than {self.min_inputs} inputs, and were rounded without data"

    def error(self, weight: Tensor, decoded: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Compute the `objective` of each row, float64, (rows,).

        Args:
            weight: (rows, columns).
            decoded: the numbers that the codes decode to, (rows, columns).
            inputs: as in `choose`.
        """
        return (weight.double() - decoded.double()).square().sum(1)

    @torch.no_grad()
    def quantize(
        self, weight: WeightMatrix, spec: QuantSpec, observer: Observer, inputs: Sequence[RowInputs] = ()
    ) -> QuantizedTensor:
        """Quantize a weight.

        Args:
            weight: the tensor as a matrix.
            spec: the spec of the codes, perhaps without its `scale_dtype`.
            observer: picks the scales to start from.
            inputs: what is known of the inputs of its rows, which must not overlap; other rows are rounded as without
                data.

        Raises:
            NonFiniteError: if the weight holds NaN or Inf.
            NumericsError: if `observer` or `choose` returns parameters that do not fit the spec.
        """
        spec = spec.for_dtype(weight.dtype)
        check_finite(weight.tensor)
        # The statistics are on the CPU, where the linear algebra does not depend on the number of threads.
        weight, device = WeightMatrix(weight.tensor.cpu(), weight.layout), weight.tensor.device
        matrix = weight.whole().to(compute_dtype(weight.dtype))
        shared = _chosen(observer, weight.whole(), spec) if spec.granularity == "tensor" else None
        parts = []
        for rows, statistics in _covering(len(matrix), inputs, self.min_inputs):
            part = matrix[rows]
            parts.append(self.choose(part, spec, shared or _chosen(observer, part, spec), statistics))
        params = shared or QuantParams.joined([params for params, _ in parts])
        codes = torch.cat([codes for _, codes in parts]).to(torch.int16) + spec.code_min
        params = params.to(device)
        return QuantizedTensor.from_codes(codes.to(device), params, spec=spec, layout=weight.layout, dtype=weight.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _chosen(observer: Observer, rows: Tensor, spec: QuantSpec) -> QuantParams:
    return check_chosen(observer.observe_weight(rows, spec), spec, (rows.shape[0], rows.shape[1]))


def _covering(
    rows: int, inputs: Sequence[RowInputs], min_inputs: int
) -> Iterator[tuple[slice, InputStatistics | None]]:
    """Cover all rows, in order, each with the statistics of its inputs, or None."""
    at = 0
    for known in sorted(inputs, key=lambda known: known.rows.start):
        if known.rows.start > at:
            yield slice(at, known.rows.start), None
        yield known.rows, known.statistics if known.statistics.count >= min_inputs else None
        at = known.rows.stop
    if at < rows:
        yield slice(at, rows), None
