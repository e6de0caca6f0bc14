"""`DirectoryLock`: a directory that is ours alone while a run begins, and shared with other writers afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from fewbits.checkpoint.journal import lock, unlock
from fewbits.errors import ArgumentError, CheckpointError


class DirectoryLock:
    """A directory, and what this process may do there. The system forgets a claim when its process ends.

    Args:
        path: of the directory.
        output: of the result, which messages name.
        is_own: whether something in it is what a run would put there.
    """

    def __init__(self, path: Path, output: Path, is_own: Callable[[Path, int], bool]) -> None:
        self._path, self._output, self._is_own = path, output, is_own
        self._lock: int | None = None

    def take(self) -> None:
        """Make the directory if there is none, and keep other processes out of it.

        Raises:
            CheckpointError: if one of them is in there.
            ArgumentError: if something is in there that no run has put there: it must not be lost.
        """
        self._path.mkdir(exist_ok=True)
        try:
            self.hold(shared=False)
            self._refuse_foreign()
        except BaseException:
            self.release()
            raise

    def hold(self, *, shared: bool) -> None:
        """Keep other processes out; with `shared`, those that would begin.

        Raises:
            CheckpointError: if one of them is in there.
        """
        if not hasattr(os, "O_DIRECTORY"):
            return
        if self._lock is None:
            self._lock = os.open(self._path, os.O_DIRECTORY)
        lock(self._lock, self._output, shared=shared)
        if not os.path.samestat(os.fstat(self._lock), self._path.stat()):
            raise CheckpointError(f"{self._output}: another process has just left it; try again")

    def release(self) -> None:
        """Let other processes begin."""
        if self._lock is not None:
            unlock(self._lock)
            os.close(self._lock)
            self._lock = None

    def _refuse_foreign(self) -> None:
        inside = (Path(at, name) for at, folders, files in os.walk(self._path) for name in (*folders, *files))
        for path in [self._path, *inside]:
            mode = path.lstat().st_mode
            # A link could lead to anything.
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or not self._is_own(path, mode):
                raise ArgumentError(
                    f"{self._output} is made in {self._path}, and {path} is nothing that a run would put there; "
                    "move it away, or give another path to write to"
                )
