"""Measure how much the outputs of a model change with its weights, from gradients.

Rounding moves each weight ``w`` by ``d``. To second order, the divergence of the outputs grows by ``sum(f * d * d)``,
where ``f`` is the diagonal of the Fisher information (LeCun, Denker and Solla, "Optimal brain damage", 1990). For
logits, ``f`` is half the mean square of the gradient of the log-probability of a label that is drawn from the model's
own distribution, and the divergence is KL in nats. For other outputs, ``f`` is the mean square of the gradient in a
random direction, and the divergence is the squared error as a share of the squared output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from fewbits.calibration.batches import SAMPLES, Batches
from fewbits.calibration.losses import default_loss
from fewbits.calibration.outputs import counted, floating, named
from fewbits.calibration.replay import without_shortcuts
from fewbits.calibration.running import Forward, evaluating, run_one
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.nn.walk import find, slots
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.noise import group_sums
from fewbits.selection.progress import Progress, no_progress

#: The predicted divergence: KL of logits in nats for each position, or the mean squared error of other outputs.
Divergence = Literal["kl", "mse"]

#: Rows of logits whose probabilities are computed at a time.
_POSITIONS = 64


@attrs.frozen(eq=False)
class Curvature:
    """The curvature of one weight, as the product of a factor for each row and one for each column.

    Attributes:
        rows: float64, (rows,).
        columns: float64, (columns,).
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, scale: float) -> Curvature:
        """Return the curvature whose sums over columns and over rows are given, times a scale."""
        total = math.fsum(rows.tolist())
        return cls(rows * (scale / total if total else 0.0), columns)

    @property
    def is_zero(self) -> bool:
        """Whether no output depends on the weight."""
        return not bool(self.rows.any())

    def error(self, difference: Tensor, first: int = 0) -> float:
        """Return the divergence that a change of the weight causes.

        Args:
            difference: the change of some rows, (rows, columns).
            first: the number of the first of these rows.
        """
        squares = group_sums(difference.double().square_().mul_(self.columns))
        return math.fsum((squares * self.rows[first : first + len(squares)]).tolist())


@attrs.frozen(eq=False)
class Curvatures:
    """The curvature of every weight.

    Attributes:
        of_weights: by the name of the weight.
        divergence: the divergence that they predict.
    """

    of_weights: Mapping[str, Curvature]
    divergence: Divergence


