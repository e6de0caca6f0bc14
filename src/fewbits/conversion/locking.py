"""`DirectoryLock`: an exclusive lock on a directory while a run begins, shared with other writers afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from fewbits.checkpoint.journal import lock, unlock
from fewbits.errors import ArgumentError, CheckpointError


class DirectoryLock:
    """A lock on a directory. The operating system releases it when the process ends.

    Args:
        path: the directory.
        output: the path of the result, for messages.
        is_own: tells from path and mode whether a run would make such a file or directory.
    """

    def __init__(self, path: Path, output: Path, is_own: Callable[[Path, int], bool]) -> None:
        self._path, self._output, self._is_own = path, output, is_own
        self._lock: int | None = None

    def take(self) -> None:
        """Make the directory if it is missing, and lock it exclusively.

        Raises:
            CheckpointError: if another process holds the lock.
            ArgumentError: if the directory holds a foreign file, which must not be lost.
        """
        self._path.mkdir(exist_ok=True)
        try:
            self.hold(shared=False)
            self._refuse_foreign()
        except BaseException:
            self.release()
            raise

    def hold(self, *, shared: bool) -> None:
        """Lock the directory. A shared lock lets other processes join, but not begin.

        Raises:
            CheckpointError: if another process holds a conflicting lock.
        """
        if not hasattr(os, "O_DIRECTORY"):
            return
        if self._lock is None:
            self._lock = os.open(self._path, os.O_DIRECTORY)
        lock(self._lock, self._output, shared=shared)
        if not os.path.samestat(os.fstat(self._lock), self._path.stat()):
            raise CheckpointError(f"{self._output}: another process has just removed it; try again")

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            unlock(self._lock)
            os.close(self._lock)
            self._lock = None

    def _refuse_foreign(self) -> None:
        inside = (Path(at, name) for at, folders, files in os.walk(self._path) for name in (*folders, *files))
        for path in [self._path, *inside]:
            mode = path.lstat().st_mode
            # A link could lead outside the directory.
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or not self._is_own(path, mode):
                raise ArgumentError(
                    f"{self._output} is made in {self._path}, but no run has put {path} there; "
                    "move it away, or give another path to write to"
                )
