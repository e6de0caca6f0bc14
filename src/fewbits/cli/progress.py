"""Progress on standard error: a bar on a terminal, a line now and then elsewhere, events for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TextIO, cast

from rich.console import Console, RenderableType

from fewbits.cli.formatting import bar_line, log_line
from fewbits.cli.meter import Meter, Pace, Reading
from fewbits.cli.ranks import own_rank
from fewbits.cli.streams import Stderr
from fewbits.selection.progress import Progress, Step, no_progress


@contextmanager
def shown_progress(*, as_json: bool, quiet: bool) -> Iterator[Progress]:
    """Give a `fewbits.selection.progress.Progress` that writes to standard error.

    Args:
        as_json: write events, one JSON object a line, on a terminal too.
        quiet: write nothing.
    """
    stderr = Stderr(own_rank())
    # FORCE_COLOR, which many CI systems set, makes rich take a pipe for a terminal.
    console = Console(file=cast(TextIO, stderr), force_terminal=stderr.isatty())
    if quiet:
        yield no_progress
    elif as_json:
        yield _paced(Pace(first=0, every=0.5), lambda reading: _write_event(stderr, reading))
    elif console.is_interactive:
        bar = _Bar(console)
        try:
            yield bar
        finally:
            bar.stop()
    else:
        yield _paced(Pace(first=3, every=10), lambda reading: stderr.write(f"fewbits: {log_line(reading)}\n"))


def _paced(pace: Pace, report: Callable[[Reading], object]) -> Progress:
    """Report steps at a pace."""
    meter = Meter()

    def show(step: Step) -> None:
        now = monotonic()
        reading = meter.read(step, now)
        if pace.is_due(reading, now):
            report(reading)

    return show


def _write_event(stderr: Stderr, reading: Reading) -> None:
    stderr.event(
        "progress",
        activity=reading.activity,
        tensor=reading.name,
        done=reading.done,
        total=reading.total,
        unit=reading.unit,
        bytes_per_second=_rounded(reading.rate) if reading.unit == "bytes" else None,
        seconds_left=_rounded(reading.seconds_left),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


class _Bar(Meter):
    """Draws each step on one line, as wide as the terminal is at that moment, and removes the line at the end."""

    def __call__(self, step: Step) -> None:
        self.read(step, monotonic())
        self.start()  # has no effect on a bar that was started

    def get_renderable(self) -> RenderableType:
        if self.reading is None:
            return ""
        return bar_line(self.reading, self.console.width, ascii_only=self.console.options.ascii_only)
