"""Collect the changes that tuning makes to a model, and make all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import stored_weights
from fewbits.nn.walk import mark_tuned
from fewbits.numerics.dtypes import compute_dtype


@attrs.frozen(eq=False)
class Change:
    """A change of a model that has yet to be made.

    Attributes:
        holder: the packed weight or the parameter to change.
        apply: makes the change.
        undo: takes it back.
    """

    holder: PackedWeight | nn.Parameter
    apply: Callable[[], object]
    undo: Callable[[], object]


def write(model: nn.Module, changes: Sequence[Change]) -> None:
    """Make all changes, and mark the tensors as tuned; if that fails or is interrupted, make none."""
    holders = {change.holder for change in changes}
    with ExitStack() as undo:
        for change in changes:
            undo.callback(change.undo)
            change.apply()
        for module in model.modules():
            held = {**module._parameters, **stored_weights(module)}
            for local in [local for local, holder in held.items() if holder in holders]:
                mark_tuned(module, local)
        undo.pop_all()


@attrs.define(eq=False)
class FreedParameter:
    """A parameter that is tuned, in memory of its own.

    Attributes:
        parameter: the parameter.
        original: its values before, in the memory that it had.
        latent: its values in float32 (float64 for float64), which the optimizer changes.
    """

    parameter: nn.Parameter
    original: Tensor
    latent: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> FreedParameter:
        """Give the parameter new memory: the old memory may belong to the float model too."""
        original = parameter.data
        latent = original.to(compute_dtype(original.dtype), copy=True).requires_grad_(True)
        parameter.data = original.clone()
        parameter.grad = None
        parameter.requires_grad_(True)
        return cls(parameter, original, latent)

    def take_gradient(self) -> None:
        """Move the gradient of the parameter to `latent`."""
        grad = self.parameter.grad
        self.latent.grad = None if grad is None else grad.to(self.latent.dtype)
        self.parameter.grad = None

    def change(self) -> Change | None:
        """Return how to write the values into the parameter; None if they are as before."""
        parameter, values = self.parameter, self.parameter.data
        if torch.equal(values, self.original):
            return None
        return Change(parameter, partial(_set_data, parameter, values), partial(_set_data, parameter, self.original))

    def update(self) -> None:
        """Write `latent` to the parameter, rounded to its dtype."""
        self.parameter.data.copy_(self.latent)


def _set_data(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.data = values


@contextmanager
def freed(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[list[FreedParameter]]:
    """Turn on the gradients of the chosen parameters of a model, and turn off all others, inside the block.

    Afterwards all parameters have their old values, flags and gradients.
    """
    before = [(parameter, parameter.data, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(False)
        yield [FreedParameter.of(parameter) for parameter in chosen]
    finally:
        for parameter, data, requires_grad, grad in before:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
