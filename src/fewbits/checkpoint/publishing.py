"""`NewFolder`: a directory that appears under its name when everything is in it, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from fewbits._events import emit
from fewbits.checkpoint.raw import as_checkpoint_error, sync_directory
from fewbits.errors import ArgumentError, CheckpointError


class NewFolder:
    """A directory under a temporary name, beside the one it will have. As a context manager, removed if left early.

    Args:
        path: what it will be called.
        replace: whether a directory that is there already, with something in it, is replaced.

    Attributes:
        work: where its files go until then.

    Raises:
        ArgumentError: if something is there that will not be replaced.
        CheckpointError: if it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        self._path = Path(path)
        with as_checkpoint_error(f"{path} cannot be written"):
            if self._path.exists() and not self._path.is_dir():
                raise ArgumentError(f"{path} is a file; several files go into a directory: give the path of a new one")
            if self._path.is_dir() and any(self._path.iterdir()) and not replace:
                raise ArgumentError(f"{path} is a directory with files in it; give the path of a new one")
            self._path, self._replace = Path(os.path.realpath(path)), replace
            self.work = self._beside()
            self.work.mkdir()

    def publish(self) -> None:
        """Give it its name. What was there before is gone then.

        Raises:
            CheckpointError: if that cannot be done.
        """
        with as_checkpoint_error(f"{self._path} cannot be written"):
            sync_directory(self.work)
            old = self._set_aside()
            try:
                self.work.rename(self._path)
            except BaseException:
                if old is not None:
                    old.rename(self._path)
                raise
            sync_directory(self._path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():
                emit("warning", "left_over", folder=str(old), reason="what was replaced cannot be removed")

    def _set_aside(self) -> Path | None:
        """Move what is there out of the way; None if nothing is, any more."""
        if not self._path.exists():
            return None
        if not self._replace:
            self._path.rmdir()  # which fails if there is something in it by now
            return None
        old = self._beside()
        self._path.rename(old)
        return old

    def abort(self) -> None:
        """Give up and leave nothing behind. Does nothing after `publish`."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _beside(self) -> Path:
        return self._path.parent / f".fewbits-{secrets.token_hex(8)}.tmp"

    def __enter__(self) -> NewFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        if isinstance(error, CheckpointError) and str(self.work) in str(error):
            # The name it has meanwhile means nothing to anybody.
            raise type(error)(str(error).replace(str(self.work), str(self._path))) from error
