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


class Meter(Progress):
    """Turns steps into readings. `rich.progress` estimates the rate, and draws a meter that was started.

    Work that an earlier run did before the first step of an activity does not count.

    Args:
        console: the console to draw on; None for a meter that never starts.

    Attributes:
        reading: the last reading; None before the first step.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._now = self._updated = 0.0
        self.reading: Reading | None = None
        self._first = 0
        super().__init__(
            console=console,
            refresh_per_second=4,
            speed_estimate_period=PERIOD,
            transient=True,
            redirect_stdout=False,
            get_time=lambda: self._now,
        )
        self._task = self.add_task("", total=None)

    def read(self, step: Step, now: float) -> Reading:
        """Take the reading of a step.

        Args:
            step: a step of the same activity as the step before, or the first step of another activity.
            now: seconds on a clock that never goes back.
        """
        self._now = now
        last = self.reading
        if last is None or step.activity != last.activity:
            self.reset(self._task, completed=step.done)
            self._first, self._updated = step.done, now
            done = step.done
        else:
            done = max(last.done, step.done)
        self.reading = Reading(step.activity, step.name, done, max(step.total, done), self._rate(done))
        return self.reading

    def _rate(self, done: int) -> float | None:
        """The speed of the last seconds, or of the whole activity while too few steps lie within them."""
        if self._now > self._updated:  # steps at the same instant have no speed: they count with the next one
            self.update(self._task, completed=done)
            self._updated = self._now
        (task,) = self.tasks
        mean = (done - self._first) / task.elapsed if task.elapsed else None
        return task.speed or mean or None


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
