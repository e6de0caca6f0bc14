"""Standard error, as text or as events, and never a reason to fail: nobody may be there to read it any more."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import TextIO, cast

import click


class Stderr:
    """Standard error as it was when this was made. What cannot be written is dropped.

    Args:
        rank: of this process, if there are several; every event and complaint says it.
    """

    def __init__(self, rank: int | None = None) -> None:
        self._rank = rank
        self._stream: TextIO | None = sys.stderr  # None where a process has been started without it

    @property
    def encoding(self) -> str:
        """What the stream writes text as."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, if that still goes anywhere."""
        if self._stream is not None:
            with suppress(OSError, ValueError):  # nobody reads it, the disk is full, or it has been closed
                self._stream.write(text)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing waits: `write` has flushed."""

    def event(self, event: str, **fields: str | float | None) -> None:
        """Write one line: a JSON object."""
        rank = {} if self._rank is None else {"rank": self._rank}
        self.write(json.dumps({"event": event, **rank, **fields}, allow_nan=False) + "\n")

    def complain(self, message: str) -> None:
        """Write a paragraph about what is wrong."""
        self.write(f"fewbits: {'' if self._rank is None else f'rank {self._rank}: '}{message}\n")


def is_json_asked_for(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` is among the arguments of a command line, also of one that cannot be parsed."""
    return "--json" in takewhile(lambda argument: argument != "--", arguments)


def complain(stderr: Stderr, error: Exception, code: int, *, as_json: bool) -> None:
    """Say in a paragraph, or in an event, what is wrong.

    Args:
        stderr: where.
        error: one of fewbits' own or of click's; click's `Abort` stands for an interruption.
        code: that the process will exit with.
        as_json: write an event.
    """
    message = error.format_message() if isinstance(error, click.ClickException) else str(error) or "interrupted"
    if as_json:
        stderr.event("error", type=type(error).__name__, message=message, code=code)
    elif isinstance(error, click.ClickException):
        error.show(cast(TextIO, stderr))
    else:
        stderr.complain(message)


@contextmanager
def warnings_as_events(stderr: Stderr) -> Iterator[None]:
    """Make an event of every warning meanwhile, of Python's `warnings` and of every logger."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stderr.event("warning", source=record.name, message=record.getMessage())

    handler, root = Handler(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
