"""`NewFolder`: a directory that appears under its name when everything is in it, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from fewbits._events import emit
from fewbits.checkpoint.folder import WEIGHT_SUFFIXES
from fewbits.checkpoint.raw import as_checkpoint_error, sync_directory
from fewbits.errors import ArgumentError, CheckpointError


class NewFolder:
    """A directory under a temporary name, beside the one it will have. As a context manager, removed if left early.

    Args:
        path: its final path.
        replace: whether a directory that is there already, with something in it, is replaced.

    Attributes:
        work: where its files go until then.

    Raises:
        ArgumentError: if something is there that will not be replaced.
        CheckpointError: if it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        self._path, self._replace = check_place(Path(path), folder=True, replace=replace), replace
        with as_checkpoint_error(f"{path} cannot be written"):
            self.work = _beside(self._path)
            self.work.mkdir()

    def publish(self) -> None:
        """Give it its name. It replaces a previous file.

        Raises:
            CheckpointError: if that cannot be done.
        """
        move_into_place(self.work, self._path, replace=self._replace)

    def abort(self) -> None:
        """Give up and leave nothing behind. Does nothing after `publish`."""
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> NewFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        if isinstance(error, CheckpointError) and str(self.work) in str(error):
            # No program looks for the temporary name.
            raise type(error)(str(error).replace(str(self.work), str(self._path))) from error


def check_place(path: Path, *, folder: bool, replace: bool, advice: str = "") -> Path:
    """Resolve the path of a result: a link is followed, and stays.

    Args:
        path: of the result.
        folder: whether it is a directory.
        replace: whether an existing directory with files in it, or the target of a link to one, is replaced. A file
            always is.
        advice: an alternative to replacing such a directory.

    Raises:
        ArgumentError: if something is there that will not be replaced.
        CheckpointError: if the path cannot be read.
    """
    with as_checkpoint_error(f"{path} cannot be written"):
        if not folder:
            if path.is_dir():
                raise ArgumentError(f"{path} is a directory; give the path of the file to write")
            if path.exists() and not path.is_file():
                raise ArgumentError(f"{path} is not a regular file, and would be replaced by one; give another path")
        elif path.is_symlink() and not replace:
            raise ArgumentError(f"{path} is a link to {os.path.realpath(path)}; give the path of a new one{advice}")
        elif path.exists() and not path.is_dir():
            raise ArgumentError(f"{path} is a file; several files go into a directory: give the path of a new one")
        elif path.is_dir() and any(path.iterdir()) and not replace:
            raise ArgumentError(f"{path} is a directory with files in it; give the path of a new one{advice}")
        elif os.path.ismount(path):
            raise ArgumentError(f"{path} is where a file system is mounted, and cannot be replaced; give a path inside")
        return Path(os.path.realpath(path))


def check_name_and_parent(path: Path, *, folder: bool, advice: str = "") -> None:
    """Refuse a place for a result before anything is done for it.

    Args:
        path: of the result.
        folder: whether it is a directory.
        advice: how else to get a file, if it is.

    Raises:
        ArgumentError: if it is a directory with the name of a file, which is not there yet.
        CheckpointError: if the directory that it would be in does not exist.
    """
    with as_checkpoint_error(f"{path} cannot be written"):
        if folder and path.suffix.lower() in WEIGHT_SUFFIXES and not path.is_dir():
            raise ArgumentError(
                f"{path} is the name of a {path.suffix} file, but the result is a directory of files; give the "
                f"path of a directory, such as {path.with_suffix('')}{advice}"
            )
        parent = Path(os.path.realpath(path)).parent
        if not parent.is_dir():
            why = "is a file" if parent.exists() else "does not exist; make it first"
            raise CheckpointError(f"{path} cannot be written: the directory {parent} {why}, or give another path")


def move_into_place(work: Path, path: Path, *, replace: bool) -> None:
    """Give a finished directory its name. It replaces a previous one.

    Raises:
        CheckpointError: if that cannot be done.
    """
    with as_checkpoint_error(f"{path} cannot be written"):
        sync_directory(work)
        old = _set_aside(path, replace=replace)
        try:
            work.rename(path)
        except BaseException:
            if old is not None:
                old.rename(path)
            raise
        sync_directory(path.parent)
    if old is not None:
        remove_tree(old, "the replaced files cannot be removed")


def remove_tree(folder: Path, complaint: str) -> None:
    """Remove a directory with its content; if that fails, an event (`left_over`) says so."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        emit("warning", "left_over", folder=str(folder), reason=f"{complaint}; remove this directory yourself")


def _set_aside(path: Path, *, replace: bool) -> Path | None:
    """Make room at a path: move its content aside with `replace`, else remove an empty directory; the new name."""
    if not path.exists():
        return None
    if not replace:
        path.rmdir()  # which fails if there is something in it by now
        return None
    old = _beside(path)
    path.rename(old)
    return old


def _beside(path: Path) -> Path:
    return path.parent / f".fewbits-{secrets.token_hex(8)}.tmp"
