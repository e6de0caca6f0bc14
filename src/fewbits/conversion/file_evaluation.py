"""`FileEvaluation`: compares the outputs of a float model with those of a copy that holds the result for a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor, nn

from fewbits.checkpoint.codec import Value
from fewbits.conversion.recipe import described
from fewbits.errors import CalibrationError
from fewbits.nn.packed import store
from fewbits.nn.swap import attach
from fewbits.nn.walk import find, slots, structural_copy
from fewbits.numerics.quantize import cast
from fewbits.numerics.spec import CastSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress
from fewbits.sources.matching import matched_parameters
from fewbits.validation.evaluation import Evaluation
from fewbits.validation.layers import LayerErrors
from fewbits.validation.outputs import ModelReport


@attrs.frozen(eq=False)
class Compared:
    """The outcome of a comparison.

    Attributes:
        model: how the outputs of the two models compare.
        outputs: the SQNR of layers' outputs, in dB, by the names of the weights in the file.
    """

    model: ModelReport
    outputs: Mapping[str, float]


class FileEvaluation:
    """Compares the outputs of a float model with those of a copy that holds the result for a checkpoint.

    Args:
        model: the float model; it is not changed.
        ledger: the fate of each tensor of the checkpoint.
        read: returns a tensor of the checkpoint.
        evaluation: what to run.

    Raises:
        MismatchError: naming the converted tensors that are not exactly one parameter of the model.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, read: Callable[[str], Tensor], evaluation: Evaluation) -> None:
        self._model, self._ledger, self._read, self._evaluation = model, ledger, read, evaluation
        self._names = matched_parameters(model, [row.name for row in ledger.stored if row.spec is not None], read)
        self._compared: Compared | None = None
        self._error: Exception | None = None

    @property
    def limits(self) -> Mapping[str, float]:
        """The worst figures that pass, by metric."""
        return self._evaluation.limits

    @property
    def known(self) -> Compared | None:
        """The outcome of `run_early`; None before it.

        Raises:
            CalibrationError: if a batch could not be run, or its outputs could not be compared.
        """
        if self._error is not None:
            raise self._error
        return self._compared

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """The figures of `run_early` for the file; empty before it, and after an error."""
        return {} if self._compared is None else self._compared.model.to_dict()

    def inputs(self) -> list[Any]:
        """Describe everything that the figures depend on besides the checkpoint and its result."""
        return [described(part) for part in (self._evaluation.data, self._evaluation.forward, self._evaluation.metrics)]

    def run_early(self, values: Mapping[str, Value], progress: Progress) -> Mapping[str, float]:
        """Compare before the result is written. An error waits until `known` is asked for.

        Args:
            values: the codes of quantized tensors, by name.
            progress: called after every batch.

        Returns:
            the SQNR of layers' outputs, in dB, by the names of the weights; empty after an error.
        """
        self._compared = self._error = None
        try:
            self._compared = self.run(lambda name: values[name] if name in values else self._cast(name), progress)
        except Exception as error:
            self._error = error
            return {}
        return self._compared.outputs

    def run(self, value_of: Callable[[str], Value], progress: Progress) -> Compared:
        """Run the batches through both models.

        Args:
            value_of: returns the result for a tensor.
            progress: called after every batch.

        Raises:
            CalibrationError: if a batch cannot be run, or its outputs cannot be compared.
        """
        tensors = {parameter: name for name, parameter in self._names.items()}
        values = {parameter: value_of(name) for parameter, name in tensors.items()}
        rows = [attrs.evolve(self._ledger[name], name=parameter) for parameter, name in tensors.items()]
        layers = LayerErrors(self._model, Ledger(rows), values.__getitem__)
        copied = quantized_copy(self._model, values)
        model = self._evaluation.run(self._model, copied, watching=layers.watching, progress=progress)
        known = layers.sqnr_db()
        return Compared(model, {name: known[at] for name, at in self._names.items() if at in known})

    def _cast(self, name: str) -> Tensor:
        spec = self._ledger[name].spec
        if not isinstance(spec, CastSpec):
            raise CalibrationError(f"{name} has no codes to compare with")
        return cast(self._read(name), spec.dtype)


def quantized_copy(model: nn.Module, values: Mapping[str, Value]) -> nn.Module:
    """Copy a float model, and put stored weights in place of some parameters, in all modules that use them.

    Args:
        model: the model; it is not changed.
        values: codes, or tensors in a narrower dtype, by the names of the parameters.
    """
    copied = structural_copy(model)
    for name, value in values.items():
        parameter = find(copied, name).tensor
        if isinstance(value, QuantizedTensor):
            value = attrs.evolve(value, dtype=parameter.dtype)
        stored = store(value, parameter.dtype)
        places = {slot.key: slot for slot in slots(copied) if slot.tensor is parameter}
        for slot in places.values():
            attach(slot.module, slot.local, stored)
    return copied
