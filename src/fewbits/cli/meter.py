"""How far and how fast an activity is, and when to report it. The caller brings the clock."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from rich.console import Console, RenderableType
from rich.progress import Progress

from fewbits.selection.progress import Step

#: Seconds over which `rich.progress` averages the rate.
PERIOD = 30.0


@attrs.frozen
class Reading:
    """How far and how fast an activity is.

    Attributes:
        activity: as in `Step`.
        name: of the tensor, or the batch.
        done: as in `Step`; it never decreases during an activity.
        total: as in `Step`; at least `done`, or 0 while the total is unknown.
        unit: of `done` and `total`, ``"bytes"`` or ``"samples"``.
        rate: units per second; None until something is done and time has passed.
    """

    activity: str
    name: str
    done: int
    total: int
    unit: str
    rate: float | None

    @property
    def is_finished(self) -> bool:
        """Whether everything is done. False while the total is unknown."""
        return 0 < self.total == self.done

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at this rate; None while the rate or the total is unknown."""
        if self.is_finished:
            return 0.0
        if not self.total or self.rate is None:
            return None
        return (self.total - self.done) / self.rate


class Meter(Progress):
    """Turns steps into readings, and draws the last one once `start` was called.

    `rich.progress` estimates the rate. Work that an earlier run did before the first step of an activity does not
    count.

    Args:
        console: where to draw; None for a meter that never starts.
        draw: renders a reading.
    """

    def __init__(self, console: Console | None = None, draw: Callable[[Reading], RenderableType] = str) -> None:
        self._now = self._updated = 0.0
        self._draw = draw
        self._reading: Reading | None = None
        self._first = self._done = 0
        super().__init__(
            console=console,
            refresh_per_second=4,
            speed_estimate_period=PERIOD,
            transient=True,
            redirect_stdout=False,
            get_time=lambda: self._now,
        )

    def read(self, step: Step, now: float) -> Reading:
        """Take the reading of a step.

        Args:
            step: of the same activity as the step before, or the first of another activity.
            now: seconds on a clock that never goes back.
        """
        self._now = now
        if self._reading is None or step.activity != self._reading.activity:
            self._begin(step)
        self._done = max(self._done, step.done)
        total = max(step.total, self._done) if step.total else 0
        self._reading = Reading(step.activity, step.name, self._done, total, step.unit, self._rate())
        return self._reading

    def get_renderable(self) -> RenderableType:
        """Draw the last reading."""
        return "" if self._reading is None else self._draw(self._reading)

    def _begin(self, step: Step) -> None:
        for task in self.task_ids:
            self.remove_task(task)
        self.add_task(step.activity, total=None, completed=step.done)
        self._first = self._done = step.done
        self._updated = self._now

    def _rate(self) -> float | None:
        """The speed of the last seconds, or of the whole activity while too few steps lie within them."""
        task = self.tasks[0]
        if self._now > self._updated:  # steps at the same instant have no speed: they count with the next one
            self.update(task.id, completed=self._done)
            self._updated = self._now
        mean = (self._done - self._first) / task.elapsed if task.elapsed else None
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
