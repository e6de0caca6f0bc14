"""`Journal`: the progress of one unfinished output file, one line of JSON per chunk.

A resumed run reads the unfinished file back, and believes only those lines of the journal that agree with its bytes.
The order in which bytes reach the disk therefore does not matter, and no write is waited for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.errors import CheckpointError
from fewbits.numerics.metrics import Tally

try:
    import fcntl
except ImportError:  # missing on Windows, where the journal is not locked
    fcntl = None  # type: ignore[assignment]

#: The field that holds the digest of a line's other fields.
_CHECK = "check"

_is = attrs.validators.instance_of
_Prefixes = Mapping[str, tuple[int, str]]


def _prefixes(prefixes: Mapping[str, Any]) -> _Prefixes:
    return {name: (int(elements), str(digest)) for name, (elements, digest) in prefixes.items()}


def _is_tally(_: object, __: object, fields: Mapping[str, Any] | None) -> None:
    if fields is not None:
        Tally.from_dict(fields)


@attrs.frozen
class Note:
    """One chunk that has been written.

    Attributes:
        tensor: its name in the source.
        start: index of the chunk's first element.
        stop: index after the chunk's last element.
        source: SHA-256 of the chunk's bytes as they were read.
        written: of everything in the file that belongs to the tensor: how many elements are written by now, from the
            first on, and the SHA-256 of their bytes.
        tally: the comparison of the chunk with its source; see `Tally.to_dict`.
    """

    tensor: str = attrs.field(validator=_is(str))
    start: int = attrs.field(validator=_is(int))
    stop: int = attrs.field(validator=_is(int))
    source: str = attrs.field(validator=_is(str))
    written: _Prefixes = attrs.field(converter=_prefixes)
    tally: Mapping[str, Any] | None = attrs.field(validator=_is_tally)


@attrs.frozen
class Seal:
    """The end of a file.

    Attributes:
        header: the digest in its header.
        measured: the fields of `Measurement`, by tensor.
    """

    header: str = attrs.field(validator=_is(str))
    measured: Mapping[str, Mapping[str, Any]] = attrs.field(validator=_is(dict))


class Journal:
    """Records the progress of one file. While it is open, no other process can write the file.

    Args:
        path: of the journal, which is created if it does not exist.

    Attributes:
        notes: the notes of earlier processes, in order.
        seal: the end of the file; None before that.

    Raises:
        CheckpointError: if the journal cannot be opened, or another process is writing the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with as_checkpoint_error(f"{path} cannot be written"):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            try:
                lock(self._file.fileno(), path)
                self.notes, self.seal, good = _read(path)
                # Remove a line that a process did not finish.
                os.truncate(self._file.fileno(), good)
            except BaseException:
                self._file.close()
                raise

    def add(self, line: Note | Seal) -> None:
        """Append one line."""
        data = _line(attrs.asdict(line, recurse=False))
        with as_checkpoint_error(f"{self._path} cannot be written"):
            while data:
                data = data[self._file.write(data) :]

    def rewrite(self, notes: Sequence[Note]) -> None:
        """Keep only the given notes and drop the seal: the file is incomplete and holds only those chunks."""
        if notes == self.notes and self.seal is None:
            return
        self.notes, self.seal = [*notes], None
        with as_checkpoint_error(f"{self._path} cannot be written"):
            os.truncate(self._file.fileno(), 0)
        for note in notes:
            self.add(note)

    def close(self) -> None:
        """Close the journal and let other processes write the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> tuple[list[Note], Seal | None]:
    """Read a journal, even while another process writes to it; empty if there is no journal."""
    with as_checkpoint_error(f"{path} cannot be read"):
        return _read(path)[:2] if path.exists() else ([], None)


def _read(path: Path) -> tuple[list[Note], Seal | None, int]:
    """Valid lines and their length in bytes."""
    notes: list[Note] = []
    seal: Seal | None = None
    good = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                fields = json.loads(_checked(line))
                if "header" in fields:
                    seal = Seal(**fields)
                else:
                    notes.append(Note(**fields))
            except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
                break
            good += len(line)
    return notes, seal, good


def _line(fields: Mapping[str, Any]) -> bytes:
    """Encode fields as a line with a digest, since a number with a flipped bit can still be a valid number."""
    return _signed(json.dumps(fields, separators=(",", ":")).encode())


def _signed(text: bytes) -> bytes:
    check = hashlib.sha256(text).hexdigest()[:16]
    return text[:-1] + f',"{_CHECK}":"{check}"}}\n'.encode()


def _checked(line: bytes) -> bytes:
    """Return the JSON of a line that `_line` wrote, after checking the digest.

    Raises:
        ValueError: if the digest does not match the line.
    """
    text = line.rpartition(f',"{_CHECK}":'.encode())[0] + b"}"
    if line != _signed(text):
        raise ValueError("the line differs from the line that was written")
    return text


def lock(descriptor: int, path: Path, *, shared: bool = False) -> None:
    """Lock an open file until it is closed. Processes that all pass `shared` may hold the lock together.

    Raises:
        CheckpointError: if another process holds a conflicting lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{path}: another process is at work on it; wait for it, or end it") from None
    except OSError:
        return  # some network file systems have no locks


def unlock(descriptor: int) -> None:
    """Release the lock, even if a forked child process still has the file open."""
    if fcntl is not None:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)
