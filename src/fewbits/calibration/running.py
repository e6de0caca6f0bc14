"""Run data through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.batches import SAMPLES, Batches, Observed
from fewbits.errors import CalibrationError
from fewbits.nn.walk import feed
from fewbits.selection.progress import Progress, no_progress

#: Runs one batch through the model: ``forward(model, batch)``.
Forward = Callable[[nn.Module, Any], object]

_FED = (
    "by default (a tensor directly, a mapping as keyword arguments unless the model's forward asks for the mapping, "
    "the first element of a tuple or list); if the model takes its inputs another way, pass forward=, a function of "
    "the model and the batch"
)


def default_forward(model: nn.Module, batch: Any) -> object:
    """Feed a batch: a tensor directly, a mapping as `feed` does, the first element of a tuple or list (input, target).

    Raises:
        CalibrationError: for any other batch.
    """
    if isinstance(batch, (Tensor, Mapping)):
        return feed(model, batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    raise CalibrationError(
        f"a batch of type {type(batch).__name__} cannot be fed by default: yield tensors, (input, target) pairs or "
        "mappings, or pass forward=, a function of the model and the batch"
    )


def run(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Observed:
    """Run batches in eval mode and without gradients, and restore the training flags.

    Args:
        model: the prepared model.
        batches: a list of tensors, a DataLoader, or another iterable of batches; see `Batches`.
        forward: runs one batch, ``forward(model, batch)``; None feeds it as `default_forward` does.
        samples: stop after this many; None runs all batches.
        progress: called after every batch.

    Returns:
        the number of samples and batches, and whether data was left.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: if `batches` is a single batch, has no batch, or a batch cannot be run.
    """
    counted = Batches(batches, samples, progress=progress)
    with evaluating(model):
        for number, batch in counted:
            run_one(model, batch, number, forward)
    return counted.observed()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Use eval mode and no gradients inside the block; afterwards restore training mode where it was set."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_one(model: nn.Module, batch: Any, number: int, forward: Forward | None) -> object:
    """Run one batch, and return the output.

    Raises:
        CalibrationError: if the batch fails; the message says which batch, and how it was fed.
    """
    try:
        return (forward or default_forward)(model, batch)
    except CalibrationError as error:
        raise CalibrationError(f"batch {number}: {error}") from error
    except Exception as error:
        raise CalibrationError(
            f"batch {number}, of type {type(batch).__name__}, made {type(model).__name__} fail with "
            f"{type(error).__name__}: {error}. It was fed {_FED if forward is None else 'by your forward='}"
        ) from error
