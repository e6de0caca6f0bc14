"""Standard error as text or events. A reader that went away never makes the program fail."""

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
    """The standard error of this moment. Text that cannot be written is dropped.

    Args:
        rank: of this process, if there are several; every event and message names it.
    """

    def __init__(self, rank: int | None = None) -> None:
        self._rank = rank
        self._stream: TextIO | None = sys.stderr  # None in a process that was started without it

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, and ignore a failure."""
        if self._stream is not None:
            with suppress(OSError, ValueError):  # the reader went away, the disk is full, or the stream is closed
                self._stream.write(text)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` flushes."""

    def event(self, event: str, **fields: str | float | None) -> None:
        """Write one line: a JSON object."""
        rank = {} if self._rank is None else {"rank": self._rank}
        self.write(json.dumps({"event": event, **rank, **fields}, allow_nan=False) + "\n")

    def complain(self, message: str) -> None:
        """Write a message as a paragraph."""
        self.write(f"fewbits: {'' if self._rank is None else f'rank {self._rank}: '}{message}\n")


def is_json_asked_for(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for ``--json``, even if they cannot be parsed."""
    return "--json" in takewhile(lambda argument: argument != "--", arguments)


def complain(stderr: Stderr, error: Exception, code: int, *, as_json: bool) -> None:
    """Report an error as a paragraph or as an event.

    Args:
        stderr: the stream.
        error: of fewbits or click; click's `Abort` means an interruption.
        code: the exit code of the process.
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
    """Write an event for every warning of Python's `warnings` and of every logger."""

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
