"""`DataEffects`: records the effect of data on the codes of a rounding strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.digests import digest, value_digest
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.quantize import quantize
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.rounding.statistics import has_second_moment
from fewbits.selection.ledger import Ledger


class DataEffects:
    """Records the output error of each weight that saw data. Warns if the codes are those of rounding without data.

    Args:
        rounding: the strategy that picks the codes.

    Attributes:
        notes: notes for the report.
    """

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._outputs: dict[str, tuple[float, str, str]] = {}
        self._compared, self._alike = 0, True
        self.notes: list[str] = []

    def add(
        self, name: str, tensor: Tensor, value: QuantizedTensor, inputs: Sequence[RowInputs], observer: Observer
    ) -> None:
        """Take note of one weight.

        Args:
            name: its name.
            tensor: its numbers before quantization.
            value: its codes.
            inputs: the statistics that the codes were picked with.
            observer: the observer that picked the first scales.
        """
        if not inputs:
            return
        weight = WeightMatrix(tensor, value.layout)
        if has_second_moment(self._rounding.needs):
            self._outputs[name] = _output_sqnr_db(weight, value, inputs), value_digest(value), digest(value.packed)
        if not self._rounding.remark(value.layout.rows, inputs):
            self.compare(weight, value, observer)

    def compare(self, weight: WeightMatrix, value: QuantizedTensor, observer: Observer) -> None:
        """Compare the codes of a weight that saw data with those of plain rounding, if all before were the same."""
        if self._alike:
            self._compared += 1
            plain = quantize(weight, value.spec.weight_only(), observer.observe_weight)
            self._alike = same_bits(attrs.evolve(value, spec=plain.spec, input_scale=None), plain)

    @property
    def recorded(self) -> dict[str, float]:
        """The SQNR of layers' outputs, in dB, by the names of the weights, as the weights were when they were added."""
        return {name: figure for name, (figure, _, _) in self._outputs.items()}

    def output_sqnr_db(self, ledger: Ledger, value_of: Callable[[str], Value]) -> dict[str, float]:
        """Return the SQNR of layers' outputs, in dB, by the names of their weights.

        A weight that was changed after it was recorded is left out. A tuned weight keeps its figure, if its codes are
        the same: tuning changes only scales, and makes outputs better.

        Args:
            ledger: the ledger of the result.
            value_of: returns the stored form of a weight, by its name.
        """
        known = {}
        for name, (figure, whole, codes) in self._outputs.items():
            value = value_of(name)
            same_codes = ledger[name].tuned and isinstance(value, QuantizedTensor) and digest(value.packed) == codes
            if same_codes or value_digest(value) == whole:
                known[name] = figure
        return known

    def warn(self) -> None:
        """Emit a warning and add a note if the data has changed no code."""
        if self._compared and self._alike:
            emit("warning", "same_as_nearest", rounding=repr(self._rounding), tensors=self._compared)
            self.notes.append(
                f"{self._rounding!r} gave all {self._compared} weights that saw data the codes of plain rounding: the "
                "data has changed nothing"
            )


def _output_sqnr_db(weight: WeightMatrix, value: QuantizedTensor, inputs: Sequence[RowInputs]) -> float:
    """Return the SQNR of the output of the rows that saw inputs, on these inputs."""
    matrix = weight.whole().cpu().to(compute_dtype(weight.dtype))
    error = matrix - value.rows(0, value.layout.rows).dequantize(matrix.dtype).cpu()
    signal = sum(known.statistics.output_power(matrix[known.rows]) for known in inputs)
    return sqnr_db(signal, sum(known.statistics.output_power(error[known.rows]) for known in inputs))
