"""`PlannedTuning`: the tuning that follows a quantization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from fewbits.calibration.running import Forward
from fewbits.calibration.tuning import Tuned, Tuning, check_divisible, tune
from fewbits.conversion.file_evaluation import quantized_copy
from fewbits.conversion.recipe import described
from fewbits.errors import ArgumentError
from fewbits.nn.stored import stored_weights
from fewbits.nn.walk import find, tuned_tensors
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress


@attrs.define(eq=False)
class PlannedTuning:
    """The tuning that follows the quantization of a model, or of a checkpoint.

    Attributes:
        settings: the settings.
        reference: the float model; it is not changed.
        data: the batches to tune with.
        forward: runs one batch, and returns the output.
        samples: how many samples to take; None takes all.
        result: the result, once the tuning has run.
    """

    settings: Tuning
    reference: nn.Module
    data: Iterable[Any]
    forward: Forward | None
    samples: int | None
    result: Tuned | None = None

    @classmethod
    def of(
        cls,
        tune: int | Tuning,
        reference: object,
        data: Iterable[Any] | None,
        forward: Forward | None,
        samples: int | None,
        *,
        inplace: bool,
    ) -> PlannedTuning:
        """Make a plan from the arguments of `fewbits.quantize`.

        Args:
            tune: a number of epochs, or settings.
            reference: the float model.
            data: see the attributes of this class, as for the next two.
            forward: runs one batch.
            samples: how many samples to take.
            inplace: whether the float model itself will be quantized.

        Raises:
            ArgumentError: if something that tuning needs is missing.
            CalibrationError: if the data has one batch, and no other data is held out.
        """
        settings = Tuning.of(tune)
        if not isinstance(reference, nn.Module):
            raise ArgumentError(
                "tune= needs a model: a state dict or a file has no forward; a file may come with model="
            )
        if inplace:
            raise ArgumentError("tune= needs the float model beside the quantized one, and inplace=True replaces it")
        if data is None:
            raise ArgumentError("tune= needs data=, batches for the model")
        if isinstance(data, Iterator):
            raise ArgumentError("tune= reads the data more than once; pass a list or a DataLoader, not an iterator")
        if settings.held_out is None:
            check_divisible(data)
        return cls(settings, reference, data, forward, samples)

    def run(self, quantized: nn.Module, progress: Progress) -> None:
        """Tune a quantized model in place.

        Args:
            quantized: the quantized model.
            progress: called after every batch.
        """
        settings = attrs.asdict(self.settings, recurse=False) | {"samples": self.samples, "progress": progress}
        self.result = tune(quantized, self.reference, self.data, forward=self.forward, **settings)

    def check_ledger(self, ledger: Ledger) -> None:
        """Refuse a plan without scales.

        Args:
            ledger: the fate of each tensor.

        Raises:
            ArgumentError: with the schemes of the ledger.
        """
        specs = [row.spec for row in ledger.stored if row.spec is not None]
        if not any(isinstance(spec, QuantSpec) for spec in specs):
            schemes = ", ".join(dict.fromkeys(map(str, specs)))
            raise ArgumentError(
                f"tune= changes scales, and {schemes} has none; leave out tune=, or choose a scheme like int4"
            )

    # The scales of a checkpoint.

    def check_for_file(self) -> None:
        """Refuse settings that ask for more than scales, because the other tensors of a file are copied.

        Raises:
            ArgumentError: with the settings.
        """
        if set(self.settings.what) != {"scales"}:
            raise ArgumentError(f"tuning a file changes scales only, and what={list(self.settings.what)} asks for more")

    def inputs(self) -> list[Any]:
        """Describe all that the tuned scales depend on besides the data. The number of threads changes last bits."""
        return [described(self.settings), torch.get_num_threads()]

    def tuned_values(self, values: Mapping[str, QuantizedTensor], progress: Progress) -> dict[str, QuantizedTensor]:
        """Tune the scales of quantized weights in a quantized copy of the float model.

        Args:
            values: the quantized weights, by the names of the model's parameters.
            progress: called after every batch.

        Returns:
            the weights whose scales have changed, in the dtype of the model.
        """
        quantized = quantized_copy(self.reference, values)
        self.run(quantized, progress)
        changed = tuned_tensors(quantized)
        return {name: _value(quantized, name) for name in values if name in changed}


def _value(model: nn.Module, name: str) -> QuantizedTensor:
    slot = find(model, name)
    stored = stored_weights(slot.module)[slot.local].value()
    if not isinstance(stored, QuantizedTensor):
        raise ArgumentError(f"{name} has no codes to tune")
    return stored
