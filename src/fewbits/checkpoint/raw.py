"""The bytes of a file by position: files are read into memory that is there, not mapped."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from fewbits.errors import CheckpointError, FewbitsError


class FileBytes:
    """A file that several threads may read in pieces. It must not change while it is open.

    It is opened anew for each piece: a checkpoint can have more files than a process may hold open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.opened() as file:
            self.identity = _identity(file)

    @contextlib.contextmanager
    def opened(self) -> Iterator[FileIO]:
        """The file, open for reading.

        Raises:
            CheckpointError: if it cannot be opened or read.
        """
        with as_checkpoint_error(f"{self.path} cannot be read"), open(self.path, "rb", buffering=0) as file:
            yield file

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the file's bytes from `offset` on.

        Raises:
            CheckpointError: if they cannot be read, or the file has changed.
        """
        with self.opened() as file:
            self._check(file)
            file.seek(offset)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{self.path} ends at byte {file.tell():,}, before all of it was read")
                buffer = buffer[count:]

    def check_unchanged(self) -> None:
        """Refuse a file that has changed since it was opened.

        Raises:
            CheckpointError: if it has changed, or is gone.
        """
        with self.opened() as file:
            self._check(file)

    def _check(self, file: FileIO) -> None:
        if _identity(file) != self.identity:
            raise CheckpointError(
                f"{self.path} has changed since it was opened; its contents may come from two versions"
            )


def _identity(file: FileIO) -> tuple[int, int, int, int]:
    """Identify the current state of an open file: device, inode, size, time of the last change in nanoseconds."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file, and wait until it is on the disk.

    Raises:
        CheckpointError: if it exists, or cannot be written.
    """
    with as_checkpoint_error(f"{path} cannot be written"), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy the bytes of a file to a new one, in a directory that is made for it, and wait until they are on the disk.

    Raises:
        CheckpointError: if one cannot be read, or the other exists or cannot be written.
    """
    with as_checkpoint_error(f"{source} cannot be copied to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as read, open(target, "xb") as written:
            shutil.copyfileobj(read, written)
            written.flush()
            os.fsync(written.fileno())


def sync_directory(path: Path) -> None:
    """Make a rename in a directory durable, where the system lets directories be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn an error of the system into a `CheckpointError` that names the failed operation.

    A path with a NUL in it is a ValueError.
    """
    try:
        yield
    except FewbitsError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: {getattr(error, 'strerror', None) or error}") from error
