"""How fast an activity is, how long it will still take, and when to say so. The caller brings the clock."""

from __future__ import annotations

import math

import attrs

from fewbits.selection.progress import Step

#: Seconds over which the rate is smoothed: what is longer ago than a few of these counts for next to nothing.
SMOOTHING = 15.0


@attrs.frozen
class Reading:
    """How far and how fast an activity is.

    Attributes:
        activity: as in `Step`.
        name: of the tensor, or the batch.
        done: as in `Step`; never less than it was.
        total: as in `Step`; never less than `done` where it is known, 0 where it is not.
        unit: of `done` and `total`, ``"bytes"`` or ``"samples"``.
        rate: units per second, lately; None before anything was done and some time has passed.
    """

    activity: str
    name: str
    done: int
    total: int
    unit: str
    rate: float | None

    @property
    def is_finished(self) -> bool:
        """Whether all of it is done; never while the total is not known."""
        return 0 < self.total == self.done

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes at this rate; None if that cannot be told."""
        if self.is_finished:
            return 0.0
        if not self.total or self.rate is None:
            return None
        return (self.total - self.done) / self.rate


class Meter:
    """Makes readings out of steps.

    The rate is a mean over time in which the past fades, so that it follows a disk that slows down and does not jump
    with every tensor. What was done before the first step of an activity does not count.
    """

    def __init__(self) -> None:
        self._activity: str | None = None
        self._done = self._counted = 0
        self._at = self._fading = self._seconds = 0.0

    def read(self, step: Step, now: float) -> Reading:
        """The reading of a step.

        Args:
            step: each one is of the same activity as the one before, or the first of another.
            now: seconds on any clock that never goes back.
        """
        if step.activity != self._activity:
            self._begin(step, now)
        self._done = max(self._done, step.done)
        self._count(now)
        rate = self._fading / self._seconds if self._seconds else None
        total = max(step.total, self._done) if step.total else 0
        return Reading(step.activity, step.name, self._done, total, step.unit, rate)

    def _begin(self, step: Step, now: float) -> None:
        self._activity, self._done, self._counted = step.activity, step.done, step.done
        self._at, self._fading, self._seconds = now, 0.0, 0.0

    def _count(self, now: float) -> None:
        """Take in what was done since the last time; time in which nothing was done waits until something is."""
        seconds, done = now - self._at, self._done - self._counted
        if seconds <= 0 or not done:
            return
        keep = math.exp(-seconds / SMOOTHING)
        self._fading = keep * self._fading + done
        self._seconds = keep * self._seconds + seconds
        self._counted, self._at = self._done, now


class Pace:
    """When to tell about an activity: not at once, not too often, and at its end if it took any time at all.

    Args:
        first: seconds into an activity before it is told about for the first time.
        every: seconds between one time and the next.
    """

    def __init__(self, first: float, every: float) -> None:
        self._first, self._every = first, every
        self._activity: str | None = None
        self._next = 0.0
        self._told = self._ended = False

    def is_due(self, reading: Reading, now: float) -> bool:
        """Whether to tell now. The end of an activity is told once, if it was told about or the time for that is up."""
        if reading.activity != self._activity:
            self._activity, self._next = reading.activity, now + self._first
            self._told = self._ended = False
        if self._ended:
            return False
        self._ended = reading.is_finished
        due = now >= self._next or (self._ended and self._told)
        if due:
            self._told, self._next = True, now + self._every
        return due