def curvatures(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Curvatures:
    """Measure the curvature of weights, with one forward and one backward pass for each batch.

    The gradient of one weight is held at a time. The random numbers are the same in each call.

    Args:
        model: the float model. Its gradients and their settings are the same afterwards.
        layouts: the layouts of the weights, by the names of parameters or buffers.
        data: batches, as for `Quantizer.observe`.
        forward: runs one batch, and returns the output.
        samples: take this many samples of the data; None takes all of it.
        progress: called after every batch.

    Raises:
        ArgumentError: inside of `torch.inference_mode`, which records no gradients.
        CalibrationError: if there is no data, or the model cannot run it or differentiate its outputs.
    """
    if torch.is_inference_mode_enabled():
        raise ArgumentError("gradients are needed; call this outside of torch.inference_mode()")
    sums = {name: _Sums(layout) for name, layout in layouts.items()}
    batches, directions = Batches(data, samples, activity="differentiate", progress=progress), _Directions()
    with evaluating(model), without_shortcuts(model), _watched(model, sums), torch.enable_grad():
        for number, batch in batches:
            outputs, vectors = directions.of(run_one(model, batch, number, forward), batch)
            if not any(output.requires_grad for output in outputs):
                raise CalibrationError(
                    f"batch {number}: the output of {type(model).__name__} has no gradient with respect to its weights"
                )
            torch.autograd.backward(outputs, vectors)
    batches.observed()
    found = {name: Curvature.of(total.rows, total.columns, directions.scale) for name, total in sums.items()}
    return Curvatures(found, directions.divergence)


class _Sums:
    """The sums of squared gradients of one weight over columns and over rows."""

    def __init__(self, layout: Layout) -> None:
        rows, columns = layout.matrix_shape
        self.layout = layout
        self.rows, self.columns = (torch.zeros(size, dtype=torch.float64) for size in (rows, columns))

    def add(self, tensor: Tensor) -> None:
        """Add the gradient of the weight, and release it."""
        gradient, tensor.grad = tensor.grad, None
        if gradient is None:
            return
        for start, stop, rows in WeightMatrix(gradient.to_dense(), self.layout).blocks(64):
            squares = rows.double().square_().cpu()
            self.rows[start:stop] += squares.sum(1)
            self.columns += squares.sum(0)


@contextmanager
def _watched(model: nn.Module, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Add the gradients of weights to their sums, and let nothing else have gradients."""
    tensors = {id(slot.tensor): slot.tensor for slot in slots(model) if slot.tensor.is_floating_point()}
    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor in tensors.values() if tensor.is_leaf]
    hooks = []
    try:
        for tensor, _, _ in before:
            tensor.requires_grad_(False)
        for name, total in sums.items():
            tensor = find(model, name).tensor
            tensor.requires_grad_(True).grad = None
            hooks.append(tensor.register_post_accumulate_grad_hook(total.add))  # type: ignore[no-untyped-call]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, required, gradient in before:
            tensor.requires_grad_(required).grad = gradient


class _Directions:
    """Draws random directions in the space of outputs, whose mean square is the curvature of the divergence.

    Attributes:
        divergence: the divergence of the outputs; the first output decides between the two.
        count: the positions of logits, or the batches, so far.
    """

    def __init__(self) -> None:
        self.divergence: Divergence = "mse"
        self.count = 0

    @property
    def scale(self) -> float:
        """The factor of the sum of the squared gradients."""
        return (0.5 if self.divergence == "kl" else 1.0) / self.count

    def of(self, output: Any, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors of an output that count, and a random direction for each.

        Raises:
            CalibrationError: if the output has no floating tensor.
        """
        if not self.count:
            self.divergence = "kl" if default_loss(output) == "kl" else "mse"
        logits = named(output, "logits") if self.divergence == "kl" else None
        tensors = list(floating(output)) if logits is None else [logits]
        if not tensors:
            raise CalibrationError("the output of the model has no floating tensor; pass forward= that returns one")
        draw: Callable[[Tensor, torch.Generator], Tensor] = _drawn_labels
        if self.divergence == "mse":
            draw = partial(_noise, share=len(tensors))
            self.count += 1
        return tensors, [self._direction(tensor, batch, draw) for tensor in tensors]

    def _direction(self, tensor: Tensor, batch: Any, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        where, direction = counted(batch, tensor), torch.zeros_like(tensor)
        positions = tensor.detach()[where]
        generator = torch.Generator(tensor.device).manual_seed(self.count)
        direction[where] = draw(positions, generator).to(tensor.dtype)
        if self.divergence == "kl":
            self.count += positions[..., 0].numel()
        return direction


def _noise(output: Tensor, generator: torch.Generator, share: int) -> Tensor:
    """Draw normal noise whose mean square, summed, is one over the sum of the squared outputs."""
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    norm = output.float().square().sum().mul_(share).sqrt_()
    return noise / norm.clamp_(min=torch.finfo(torch.float32).tiny)


def _drawn_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label for each position, and return the gradient of minus its log-probability."""
    rows = logits.reshape(-1, logits.shape[-1])
    gradient = torch.empty(rows.shape, device=rows.device)
    for part, drawn in zip(torch.split(rows, _POSITIONS), torch.split(gradient, _POSITIONS), strict=True):
        drawn.copy_(part.float().softmax(-1))
        labels = torch.multinomial(drawn, 1, generator=generator)
        drawn.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
    return gradient.view(logits.shape)


def filled(found: Mapping[str, Curvature], names: Sequence[str]) -> dict[str, Curvature]:
    """Give weights on which no output depended the mean curvature of the elements of the others.

    Args:
        found: the curvature of every weight.
        names: the weights without curvature.
    """
    seen = [curvature for name, curvature in found.items() if name not in names]
    elements = sum(len(one.rows) * len(one.columns) for one in seen)
    total = math.fsum(float(one.rows.sum() * one.columns.sum()) for one in seen)
    mean = total / elements if elements else 1.0
    even = {
        name: Curvature(torch.full_like(found[name].rows, mean), torch.ones_like(found[name].columns)) for name in names
    }
    return {**found, **even}
