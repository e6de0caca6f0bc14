"""Telling somebody how far a long activity is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from fewbits.selection.ledger import LedgerRow


@attrs.frozen
class Step:
    """How far an activity is.

    Attributes:
        activity: ``"convert"``, ``"validate"`` or ``"observe"``.
        name: the tensor it is at, or the batch.
        done: what it is through with: bytes of the source, or samples of the data if it observes. It never decreases
            during an activity, and begins with what was there if the activity takes up where another run stopped.
        total: what it goes through, likewise; 0 while that is not known.
    """

    activity: str
    name: str
    done: int
    total: int

    @property
    def unit(self) -> str:
        """What `done` and `total` count: ``"bytes"`` or ``"samples"``."""
        return "samples" if self.activity == "observe" else "bytes"


#: Told about every tensor before and after it is worked on, and about every batch.
Progress = Callable[[Step], object]


def no_progress(step: Step) -> None:
    """The `Progress` that tells nobody."""


def followed(activity: str, rows: Sequence[LedgerRow], progress: Progress) -> Iterator[LedgerRow]:
    """The rows, one by one, with a step before and after each."""
    done, total = 0, sum(row.bytes_before for row in rows)
    for row in rows:
        progress(Step(activity, row.name, done, total))
        yield row
        done += row.bytes_before
        progress(Step(activity, row.name, done, total))
