"""Publish files and directories: a result appears at its path when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fewbits._events import emit
from fewbits.checkpoint.folder import WEIGHT_SUFFIXES
from fewbits.checkpoint.raw import as_checkpoint_error, sync_directory, write_durably
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, CheckpointError


@contextlib.contextmanager
def published(path: Path, *, folder: bool, replace: bool) -> Iterator[Path]:
    """Give a temporary path beside that of a result. The result is published at the end, or removed after an error.

    Args:
        path: the final path.
        folder: whether the result is a directory. The temporary one exists and is empty; a temporary file is missing.
        replace: whether an existing directory with files in it, or the target of a link to one, is replaced. A file
            always is.

    Raises:
        ArgumentError: if something is there that will not be replaced.
        CheckpointError: if the result cannot be made or published.
    """
    path = check_place(path, folder=folder, replace=replace)
    work = beside(path)
    try:
        if folder:
            with as_checkpoint_error(f"{path} cannot be written"):
                work.mkdir()
        yield work
        if folder:
            move_into_place(work, path, replace=replace)
        else:
            _move_file(work, path)
    except CheckpointError as error:
        # No program looks for the temporary name.
        raise type(error)(str(error).replace(str(work), str(path))) from error
    finally:
        if work.is_dir():
            remove_tree(work, "an unfinished result cannot be removed")
        else:
            work.unlink(missing_ok=True)


def check_document(path: Path, suffixes: Sequence[str], *, replace: bool) -> None:
    """Refuse a file for a document before the document is made.

    Args:
        path: the file.
        suffixes: the endings that its name may have.
        replace: whether the file may exist.

    Raises:
        ArgumentError: if the file exists, or its name has another ending.
        CheckpointError: if it cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ArgumentError(f"{path} must end in {' or '.join(suffixes)}")
    with as_checkpoint_error(f"{path} cannot be written"):
        check_parent(path)
        check_place(path, folder=False, replace=replace)
        if path.exists() and not replace:
            raise ArgumentError(f"{path} exists; give another path, or replace it (--replace, replace=True)")


def publish_document(path: Path, text: str) -> None:
    """Write a text file, which appears when it is complete, and replaces an existing one.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with published(path, folder=False, replace=True) as work:
        write_durably(work, text.encode())


def _move_file(work: Path, path: Path) -> None:
    with as_checkpoint_error(f"{path} cannot be written"):
        with open(work, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(work, path)
        sync_directory(path.parent)


def check_place(path: Path, *, folder: bool, replace: bool, advice: str = "") -> Path:
    """Resolve the path of a result: a link is followed, and stays.

    Args:
        path: the path of the result.
        folder: whether the result is a directory.
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


def check_name_and_parent(path: Path, serializer: Serializer, *, folder: bool, advice: str = "") -> None:
    """Refuse a place for a result before anything is done for it.

    Args:
        path: the path of the result.
        serializer: the format of its files.
        folder: whether the result is a directory.
        advice: how else to get a file, if the result is a directory.

    Raises:
        ArgumentError: if the name is that of a file in another format, or a new directory has the name of a file.
        CheckpointError: if the directory that it would be in does not exist.
    """
    suffix = serializer.suffix
    with as_checkpoint_error(f"{path} cannot be written"):
        if folder:
            check_folder_name(path, advice)
        check_parent(path)
    if not folder and path.suffix.lower() in serializer.foreign_suffixes:
        raise ArgumentError(
            f"{path} is the name of a {path.suffix} file, but the result is a {suffix} file: call it "
            f"{path.stem.removesuffix(suffix)}{suffix}"
        )


def check_folder_name(path: Path, advice: str = "") -> None:
    """Refuse the name of a file of tensors for a new directory.

    Raises:
        ArgumentError: if it has one.
    """
    if path.suffix.lower() in WEIGHT_SUFFIXES and not path.is_dir():
        raise ArgumentError(
            f"{path} is the name of a {path.suffix} file, but the result is a directory of files; give the "
            f"path of a directory, such as {path.with_suffix('')}{advice}"
        )


def check_parent(path: Path) -> None:
    """Refuse a path in a directory that does not exist.

    Raises:
        CheckpointError: if there is no such directory.
    """
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
        old = None
        if replace and path.exists():
            old = path.rename(beside(path))
        elif path.exists():
            path.rmdir()  # which fails if there is something in it by now
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


def beside(path: Path) -> Path:
    """Return a temporary name in the directory of a path."""
    return path.parent / f".fewbits-{secrets.token_hex(8)}.tmp"
