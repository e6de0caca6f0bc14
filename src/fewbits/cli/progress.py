"""Progress on standard error: a bar on a terminal, a line now and then elsewhere, events for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TextIO, cast

import attrs
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fewbits.cli.formatting import bar_line, log_line
from fewbits.cli.meter import Meter, Pace, Reading
from fewbits.cli.ranks import own_rank
from fewbits.cli.stderr import Stderr
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
        yield _RunProgress(Pace(first=0, every=0.5), lambda reading: _write_event(stderr, reading))
    elif console.is_interactive:
        yield from _drawn(console)
    else:
        yield _RunProgress(Pace(first=3, every=10), lambda reading: stderr.write(f"fewbits: {log_line(reading)}\n"))


class _RunProgress:
    """Reports steps at a pace."""

    def __init__(self, pace: Pace, report: Callable[[Reading], object]) -> None:
        self._meter, self._pace, self._report = Meter(), pace, report

    def __call__(self, step: Step) -> None:
        now = monotonic()
        reading = self._meter.read(step, now)
        if self._pace.is_due(reading, now):
            self._report(reading)


def _write_event(stderr: Stderr, reading: Reading) -> None:
    stderr.event(
        "progress",
        activity=reading.activity,
        tensor=reading.name,
        done=reading.done,
        total=reading.total,
        unit=reading.unit,
        **{f"{reading.unit}_per_second": _rounded(reading.rate)},
        seconds_left=_rounded(reading.seconds_left),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


@attrs.frozen
class _Bar:
    """A reading on one line, as wide as the terminal is when it is drawn."""

    reading: Reading

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, done, rest, after = bar_line(self.reading, options.max_width, ascii_only=options.ascii_only)
        line = Text(before, no_wrap=True, overflow="crop")  # a character of a name may take two columns
        yield line.append(done, "bar.complete").append(rest, "bar.back").append(after)


def _drawn(console: Console) -> Iterator[Progress]:
    """Draw a bar from the first step on, and remove it at the end."""
    meter = Meter(console, _Bar)

    def show(step: Step) -> None:
        meter.read(step, monotonic())
        meter.start()  # has no effect on a meter that was started

    try:
        yield show
    finally:
        meter.stop()
