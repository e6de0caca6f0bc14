"""Running data through a prepared model, so that observers see what its layers see."""

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
from fewbits.nn.feeding import feed
from fewbits.observers.base import Observer
from fewbits.selection.progress import Progress, Step, no_progress

#: Runs one batch through the model: ``forward(model, batch)``.
Forward = Callable[[nn.Module, Any], object]

#: How many samples are looked at unless asked for others.
SAMPLES = 150

#: With fewer samples than this, nobody is told how far calibration is.
TOLD_FROM = 50

_FED = (
    "by itself (a tensor as it is, a mapping as keyword arguments unless the model's forward asks for the mapping, of "
    "a tuple or list the first element); if the model takes its inputs another way, pass forward=, a function of the "
    "model and the batch"
)


@attrs.frozen
class Observed:
    """How much data `observe` ran through a prepared model.

    Attributes:
        samples: the number of samples: the lengths of the first axes of the batches, added up.
        batches: the number of batches.
        more: whether data was left when the limit on samples was reached. None if nobody knows: the batches came from
            something without a length, such as a generator, and to ask it for one more would lose that batch.
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
        """A JSON-able description."""
        return attrs.asdict(self)


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def default_forward(model: nn.Module, batch: Any) -> object:
    """Feed a tensor as it is, a mapping as `feed` does, and of a tuple or list, (input, target...), the input.

    Raises:
        CalibrationError: for anything else.
    """
    if isinstance(batch, (Tensor, Mapping)):
        return feed(model, batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    raise CalibrationError(
        f"a batch of type {type(batch).__name__} cannot be fed by itself: yield tensors, (input, target) pairs or "
        "mappings, or pass forward=, a function of the model and the batch"
    )


class InputWatch:
    """Shows a layer's first input to an observer, at every forward, for as long as it is attached.

    The first input is the first tensor among the arguments of the module. One that is not floating (the indices of an
    embedding), or has no elements (an expert that no token was sent to), is not shown.

    Args:
        layers: (name of the weight, a module that uses it, the observer that wants its inputs); tied weights have
            several modules and one observer.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module, Observer]]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._lock = threading.Lock()  # observers add up what they see, and a model may run in several threads
        self._seen: dict[str, int] = {name: 0 for name, _, _ in layers}
        self.attach()

    def attach(self) -> None:
        """Begin to watch."""
        self._handles = [
            module.register_forward_pre_hook(self._hook(name, observer), with_kwargs=True)
            for name, module, observer in self._layers
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Without hooks inside; they come back only if the block raises."""
        self.remove()
        try:
            yield
        except BaseException:
            self.attach()
            raise

    def unseen(self) -> list[str]:
        """The names of the weights whose layers have had no input so far."""
        return [name for name, inputs in self._seen.items() if not inputs]

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
                self._seen[name] += 1

        return show


def run(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Observed:
    """Run batches in eval mode and without gradients; the training flags are as before afterwards.

    Nothing of a batch is kept. How many samples are in one is the length of the first axis of its first tensor; a
    batch without tensors, or with a single number, is one sample.

    Args:
        model: the prepared model.
        batches: such as a list of tensors, or a DataLoader; nothing is taken from it beyond what is run.
        forward: runs one batch, ``forward(model, batch)``; None feeds it as `default_forward` does.
        samples: stop after this many; the batch that reaches them is run whole. None runs all batches. If batches may
            be left, the event ``data_left`` says so: a warning where the limit is the default, which nobody has chosen.
        progress: told after every batch, if at least 50 samples are expected or were seen. What is expected follows
            from the number of batches, if it is known, and the samples in the first one.

    Returns:
        how much was run, and whether that was all.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: if `batches` is a single batch, or there is none, or one cannot be run.
    """
    _refuse_other_than_batches(batches)
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ArgumentError(f"samples must be an integer from 1 up, or None for all there are, not {samples!r}")
    number, done, expected = 0, 0, 0
    with _evaluating(model):
        for number, batch in enumerate(batches, 1):
            size = samples_in(batch)
            expected = expected or _expected(batches, size, samples)
            _run_one(model, batch, number, forward)
            done += size
            if max(done, expected) >= TOLD_FROM:
                progress(Step("observe", f"batch {number}", done, expected and max(done, expected)))
            if samples is not None and done >= samples:
                break
    if expected > done and expected >= TOLD_FROM:
        progress(Step("observe", f"batch {number}", done, done))
    if not done:
        raise CalibrationError(
            "there was no batch to observe, or none with a sample in it; an iterator that is used up yields nothing a "
            "second time"
        )
    observed = Observed(done, number, _left(batches, number, done, samples))
    if observed.more is not False:
        emit("warning" if samples == SAMPLES else "info", "data_left", limit=samples, **observed.to_dict())
    return observed


def _left(batches: object, number: int, done: int, samples: int | None) -> bool | None:
    """Whether there are batches behind the last one that was run; None if that cannot be known."""
    if samples is None or done < samples:
        return False
    length = _length(batches)
    return None if length is None else length > number


def samples_in(batch: Any) -> int:
    """How many samples a batch holds, as `run` counts them."""
    first = _first_tensor(batch)
    return first.shape[0] if first is not None and first.dim() else 1


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _refuse_other_than_batches(batches: object) -> None:
    """Refuse what would be iterated, but not by batches.

    Raises:
        CalibrationError: for a tensor or a mapping, and for what cannot be iterated at all.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise CalibrationError(
            f"a single {type(batches).__name__} is one batch, not an iterable of batches; wrap it in a list: [batch]"
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            f"batches must be an iterable of batches, such as a list or a DataLoader, not {type(batches).__name__}"
        )


def _expected(batches: object, size: int, samples: int | None) -> int:
    """How many samples will be run, judging by the first batch; 0 if it cannot be known."""
    total = (_length(batches) or 0) * size
    return total if samples is None else min(total, samples)


def _length(batches: object) -> int | None:
    """The number of batches; None if it is not known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards the modules that were training are training again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _run_one(model: nn.Module, batch: Any, number: int, forward: Forward | None) -> None:
    """Run one batch.

    Raises:
        CalibrationError: if it fails, saying which batch, and how it was fed.
    """
    try:
        (forward or default_forward)(model, batch)
    except CalibrationError as error:
        raise CalibrationError(f"batch {number}: {error}") from error
    except Exception as error:
        raise CalibrationError(
            f"batch {number}, of type {type(batch).__name__}, made {type(model).__name__} fail with "
            f"{type(error).__name__}: {error}. It was fed {_FED if forward is None else 'by your forward='}"
        ) from error
