"""`Journal`: the progress of one unfinished output file, one line of JSON per chunk.

A resumed run reads the unfinished file back, and believes only those lines of the journal that agree with its bytes.
The order in which bytes reach the disk therefore does not matter, and no write is waited for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
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


@attrs.frozen(eq=False)
class Note:
    """One chunk that has been written.

    Attributes:
        tensor: the name of the tensor in the source.
        start: the index of the chunk's first element.
        stop: the index after the chunk's last element.
        written: for each part of the tensor in the file, the number of elements that are written by now, counted from
            the first one, and the SHA-256 of their bytes.
        tally: the comparison of the chunk with its source; None if there was no comparison.
    """

    tensor: str
    start: int
    stop: int
    written: Mapping[str, tuple[int, str]]
    tally: Tally | None


class Journal(AbstractContextManager["Journal"]):
    """Records the progress of one file. Until the `with` block ends, no other process can write the file.

    Args:
        path: the path of the journal, which is created if it does not exist.

    Attributes:
        notes: the notes of earlier processes, in order.
        seal: the digest in the header of the complete file; None before the file is complete.

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

    def add(self, note: Note) -> None:
        """Append a note."""
        tally = None if note.tally is None else note.tally.to_dict()
        self._append({**attrs.asdict(note, recurse=False), "tally": tally})

    def add_seal(self, header: str) -> None:
        """Append the end of the file: the digest in its header."""
        self._append({"header": header})

    def _append(self, fields: Mapping[str, Any]) -> None:
        data = _line(fields)
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

    def __exit__(self, *_: object) -> None:
        self._file.close()  # which lets other processes write the file


def read_journal(path: Path) -> tuple[list[Note], str | None]:
    """Read the notes and the seal of a journal, even while another process writes to it; none if it does not exist."""
    with as_checkpoint_error(f"{path} cannot be read"):
        return _read(path)[:2] if path.exists() else ([], None)


def _read(path: Path) -> tuple[list[Note], str | None, int]:
    """Read the notes and the seal of a journal up to the first invalid line, and the length of that part in bytes."""
    notes: list[Note] = []
    seal: str | None = None
    good = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                fields = json.loads(line)
                del fields[_CHECK]
                if _line(fields) != line:
                    break
                if "header" in fields:
                    seal = fields["header"]
                else:
                    tally = fields["tally"]
                    notes.append(Note(**{**fields, "tally": tally if tally is None else Tally.from_dict(tally)}))
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                break
            good += len(line)
    return notes, seal, good


def _line(fields: Mapping[str, Any]) -> bytes:
    """Encode fields as a line with a digest, since a number with a flipped bit can still be a valid number."""
    check = hashlib.sha256(_json(fields)).hexdigest()[:16]
    return _json({**fields, _CHECK: check}) + b"\n"


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


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
