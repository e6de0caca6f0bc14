"""`Descent`: gradient descent on the factors of scales, which keeps the state that is best on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._events import emit
from fewbits.calibration.batches import samples_in
from fewbits.calibration.changes import Change, FreedParameter
from fewbits.calibration.factors import ScaledWeight
from fewbits.calibration.losses import Loss, default_loss, loss_of
from fewbits.calibration.running import Forward, run_one
from fewbits.errors import CalibrationError, NonFiniteError
from fewbits.selection.progress import Progress, Step

#: About how often in an epoch the model is measured on the held-out batches: from here up to twice as often.
_CHECKS = 4

#: A batch with its number, for messages.
Numbered = tuple[int, Any]


@attrs.frozen
class Check:
    """The loss on the held-out batches at some step.

    Attributes:
        step: how many batches the model was trained on.
        held_out: the loss, measured with scales in their stored dtype.
    """

    step: int
    held_out: float


@attrs.define(eq=False)
class Comparison:
    """Compares the outputs of two models.

    Attributes:
        quantized: the quantized model.
        reference: the float model.
        forward: runs one batch through a model.
        loss: the loss; None is replaced by the default for the first output of the reference.
    """

    quantized: nn.Module
    reference: nn.Module
    forward: Forward | None
    loss: Loss | None

    @property
    def name(self) -> str:
        """The name of the loss."""
        return str(getattr(self.loss, "__name__", self.loss))

    def run(self, model: nn.Module, batch: Numbered) -> object:
        """Run one batch through one of the models."""
        return run_one(model, batch[1], batch[0], self.forward)

    def of(self, batch: Numbered) -> Tensor:
        """Return the loss of one batch; gradients reach the quantized model.

        Raises:
            NonFiniteError: if it is NaN or Inf.
        """
        with torch.no_grad():
            expected = self.run(self.reference, batch)
        self.loss = self.loss or default_loss(expected)
        loss = loss_of(self.loss, self.run(self.quantized, batch), expected, batch[1])
        if not math.isfinite(found := float(loss.detach())):
            raise NonFiniteError(f"the loss of batch {batch[0]} is {found}; check the data, or tune with float32")
        return loss

    def mean(self, batches: Sequence[Numbered]) -> float:
        """Return the mean loss of some batches, weighted by their samples."""
        with torch.no_grad():
            losses = [(float(self.of(batch)), samples_in(batch[1])) for batch in batches]
        return math.fsum(loss * size for loss, size in losses) / sum(size for _, size in losses)


class Descent:
    """Trains factors and parameters with Adam, a batch at a time.

    Args:
        comparison: gives the loss.
        weights: the weights whose scales are tuned.
        parameters: the parameters that are tuned.
        held_out: the batches to measure on.

    Attributes:
        checks: the measurements so far; the first is of the state before training.
        best: the measurement with the least loss; its state is kept.
    """

    def __init__(
        self,
        comparison: Comparison,
        weights: Sequence[ScaledWeight],
        parameters: Sequence[FreedParameter],
        held_out: Sequence[Numbered],
    ) -> None:
        self._comparison, self._weights, self._parameters = comparison, weights, parameters
        self._held_out = held_out
        self._tensors = [weight.by_row for weight in weights] + [parameter.latent for parameter in parameters]
        self.checks: list[Check] = []
        self.best = Check(0, math.inf)
        self._state: list[Tensor] = []

    def run(self, batches: Sequence[Numbered], epochs: int, learning_rate: float, progress: Progress) -> None:
        """Train on the batches."""
        steps = epochs * len(batches)
        total = epochs * sum(samples_in(batch) for _, batch in batches)
        self._check(0)
        optimizer, done = self._optimizer(), 0
        for step, batch in enumerate(_ordered(batches, epochs), 1):
            if step == steps // 2 + 1 and step > 1:
                optimizer = self._refined()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            self._step(batch, optimizer)
            done += samples_in(batch[1])
            progress(Step("tune", f"batch {batch[0]}", done, total))
            if step == steps or step % max(1, len(batches) // _CHECKS) == 0:
                self._check(step)

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._tensors, betas=(0.9, 0.99))

    def _step(self, batch: Numbered, optimizer: torch.optim.Optimizer) -> None:
        with torch.enable_grad():
            loss = self._comparison.of(batch)
            _backward(loss)
        for parameter in self._parameters:
            parameter.take_gradient()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in self._parameters:
            parameter.update()

    def _refined(self) -> torch.optim.Optimizer:
        """Go back to the best state, and give each scale a factor of its own."""
        self._restore()
        self._tensors += [tensor for weight in self._weights if (tensor := weight.tune_each_scale()) is not None]
        return self._optimizer()

    def _check(self, step: int) -> None:
        found = Check(step, self._comparison.mean(self._held_out))
        self.checks.append(found)
        emit("info", "tuning", **attrs.asdict(found))
        if found.held_out < self.best.held_out:
            self.best, self._state = found, [tensor.detach().clone() for tensor in self._tensors]

    def changes(self) -> list[Change]:
        """Go to the best state, and return the changes from the state before training."""
        self._restore()
        found = [weight.change() for weight in self._weights] + [part.change() for part in self._parameters]
        return [change for change in found if change is not None]

    def _restore(self) -> None:
        """Go back to the best state."""
        with torch.no_grad():
            # Factors that were added later were 1.
            for at, tensor in enumerate(self._tensors):
                tensor.copy_(self._state[at]) if at < len(self._state) else tensor.zero_()
        for parameter in self._parameters:
            parameter.update()


def _backward(loss: Tensor) -> None:
    """Compute gradients.

    Raises:
        CalibrationError: if the loss has none.
    """
    if not loss.requires_grad:
        raise CalibrationError(
            "the output has no gradient with respect to the tuned tensors: the data does not reach them, or the "
            "forward turns gradients off"
        )
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise CalibrationError(f"the model cannot be differentiated: {error}") from error


def _ordered(batches: Sequence[Numbered], epochs: int) -> Iterator[Numbered]:
    """Yield all batches in each epoch, in an order that depends only on the number of batches."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for at in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[at]
