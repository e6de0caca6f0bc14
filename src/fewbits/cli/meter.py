"""How far and how fast an activity is, and when to report it. The caller brings the clock."""

from __future__ import annotations

from collections import deque

import attrs

from fewbits.selection.progress import Step

#: Seconds over which the rate is averaged.
PERIOD = 30.0


@attrs.frozen
class Reading:
    """How far and how fast an activity on bytes is.

    Attributes:
        activity: ``"convert"`` or ``"validate"``.
        name: the name of the current tensor.
        done: the number of bytes that are done; it never decreases during an activity.
        total: the number of bytes to do; at least `done`.
        rate: bytes per second; None until something is done and time has passed.
    """

    activity: str
    name: str
    done: int
    total: int
    rate: float | None

    @property
    def is_finished(self) -> bool:
        """Whether everything is done."""
        return self.done == self.total

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate; None while the rate is unknown."""
        if self.is_finished:
            return 0.0
        return None if self.rate is None else (self.total - self.done) / self.rate


class Meter:
    """Turns steps into readings. Work that an earlier run did before the first step of an activity does not count.

    Attributes:
        reading: the last reading; None before the first step.
    """

    reading: Reading | None = None

    def read(self, step: Step, now: float) -> Reading:
        """Take the reading of a step.

        Args:
            step: a step of the same activity as the step before, or the first step of another activity.
            now: seconds on a clock that never goes back.
        """
        done = step.done
        if self.reading is None or step.activity != self.reading.activity:
            self._start = (now, done)
            self._marks = deque([self._start], maxlen=1000)
        else:
            done = max(done, self.reading.done)
        self.reading = Reading(step.activity, step.name, done, max(step.total, done), self._rate(now, done))
        return self.reading

    def _rate(self, now: float, done: int) -> float | None:
        """The speed of the last seconds, or of the whole activity while too few steps lie within them."""
        latest = self._marks[-1]
        if (
            now > latest[0] and done > latest[1]
        ):  # steps at the same instant have no speed: they count with the next one
            latest = (now, done)
            self._marks.append(latest)
        while self._marks[0] != latest and self._marks[0][0] < now - PERIOD:
            self._marks.popleft()
        first = self._start if self._marks[0] == latest else self._marks[0]
        return (latest[1] - first[1]) / (latest[0] - first[0]) if latest != first else None


class Pace:
    """When to report an activity: neither at once nor too often, and at its end unless it was short.

    Args:
        first: seconds into an activity before its first report.
        every: seconds between two reports.
    """

    def __init__(self, first: float, every: float) -> None:
        self._first, self._every = first, every
        self._activity: str | None = None
        self._next = 0.0
        self._reported = self._ended = False

    def is_due(self, reading: Reading, now: float) -> bool:
        """Whether to report now. The end is reported once, if `first` seconds have passed or a report came before."""
        if reading.activity != self._activity:
            self._activity, self._next = reading.activity, now + self._first
            self._reported = self._ended = False
        if self._ended:
            return False
        self._ended = reading.is_finished
        due = now >= self._next or (self._ended and self._reported)
        if due:
            self._reported, self._next = True, now + self._every
        return due
