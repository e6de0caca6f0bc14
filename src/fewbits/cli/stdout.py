"""Standard output that nobody reads, or that is full, stops no work: the exit code tells afterwards."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

#: What a shell says of a process that ended because nobody reads its output any more: 128 and the number of SIGPIPE.
NOT_READ = 141


class Stdout(io.TextIOBase):
    """A stream that raises nothing: it remembers the first error, and drops what comes after it.

    Args:
        stream: where text goes; None where a process was started without standard output.

    Attributes:
        error: why text could not be written; None if all of it was.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What the stream writes text as."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, unless that has failed before."""
        stream = self._stream
        if stream is None:
            self.error = self.error or OSError(errno.EBADF, os.strerror(errno.EBADF))
        else:
            self._try(lambda: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what waits in buffers, unless that has failed before."""
        if self._stream is not None:
            self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is None:
            try:
                act()
            except OSError as error:
                self.error = error
                self._discard()

    def _discard(self) -> None:
        """Lead the descriptor nowhere: Python would write what is left in buffers when it ends, and fail again."""
        if self._stream is not None:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def stdout_watched(stream: TextIO | None) -> Iterator[Stdout]:
    """Let everything that is printed meanwhile go through a `Stdout`."""
    watched = Stdout(stream)
    with redirect_stdout(watched):
        try:
            yield watched
        finally:
            watched.flush()
