"""Run data through a prepared model, so that observers see the inputs of its layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits._events import emit
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.nn.walk import feed
from fewbits.observers.base import Observer
from fewbits.selection.progress import Progress, Step, no_progress

#: Runs one batch through the model: ``forward(model, batch)``.
Forward = Callable[[nn.Module, Any], object]

#: The default number of samples.
SAMPLES = 150

_FED = (
    "by default (a tensor directly, a mapping as keyword arguments unless the model's forward asks for the mapping, "
    "the first element of a tuple or list); if the model takes its inputs another way, pass forward=, a function of "
    "the model and the batch"
)


@attrs.frozen
class Observed:
    """How much data `observe` ran through a prepared model.

    Attributes:
        samples: the number of samples: the sum of the lengths of the batches' first axes.
        batches: the number of batches.
        more: whether data was left when the limit on samples was reached. None if this is not known: the batches came
            from an iterable without a length, such as a generator, and asking it for another batch would lose that
            batch.
    """

    samples: int
    batches: int
    more: bool | None = False

    def __add__(self, other: Observed) -> Observed:
        left = {self.more, other.more}
        more = True if True in left else None if None in left else False
        return Observed(self.samples + other.samples, self.batches + other.batches, more)

    def __str__(self) -> str:
        left = {True: ", and data was left", None: ", and perhaps data was left", False: ""}[self.more]
        hint = " (samples=None runs all of it)" if left else ""
        return f"{_counted(self.samples, 'sample')} in {_counted(self.batches, 'batch', 'batches')}{left}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON."""
        return attrs.asdict(self)


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


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


class InputWatch:
    """Shows the first input of each layer to its observer, at every forward, while it is attached.

    The first input is the first tensor among the arguments of the module. It is not shown if it is not floating (such
    as the indices of an embedding) or has no elements (such as for an expert that gets no tokens).

    Args:
        layers: (name of the weight, a module that uses it, the observer of its inputs); tied weights have several
            modules and one observer.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module, Observer]]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._lock = threading.Lock()  # a model may run in several threads, and observers update their statistics
        self._unseen = dict.fromkeys(name for name, _, _ in layers)
        self.attach()

    def attach(self) -> None:
        """Attach the hooks."""
        self._handles = [
            module.register_forward_pre_hook(self._hook(name, observer), with_kwargs=True)
            for name, module, observer in self._layers
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Remove the hooks for the block, and attach them again only if the block raises."""
        self.remove()
        try:
            yield
        except BaseException:
            self.attach()
            raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the hooks for the block, and attach them again."""
        self.remove()
        try:
            yield
        finally:
            self.attach()

    def unseen(self) -> list[str]:
        """Return the names of the weights whose layers have had no input so far."""
        return list(self._unseen)

    def _hook(self, name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is None or not first.is_floating_point() or not first.numel():
                return
            with self._lock:
                try:
                    observer.observe_input(first.detach())
                except CalibrationError as error:
                    raise CalibrationError(f"the layer of {name}: {error}") from error
                self._unseen.pop(name, None)

        return show


def run(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Observed:
    """Run batches in eval mode and without gradients, and restore the training flags.

    No batch is kept. The number of samples of a batch is the length of the first axis of its first tensor; a batch
    without tensors, or whose first tensor is a single number, is one sample.

    Args:
        model: the prepared model.
        batches: a list of tensors, a DataLoader, or another iterable of batches; every batch that is taken is run.
        forward: runs one batch, ``forward(model, batch)``; None feeds it as `default_forward` does.
        samples: stop after this many; the batch that reaches the limit is run whole. None runs all batches. If batches
            may be left, the event ``data_left`` reports it, as a warning if the limit is the default.
        progress: called after every batch. The expected number of samples is the number of batches, if it is known,
            times the samples in the first batch.

    Returns:
        the number of samples and batches, and whether data was left.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: if `batches` is a single batch, has no batch, or a batch cannot be run.
    """
    check_batches(batches, samples)
    number, done, expected = 0, 0, 0
    with evaluating(model):
        for number, batch in enumerate(batches, 1):
            size = samples_in(batch)
            expected = expected or expected_samples(batches, size, samples)
            run_one(model, batch, number, forward)
            done += size
            progress(Step("observe", f"batch {number}", done, expected and max(done, expected)))
            if samples is not None and done >= samples:
                break
    if expected > done:
        progress(Step("observe", f"batch {number}", done, done))
    return _observed(batches, number, done, samples)


def taken(batches: Iterable[Any], samples: int | None = SAMPLES) -> list[Any]:
    """Take batches until they have this many samples, and report data that is left like `run`.

    Args:
        batches: as for `run`; batches without samples are left out.
        samples: None takes all batches.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: if `batches` is a single batch, or has no batch.
    """
    check_batches(batches, samples)
    kept: list[Any] = []
    done = 0
    for batch in batches:
        kept.append(batch)
        done += samples_in(batch)
        if samples is not None and done >= samples:
            break
    _observed(batches, len(kept), done, samples)
    return [batch for batch in kept if samples_in(batch)]


def _observed(batches: object, number: int, done: int, samples: int | None) -> Observed:
    """Describe how much data was taken, and report data that is left.

    Raises:
        CalibrationError: if there was none.
    """
    if not done:
        raise CalibrationError(
            "the data has no batch, or only batches without samples; an iterator that was used before is empty: pass a "
            "list, or a new iterator"
        )
    left: bool | None = False
    if samples is not None and done >= samples:
        length = length_of(batches)
        left = None if length is None else length > number
    observed = Observed(done, number, left)
    if observed.more is not False:
        emit("warning" if samples == SAMPLES else "info", "data_left", limit=samples, **observed.to_dict())
    return observed


def samples_in(batch: Any) -> int:
    """Return the number of samples in a batch, as `run` counts them."""
    first = _first_tensor(batch)
    return first.shape[0] if first is not None and first.dim() else 1


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def check_batches(batches: object, samples: object) -> None:
    """Refuse data that does not iterate over batches, and a limit that is no number of samples.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: for a tensor, a mapping, and objects that cannot be iterated.
    """
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ArgumentError(f"samples must be an integer from 1 up, or None for all samples, not {samples!r}")
    if isinstance(batches, (Tensor, Mapping)):
        raise CalibrationError(
            f"a single {type(batches).__name__} is one batch, not an iterable of batches; wrap it in a list: [batch]"
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            f"batches must be an iterable of batches, such as a list or a DataLoader, not {type(batches).__name__}"
        )


def expected_samples(batches: object, size: int, samples: int | None) -> int:
    """Estimate from the first batch how many samples will be run; 0 if this cannot be known."""
    total = (length_of(batches) or 0) * size
    return total if samples is None else min(total, samples)


def length_of(batches: object) -> int | None:
    """Return the number of batches; None if it is not known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


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
