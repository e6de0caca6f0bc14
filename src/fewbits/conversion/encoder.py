"""`TensorEncoder`: turns one tensor into its stored form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from fewbits.checkpoint.codec import Value
from fewbits.errors import ArgumentError, CalibrationError, NumericsError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.plain import not_plain
from fewbits.numerics.quantize import cast, check_finite, quantize
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.rounding.nearest import RoundToNearest
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress
from fewbits.selection.row import LedgerRow

#: Makes the codes of one weight; see `fewbits.Quantizer.quantize_tensor`.
QuantizeTensor = Callable[[WeightMatrix, QuantSpec, Observer], QuantizedTensor]


@attrs.frozen(eq=False)
class TensorEncoder:
    """Turns one tensor into its stored form: codes and scales, or another dtype.

    Attributes:
        scheme: the name of the scheme's class, for messages.
        recipe: everything that decides on the codes besides the ledger and the tensors; a resumed run compares it with
            `fewbits.conversion.recipe.described`.
        rounding: picks the codes.
        quantize_tensor: how the scheme makes codes, if it does not leave that to `rounding`.
        inputs: other things that decide on the codes, as JSON; the keys are their names in messages.
    """

    scheme: str
    recipe: object
    rounding: Rounding
    quantize_tensor: QuantizeTensor | None = None
    inputs: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def by_rows(self) -> bool:
        """Whether a few rows of a weight get the same codes alone as within the whole weight."""
        return self.quantize_tensor is None

    def begin(self, folder: Path, progress: Progress) -> None:
        """Do work on several tensors at once, before the first tensor is encoded.

        Args:
            folder: a folder for finished work, which a resumed run finds again.
            progress: called before and after each weight.
        """

    def remarked(self, ledger: Ledger) -> Ledger:
        """Return a ledger with remarks on how tensors were encoded."""
        return ledger

    def output_sqnr_db(self, ledger: Ledger) -> Mapping[str, float]:
        """Return the SQNR of layers' outputs, in dB, by the names of the weights in a ledger, as far as it is known."""
        return {}

    @property
    def model_metrics(self) -> Mapping[str, float | None]:
        """How the outputs of the model compare with those of the float model; empty if it was not run."""
        return {}

    def encode(
        self, row: LedgerRow, tensor: Tensor, observer: Observer | None, inputs: Sequence[RowInputs] = ()
    ) -> Value:
        """Encode one tensor.

        Args:
            row: the tensor's row in the ledger.
            tensor: the values of the tensor.
            observer: chooses the scales, if the tensor gets codes.
            inputs: what `rounding` needs to know of the inputs of the tensor's rows.

        Raises:
            NumericsError: if the tensor holds NaN or Inf, or `quantize_tensor` breaks its contract.
        """
        if isinstance(row.spec, CastSpec):
            return cast(tensor, row.spec.dtype)
        if row.spec is None or row.layout is None or observer is None:
            raise ArgumentError(f"{row.name} is {row.fate}; only quantized and cast tensors are converted")
        weight, spec = WeightMatrix(tensor, row.layout), row.spec.weight_only()
        if self.quantize_tensor is None:
            if type(self.rounding) is RoundToNearest:
                return quantize(weight, spec, observer.observe_weight)  # the same codes, a block at a time
            return self.rounding.quantize(weight, spec, observer, inputs)
        check_finite(tensor)  # `quantize` checks each block
        value = self.quantize_tensor(weight, spec, observer)
        self._check(value, spec, row)
        return value

    def _check(self, value: object, spec: QuantSpec, row: LedgerRow) -> None:
        """Refuse a result of `quantize_tensor` that breaks its contract."""
        call = f"{self.scheme}.quantize_tensor"
        if not isinstance(value, QuantizedTensor):
            raise NumericsError(f"{call} returned a {type(value).__name__}, not a QuantizedTensor")
        if (value.spec, value.layout, value.dtype) != (spec, row.layout, row.dtype):
            raise NumericsError(
                f"{call} returned {value.spec} of shape {value.shape} in {dtype_name(value.dtype)}; "
                "it must keep the spec, layout and dtype it was given"
            )
        for part, tensor in value.parts().items():
            if why := not_plain(tensor):
                raise NumericsError(f"{call} returned a QuantizedTensor whose part {part!r} {why}")


@contextmanager
def naming(row: LedgerRow) -> Iterator[None]:
    """Put the tensor's name, shape, dtype and scheme in front of an error about its numbers."""
    try:
        yield
    except (NumericsError, CalibrationError) as error:
        where = f"{row.name}, shape {row.shape}, {dtype_name(row.dtype)}, to {row.scheme}"
        raise type(error)(f"{where}: {error}") from error
