"""`StagingDirectory`: the hidden directory beside a result where it is made, so that an interrupted run can resume.

::

    .fewbits-<digest of the result's name>.work/
        parts/                  finished parts of a calibration; see `fewbits.conversion.kept_parts`
        run.json                the inputs of the run, and whether it replaces an earlier result
        files/                  files of the result: complete ones, and unfinished ones, which readers reject
        journal/<file>.jsonl    the written chunks of each file; file.jsonl if the result is a single file; see
                                `fewbits.checkpoint.journal`

Publishing the result removes the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.checkpoint.header import parse_object
from fewbits.checkpoint.journal import Journal, Note, read_journal
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.publishing import check_place, move_into_place, remove_tree
from fewbits.checkpoint.raw import as_checkpoint_error, sync_directory, write_durably
from fewbits.conversion.locking import DirectoryLock
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError

#: Everything that the bytes of the result depend on, by its name in messages; JSON.
RunInputs = Mapping[str, Any]

#: Placeholder in `RunInputs` for values that a later run cannot compare, such as functions.
INCOMPARABLE = "cannot be compared"


class StagingDirectory:
    """The directory where a result is made.

    Args:
        output: the path of the result, and whether to resume or replace an earlier run.
        folder: whether the result is a directory.
        names: the names of the files of the result.

    Attributes:
        path: the staging directory.
        files: the directory in it where the files of the result are written.
        parts: the directory in it for finished parts of a calibration.
        folder: whether the result is a directory.
    """

    def __init__(self, output: Output, *, folder: bool, names: Sequence[str]) -> None:
        self._output, self.folder, self._names = output, folder, tuple(names)
        with as_checkpoint_error(f"{output.path} cannot be written"):
            self._target = Path(os.path.realpath(output.path))
        name = hashlib.sha256(os.fsencode(self._target.name)).hexdigest()[:16]
        self.path = self._target.parent / f".fewbits-{name}.work"
        self.files, self.parts, self._journals = self.path / "files", self.path / "parts", self.path / "journal"
        self._run, self._new_run = self.path / "run.json", self.path / "run.json.new"
        self._lock = DirectoryLock(self.path, output.path, self._is_own)

    # For the lead.

    def begin(self, inputs: RunInputs) -> bool:
        """Make the directory, or resume with an existing one. No other process can begin until this call returns.

        Returns:
            whether there is anything to do; False if the output says to resume, and the result is complete.

        Raises:
            ArgumentError: if the output exists and may not be replaced; if an unfinished run exists that the output
                does not mention, or that cannot be resumed; or if the directory holds foreign files.
            CheckpointError: if the directory cannot be made, or another process is at work there.
        """
        resume, path = self._output.resume, self._output.path
        if resume and not self._output.replace and not self._unfinished() and self._is_published():
            if self.path.is_dir():  # a run has published its result and then ended early
                with as_checkpoint_error(f"{path} cannot be written"):
                    self._lock.take()
                self.discard()
            return False
        advice = ", or replace it (--replace, Output(replace=True))"
        check_place(path, folder=self.folder, replace=self._output.replace, advice=advice)
        with as_checkpoint_error(f"{path} cannot be written"):
            self._lock.take()
            there = self._unfinished()
            try:
                if there and resume:
                    self._check(inputs)
                    self._refuse_incomparable(inputs)
                else:
                    self._start_over(inputs, there=there)
            except BaseException:
                # An error of this run must not remove the work of an earlier one.
                (self.release if there else self.discard)()
                raise
            # From here on, other processes may join but not begin, until the last writer has released the lock.
            self._lock.hold(shared=True)
        return True

    def _start_over(self, inputs: RunInputs, *, there: bool) -> None:
        if there and not self._output.replace:
            raise ArgumentError(
                f"an earlier run began {self._output.path} and did not finish; its work is in {self.path}. Continue it "
                "(--resume, Output(resume=True)), or start over (--replace, Output(replace=True))"
            )
        self._run.unlink(missing_ok=True)  # first: without it, remaining files are not an unfinished run
        for entry in self.path.iterdir():
            _remove(entry)
        for folder in (self.files, self.parts, self._journals):
            folder.mkdir()
        record = {"inputs": inputs, "replaces": self._target.exists()}
        write_durably(self._new_run, json.dumps(record).encode())
        self._new_run.rename(self._run)
        sync_directory(self.path)

    def clear(self) -> None:
        """Remove companion files that an earlier attempt has copied."""
        with as_checkpoint_error(f"{self._output.path} cannot be written"):
            for entry in self.files.iterdir():
                if entry.name not in self._names:
                    _remove(entry)

    def publish(self) -> None:
        """Move the finished files to the output path, and remove the directory.

        Raises:
            CheckpointError: if that fails.
        """
        if self.folder:
            move_into_place(self.files, self._target, replace=self._output.replace)
        else:
            with as_checkpoint_error(f"{self._output.path} cannot be written"):
                os.replace(self.files / self._names[0], self._target)
                sync_directory(self._target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the directory."""
        with contextlib.suppress(OSError):
            self._run.unlink()  # first, as in `_start_over`
        remove_tree(self.path, "the remains of a run cannot be removed")
        self.release()

    def release(self) -> None:
        """Let other processes begin."""
        self._lock.release()

    # For workers.

    def join(self, inputs: RunInputs) -> None:
        """Take part in a run that another process has begun.

        Raises:
            CheckpointError: if no run has begun.
            ArgumentError: if that run has other inputs.
        """
        if not self._unfinished():
            raise CheckpointError(
                f"there is nothing to write for {self._output.path}: its run has not been begun, is complete, or lies "
                "on a file system that this process does not see"
            )
        with as_checkpoint_error(f"{self._output.path} cannot be written"):
            self._lock.hold(shared=True)
        self._check(inputs)

    def journal(self, file: str) -> Journal:
        """Open the journal of one file."""
        return Journal(self._journal_path(file))

    def notes(self, file: str) -> list[Note]:
        """The notes in the journal of one file."""
        return read_journal(self._journal_path(file))[0]

    def seals(self) -> dict[str, str]:
        """The digest in the header of each complete file, by file name."""
        seals = {file: read_journal(self._journal_path(file))[1] for file in self._names}
        return {file: seal for file, seal in seals.items() if seal is not None}

    def has_progress(self) -> bool:
        """Whether a later run could continue with anything. What cannot be read counts."""
        try:
            notes = any(notes or seal for notes, seal in map(read_journal, map(self._journal_path, self._names)))
            return notes or any(self.parts.iterdir())
        except (CheckpointError, OSError):
            return True

    @contextlib.contextmanager
    def in_place(self, hint: str = "") -> Iterator[None]:
        """Replace the names of staged files in error messages by their final names.

        Args:
            hint: text to append to the message.
        """
        try:
            yield
        except CheckpointError as error:
            message = str(error).replace(str(self._run), str(self._output.path))
            for name in self._names:
                final = self._output.path / name if self.folder else self._output.path
                for staged in (self.files / name, self._journal_path(name)):
                    message = message.replace(str(staged), str(final))
            raise type(error)(message.replace(str(self.files), str(self._output.path)) + hint) from error

    def _journal_path(self, file: str) -> Path:
        # A single file may have the longest name that the file system allows, so its journal has a fixed name.
        return self._journals / f"{file if self.folder else 'file'}.jsonl"

    def _unfinished(self) -> bool:
        """Whether a run has begun and was not published. Remains of a published run do not count."""
        if not self._run.is_file():
            return False
        if self.folder:
            return self.files.is_dir()
        seal = read_journal(self._journal_path(self._names[0]))[1]
        return seal is None or (self.files / self._names[0]).exists()

    def _is_published(self) -> bool:
        path = self._output.path
        return any(path.iterdir()) if self.folder and path.is_dir() else path.is_file()

    def _is_own(self, path: Path, mode: int) -> bool:
        """Whether a run makes such a file or directory."""
        if stat.S_ISDIR(mode):
            within = self.files in path.parents and path.name not in self._names
            return within or path in (self.path, self.files, self.parts, self._journals)
        return path.parent != self.path or path in (self._run, self._new_run)

    def _refuse_incomparable(self, inputs: RunInputs) -> None:
        if INCOMPARABLE in json.dumps(inputs):
            raise ArgumentError(
                f"cannot resume {self._output.path}: its scheme, its observer or its data holds something that "
                "two runs cannot compare, such as a function; start over (--replace, Output(replace=True))"
            )

    def _check(self, inputs: RunInputs) -> None:
        try:
            found = parse_object(self._run.read_bytes(), self._run, "record of a run")
        except FewbitsError:
            found = {}
        before = found.get("inputs")
        if changed := list(_differences(before if isinstance(before, dict) else {}, json.loads(json.dumps(inputs)))):
            raise ArgumentError(
                f"cannot resume {self._output.path}: its inputs changed: {'; '.join(changed)}. "
                "Restore them, or start over (--replace, Output(replace=True))"
            )
        if self._target.is_file() and not found.get("replaces") and not self._output.replace:
            raise ArgumentError(
                f"{self._output.path} was created after the run began that would replace it; move it away, or "
                "allow replacing it (--replace, Output(replace=True))"
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _differences(before: RunInputs, now: RunInputs) -> Iterator[str]:
    """Describe every changed input."""
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield f"{name}: {_changed(old, new)} changed"
        else:
            yield f"{name} changed" if isinstance(new or old, (dict, list)) else f"{name} was {old}, is {new}"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """List the keys whose values differ; after each, in brackets, the differing keys of a nested mapping."""
    found = []
    for key in sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        before, now = old.get(key), new.get(key)
        within = f" ({_changed(before, now)})" if isinstance(before, dict) and isinstance(now, dict) else ""
        found.append(key + within)
    return ", ".join(found)
