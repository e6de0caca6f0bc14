"""`FileTuning`: tunes the scales of a checkpoint, in a quantized copy of its model, before they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from fewbits.calibration.running import Forward
from fewbits.calibration.tuning import Tuned, Tuning, tune
from fewbits.conversion.recipe import described
from fewbits.errors import ArgumentError
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import stored_weights
from fewbits.nn.swap import attach
from fewbits.nn.walk import find, slots, structural_copy, tuned_tensors
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.progress import Progress


def _only_scales(_: Any, __: Any, settings: Tuning) -> None:
    if set(settings.what) != {"scales"}:
        raise ArgumentError(f"tuning a file changes scales only, and what={list(settings.what)} asks for more")


@attrs.define(eq=False)
class FileTuning:
    """How to tune the scales of a checkpoint.

    Attributes:
        settings: the settings, which may ask for scales only.
        data: the batches to tune with.
        forward: runs one batch, and returns the output.
        samples: how many samples to take; None takes all.
        result: the result, once it is known.

    Raises:
        ArgumentError: if the settings ask for more than scales.
    """

    settings: Tuning = attrs.field(validator=_only_scales)
    data: Iterable[Any]
    forward: Forward | None
    samples: int | None
    result: Tuned | None = None

    def inputs(self) -> list[Any]:
        """Describe all that the tuned scales depend on besides the data; the number of threads decides on last bits."""
        return [described(self.settings), torch.get_num_threads()]

    def run(
        self, model: nn.Module, values: Mapping[str, QuantizedTensor], progress: Progress
    ) -> dict[str, QuantizedTensor]:
        """Tune the scales of quantized weights.

        Args:
            model: the float model; it is not changed.
            values: the quantized weights, by the names of the model's parameters.
            progress: called after every batch.

        Returns:
            the weights whose scales have changed, in the dtype of the model.
        """
        quantized = structural_copy(model)
        for name, value in values.items():
            _put(quantized, name, value)
        settings = attrs.asdict(self.settings, recurse=False)
        self.result = tune(
            quantized, model, self.data, forward=self.forward, samples=self.samples, progress=progress, **settings
        )
        changed = tuned_tensors(quantized)
        return {name: _value(quantized, name) for name in values if name in changed}


def _put(model: nn.Module, name: str, value: QuantizedTensor) -> None:
    """Put a quantized weight in all places of a parameter."""
    parameter = find(model, name).tensor
    stored = PackedWeight(attrs.evolve(value, dtype=parameter.dtype))
    places = {slot.key: slot for slot in slots(model) if slot.tensor is parameter}
    for slot in places.values():
        attach(slot.module, slot.local, stored)


def _value(model: nn.Module, name: str) -> QuantizedTensor:
    slot = find(model, name)
    stored = stored_weights(slot.module)[slot.local].value()
    if not isinstance(stored, QuantizedTensor):
        raise ArgumentError(f"{name} has no codes to tune")
    return stored
