"""Take batches from the data of a user, up to a number of samples, and count them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import attrs
from torch import Tensor

from fewbits._events import emit
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.selection.progress import Progress, Step, no_progress

#: The default number of samples.
SAMPLES = 150


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


class Batches:
    """Yields batches with their numbers from 1 up, and counts them. It can be iterated over once, and keeps no batch.

    The number of samples of a batch is the length of the first axis of its first tensor. A batch without tensors, or
    whose first tensor is a single number, is one sample.

    Args:
        data: a list of tensors, a DataLoader, or another iterable of batches.
        samples: stop after this many; the batch that reaches the limit is yielded whole. None yields all batches.
        activity: the activity of the steps of `progress`.
        progress: called after every batch. The expected number of samples is the number of batches, if it is known,
            times the samples in the first batch.

    Raises:
        ArgumentError: if `samples` is not a positive integer or None.
        CalibrationError: if `data` is a single batch, or cannot be iterated over.
    """

    def __init__(
        self,
        data: Iterable[Any],
        samples: int | None = None,
        *,
        activity: str = "observe",
        progress: Progress = no_progress,
    ) -> None:
        _check(data, samples)
        self._data, self._samples, self._activity, self._progress = data, samples, activity, progress
        self._length = length_of(data)
        self._number = self._done = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        expected = 0
        for number, batch in enumerate(self._data, 1):
            size = samples_in(batch)
            expected = expected or self._expected(size)
            yield number, batch
            self._number, self._done = number, self._done + size
            self._report(expected and max(self._done, expected))
            if self._samples is not None and self._done >= self._samples:
                break
        if expected > self._done:
            self._report(self._done)

    def observed(self) -> Observed:
        """Return how much data was yielded.

        If batches may be left, the event ``data_left`` reports it, as a warning if the limit is the default.

        Raises:
            CalibrationError: if there was no sample.
        """
        if not self._done:
            raise CalibrationError(
                "the data has no batch, or only batches without samples; an iterator that was used before is empty: "
                "pass a list, or a new iterator"
            )
        left: bool | None = False
        if self._samples is not None and self._done >= self._samples:
            left = None if self._length is None else self._length > self._number
        observed = Observed(self._done, self._number, left)
        if left is not False:
            level: Literal["info", "warning"] = "warning" if self._samples == SAMPLES else "info"
            emit(level, "data_left", limit=self._samples, **observed.to_dict(), advice="samples=None runs all of it")
        return observed

    def _expected(self, size: int) -> int:
        """Estimate from the first batch how many samples there will be; 0 if this cannot be known."""
        total = (self._length or 0) * size
        return total if self._samples is None else min(total, self._samples)

    def _report(self, total: int) -> None:
        self._progress(Step(self._activity, f"batch {self._number}", self._done, total))


def taken(data: Iterable[Any], samples: int | None = SAMPLES) -> list[Any]:
    """Take batches until they have this many samples, and leave out batches without samples.

    Raises:
        ArgumentError: as `Batches`.
        CalibrationError: as `Batches`, and if there is no sample.
    """
    batches = Batches(data, samples)
    kept = [batch for _, batch in batches if samples_in(batch)]
    batches.observed()
    return kept


def samples_in(batch: Any) -> int:
    """Return the number of samples in a batch, as `Batches` counts them."""
    first = _first_tensor(batch)
    return first.shape[0] if first is not None and first.dim() else 1


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def _check(batches: object, samples: object) -> None:
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


def length_of(batches: object) -> int | None:
    """Return the number of batches; None if it is not known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
