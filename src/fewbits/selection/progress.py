"""Report the progress of long activities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from fewbits.selection.row import LedgerRow


@attrs.frozen
class Step:
    """The progress of an activity.

    Attributes:
        activity: ``"convert"``, ``"validate"`` or ``"score"`` for tensors, ``"calibrate"`` for groups of weights;
            ``"observe"``, ``"differentiate"``, ``"tune"`` or ``"compare"`` for data; ``"generate"`` for text that a
            model writes.
        name: the current tensor or batch.
        done: the bytes of the source, the samples of the data, or the tokens of a text, that are done. The number never
            decreases during an activity. A resumed run begins with the amount that the earlier run finished.
        total: all bytes, samples or tokens; 0 while their number is not known.
    """

    activity: str
    name: str
    done: int
    total: int

    @property
    def unit(self) -> str:
        """The unit of `done` and `total`: ``"bytes"``, ``"samples"`` or ``"tokens"``."""
        of_data = dict.fromkeys(("observe", "differentiate", "tune", "compare"), "samples")
        return of_data.get(self.activity, "tokens" if self.activity == "generate" else "bytes")


#: Called before and after every tensor, and for every batch.
Progress = Callable[[Step], object]


def no_progress(step: Step) -> None:
    """Ignore the step: the `Progress` for no reports."""


def followed(
    activity: str, rows: Sequence[LedgerRow], progress: Progress, order: Iterable[LedgerRow] | None = None
) -> Iterator[LedgerRow]:
    """Yield the rows one by one, and report a step before and after each.

    Args:
        activity: the activity of the steps.
        rows: all rows.
        progress: called with the steps.
        order: the same rows in the order to yield; it may be an iterator that works between two rows.
    """
    done, total = 0, sum(row.bytes_before for row in rows)
    for row in rows if order is None else order:
        progress(Step(activity, row.name, done, total))
        yield row
        done += row.bytes_before
        progress(Step(activity, row.name, done, total))


class WeightSteps:
    """Reports the progress of a calibration, in bytes of weights.

    Args:
        progress: called with the steps.
        rows: the rows of all weights.
    """

    def __init__(self, progress: Progress, rows: Sequence[LedgerRow]) -> None:
        self._progress, self._done, self._total = progress, 0, sum(row.bytes_before for row in rows)

    def before(self, row: LedgerRow) -> None:
        """Report that a weight comes next."""
        self._progress(Step("calibrate", row.name, self._done, self._total))

    def after(self, row: LedgerRow) -> None:
        """Report that a weight is done."""
        self._done += row.bytes_before
        self.before(row)

    def skip(self, rows: Sequence[LedgerRow]) -> None:
        """Report that an earlier run has finished these weights."""
        self._done += sum(row.bytes_before for row in rows[:-1])
        for row in rows[-1:]:
            self.after(row)
