"""Progress on standard error: a bar on a terminal, now and then a line elsewhere, and events for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TextIO, cast

import attrs
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from fewbits.cli.formatting import bar_line, log_line
from fewbits.cli.meter import Meter, Pace, Reading
from fewbits.cli.ranks import own_rank
from fewbits.cli.stderr import Stderr
from fewbits.selection.progress import Progress, Step, no_progress


@contextmanager
def shown_progress(*, as_json: bool, quiet: bool) -> Iterator[Progress]:
    """A `fewbits.selection.progress.Progress` that tells people, or a program, on standard error.

    Args:
        as_json: write events, one JSON object a line, on a terminal too.
        quiet: tell nobody.
    """
    stderr = Stderr(own_rank())
    # rich would take a pipe for a terminal where FORCE_COLOR is set, as it is in many a CI.
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
    """Tells about steps, at a pace."""

    def __init__(self, pace: Pace, tell: Callable[[Reading], object]) -> None:
        self._meter, self._pace, self._tell = Meter(), pace, tell

    def __call__(self, step: Step) -> None:
        now = monotonic()
        reading = self._meter.read(step, now)
        if self._pace.is_due(reading, now):
            self._tell(reading)


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
    """A reading, drawn on one line of whatever width the terminal has by then."""

    reading: Reading

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, done, rest, after = bar_line(self.reading, options.max_width, ascii_only=options.ascii_only)
        line = Text(before, no_wrap=True, overflow="crop")  # a name may have characters of two columns
        yield line.append(done, "bar.complete").append(rest, "bar.back").append(after)


def _drawn(console: Console) -> Iterator[Progress]:
    """A line that is drawn again four times a second, from the first step on, and vanishes in the end."""
    meter = Meter()
    live = Live(console=console, transient=True, redirect_stdout=False)

    def show(step: Step) -> None:
        live.update(_Bar(meter.read(step, monotonic())))
        live.start(refresh=True)  # once; it does nothing after that

    try:
        yield show
    finally:
        live.stop()
