"""Standard output and standard error whose failures stop no work."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import TextIO, cast

import click


class _Stream(io.TextIOBase):
    """A stream that never raises.

    Args:
        stream: the target; None in a process that was started without this stream.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()


class Stdout(_Stream):
    """Standard output: remembers the first error and drops all later text.

    Attributes:
        error: the first error; None if all text was written.
    """

    error: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, unless an earlier write failed."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the buffers, unless an earlier write failed."""
        if self._stream is not None:
            self._try(lambda stream: stream.flush())

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.error is not None:
            return
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            act(self._stream)
        except OSError as error:
            self.error = error
            self._discard()

    def _discard(self) -> None:
        """Redirect the descriptor to the null device: at exit, Python would flush its buffers and fail again."""
        if self._stream is not None:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


class Stderr(_Stream):
    """The standard error of this moment, for text and events. Text that cannot be written is dropped.

    Args:
        rank: the rank of this process, if there are several; every event and message names it.
    """

    def __init__(self, rank: int | None = None) -> None:
        super().__init__(sys.stderr)
        self._rank = rank

    def write(self, text: str) -> int:
        """Write text, and ignore a failure."""
        if self._stream is not None:
            with suppress(OSError, ValueError):  # the reader went away, the disk is full, or the stream is closed
                self._stream.write(text)
                self._stream.flush()
        return len(text)

    def event(self, event: str, **fields: str | float | None) -> None:
        """Write one line: a JSON object."""
        rank = {} if self._rank is None else {"rank": self._rank}
        self.write(json.dumps({"event": event, **rank, **fields}, allow_nan=False) + "\n")

    def complain(self, error: Exception, code: int, *, as_json: bool) -> None:
        """Report an error as a paragraph or as an event.

        Args:
            error: an error of fewbits or click; click's `Abort` means an interruption.
            code: the exit code of the process.
            as_json: write an event.
        """
        message = error.format_message() if isinstance(error, click.ClickException) else str(error) or "interrupted"
        if as_json:
            self.event("error", type=type(error).__name__, message=message, code=code)
        elif isinstance(error, click.ClickException):
            error.show(cast(TextIO, self))
        else:
            self.write(f"fewbits: {'' if self._rank is None else f'rank {self._rank}: '}{message}\n")


def is_json_asked_for(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for ``--json``, even if they cannot be parsed."""
    return "--json" in takewhile(lambda argument: argument != "--", arguments)


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
