"""How far and how fast an activity is, and when to report it. The caller brings the clock."""

from __future__ import annotations

import attrs
from rich.console import Console
from rich.progress import Progress

from fewbits.selection.progress import Step

#: Seconds over which `rich.progress` averages the rate.
PERIOD = 30.0


@attrs.frozen
class Reading:
    """How far and how fast an activity is.

    Attributes:
        activity: ``"generate"``, ``"observe"``, ``"calibrate"``, ``"convert"`` or ``"validate"``.
        name: the name of the current tensor or batch.
        done: the number of bytes, samples or tokens that are done; it never decreases during an activity.
        total: the number to do; at least `done`.
        rate: bytes, samples or tokens per second; None until something is done and time has passed.
        unit: the unit of the numbers.
    """

    activity: str
    name: str
    done: int
    total: int
    rate: float | None
    unit: str = "bytes"

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


class Meter(Progress):
    """Turns steps into readings; `rich.progress` measures the rate.

    Work that an earlier run did before the first step of an activity does not count.

    Args:
        console: where to draw, for a subclass that draws; None if the meter is never started.

    Attributes:
        reading: the last reading; None before the first step.
    """

    reading: Reading | None = None

    def __init__(self, console: Console | None = None) -> None:
        self._now = 0.0
        super().__init__(
            console=console,
            speed_estimate_period=PERIOD,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            get_time=lambda: self._now,
        )

    def read(self, step: Step, now: float) -> Reading:
        """Take the reading of a step.

        Args:
            step: a step of the same activity as the step before, or the first step of another activity.
            now: seconds on a clock that never goes back.
        """
        self._now, done = now, step.done
        if self.reading is None or step.activity != self.reading.activity:
            for task in self.task_ids:
                self.remove_task(task)
            self.add_task(step.activity, total=None, completed=done)
            self._first = self._latest = (now, done)
        else:
            done = max(done, self.reading.done)
        total = max(step.total, done)
        self.reading = Reading(step.activity, step.name, done, total, self._rate(now, done), step.unit)
        return self.reading

    def _rate(self, now: float, done: int) -> float | None:
        """The speed of the last seconds, or of the whole activity while too few steps lie within them."""
        task = self.tasks[0]
        # Steps at the same instant have no speed: they count with the next one.
        if now > self._latest[0] and done > self._latest[1]:
            self.update(task.id, completed=done)
            self._latest = (now, done)
        if self._latest == self._first:
            return None
        (start, before), (end, after) = self._first, self._latest
        return task.speed or (after - before) / (end - start)


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
