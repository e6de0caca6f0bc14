"""Standard output whose failure stops no work. The exit code reports it afterwards."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

#: The exit code of a process whose output has no reader, as in a shell: 128 and the number of SIGPIPE.
NOT_READ = 141


class Stdout(io.TextIOBase):
    """A stream that never raises: it remembers the first error and drops all later text.

    Args:
        stream: the target; None in a process that was started without standard output.

    Attributes:
        error: the first error; None if all text was written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, unless an earlier write failed."""
        stream = self._stream
        if stream is None:
            self.error = self.error or OSError(errno.EBADF, os.strerror(errno.EBADF))
        else:
            self._try(lambda: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the buffers, unless an earlier write failed."""
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
        """Redirect the descriptor to the null device: at exit, Python would flush its buffers and fail again."""
        if self._stream is not None:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def stdout_watched(stream: TextIO | None) -> Iterator[Stdout]:
    """Redirect everything that is printed to a `Stdout`."""
    watched = Stdout(stream)
    with redirect_stdout(watched):
        try:
            yield watched
        finally:
            watched.flush()
