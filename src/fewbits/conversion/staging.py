"""`StagingDirectory`: the hidden directory beside a result in which it is made, so that an interrupted run can go on.

::

    .fewbits-<digest of the result's name>.work/
        run.json                what the run depends on, and whether it was begun over an earlier result
        files/                  what will be the result: complete files, and unfinished ones, which no reader takes
        journal/<file>.jsonl    how far each of them is, file.jsonl if it is not a directory; see
                                `fewbits.checkpoint.journal`

It is gone when the result is published.
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
from fewbits.checkpoint.journal import Journal, Seal, read_journal
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.publishing import check_place, move_into_place, remove_tree
from fewbits.checkpoint.raw import as_checkpoint_error, sync_directory, write_durably
from fewbits.conversion.locking import DirectoryLock
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError

#: What a run depends on, by what it is called in messages; JSON.
RunInputs = Mapping[str, Any]

#: Stands, in terms, for what cannot be compared, such as a function: a later run cannot tell whether it is the same.
INCOMPARABLE = "cannot be compared"


class StagingDirectory:
    """Where a result is made.

    Args:
        output: where the result goes, and whether an earlier run is gone on with, or replaced.
        folder: whether it is a directory.
        names: the files of the result.

    Attributes:
        files: where they are written.
        folder: whether the result is a directory.
    """

    def __init__(self, output: Output, *, folder: bool, names: Sequence[str]) -> None:
        self._output, self.folder, self._names = output, folder, tuple(names)
        with as_checkpoint_error(f"{output.path} cannot be written"):
            self._target = Path(os.path.realpath(output.path))
        name = hashlib.sha256(os.fsencode(self._target.name)).hexdigest()[:16]
        self.path = self._target.parent / f".fewbits-{name}.work"
        self.files = self.path / "files"
        self._claim = DirectoryLock(self.path, output.path, self._is_own)

    # For the one process that begins and finishes.

    def begin(self, terms: RunInputs) -> bool:
        """Make the workplace, or go on with the one that is there. No other process can begin before this is through.

        Returns:
            whether there is anything to do; False if there is a result already, and no unfinished one, and the output
            says to go on.

        Raises:
            ArgumentError: if the output is in the way, or an unfinished run is, or one that cannot be gone on with, or
                something that no run has put there.
            CheckpointError: if it cannot be made, or another process is at work there.
        """
        resume = self._output.resume
        if resume and not self._output.replace and not self._unfinished() and self._is_published():
            self._remove_remains()
            return False
        advice = ", or replace it (--replace, Output(replace=True))"
        check_place(self._output.path, folder=self.folder, replace=self._output.replace, advice=advice)
        with as_checkpoint_error(f"{self._output.path} cannot be written"):
            self._claim.take()
            there = self._unfinished()
            try:
                if there and resume:
                    self._check(terms)
                    self._refuse_incomparable(terms)
                else:
                    self._begin_anew(terms, there=there)
            except BaseException:
                # Nothing of an earlier run is lost for an error of this one.
                (self.release if there else self.discard)()
                raise
            # From here on others may join, and none begin, until the last of those that write is gone.
            self._claim.hold(shared=True)
        return True

    def _begin_anew(self, terms: RunInputs, *, there: bool) -> None:
        if there and not self._output.replace:
            raise ArgumentError(
                f"an earlier run began {self._output.path} and did not finish; its work is in {self.path}. Continue it "
                "(--resume, Output(resume=True)), or start over (--replace, Output(replace=True))"
            )
        self._run.unlink(missing_ok=True)  # first: what is left without it is no unfinished run
        for entry in self.path.iterdir():
            _remove(entry)
        self.files.mkdir()
        self._journals.mkdir()
        record = {"terms": terms, "replaces": self._target.exists()}
        write_durably(self._new_run, json.dumps(record).encode())
        self._new_run.rename(self._run)
        sync_directory(self.path)

    def clear(self) -> None:
        """Remove everything but the files of the result: what an earlier try has left of what goes beside them."""
        with as_checkpoint_error(f"{self._output.path} cannot be written"):
            for entry in self.files.iterdir():
                if entry.name not in self._names:
                    _remove(entry)

    def publish(self) -> None:
        """Give the finished files their place, and remove all else.

        Raises:
            CheckpointError: if that cannot be done.
        """
        if self.folder:
            move_into_place(self.files, self._target, replace=self._output.replace)
        else:
            with as_checkpoint_error(f"{self._output.path} cannot be written"):
                os.replace(self.files / self._names[0], self._target)
                sync_directory(self._target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything."""
        with contextlib.suppress(OSError):
            self._run.unlink()  # first, as above
        remove_tree(self.path, "what a run has left cannot be removed")
        self.release()

    def release(self) -> None:
        """Let other processes begin."""
        self._claim.release()

    # For every process that writes.

    def join(self, terms: RunInputs) -> None:
        """Take part in what another process has begun.

        Raises:
            CheckpointError: if there is nothing of the kind.
            ArgumentError: if it depends on something else.
        """
        if not self._unfinished():
            raise CheckpointError(
                f"{self._output.path} has not been begun, is complete, or is not where this process looks (all that "
                "write must see one file system); there is nothing to write"
            )
        with as_checkpoint_error(f"{self._output.path} cannot be written"):
            self._claim.hold(shared=True)
        self._check(terms)

    def journal(self, file: str) -> Journal:
        """The journal of one file, to write it."""
        return Journal(self._journal_path(file))

    def seals(self) -> dict[str, Seal]:
        """The files that are complete, as their journals say."""
        seals = {file: read_journal(self._journal_path(file))[1] for file in self._names}
        return {file: seal for file, seal in seals.items() if seal is not None}

    def has_progress(self) -> bool:
        """Whether anything has been done that is worth going on with; what cannot be read might be."""
        try:
            return any(notes or seal for notes, seal in map(read_journal, map(self._journal_path, self._names)))
        except CheckpointError:
            return True

    @contextlib.contextmanager
    def in_place(self, hint: str = "") -> Iterator[None]:
        """Name, in errors, files as they will be called: what they are called meanwhile means nothing to anybody.

        Args:
            hint: goes behind the message.
        """
        try:
            yield
        except CheckpointError as error:
            message = str(error).replace(str(self._run), str(self._output.path))
            for name in self._names:
                final = self._output.path / name if self.folder else self._output.path
                for meanwhile in (self.files / name, self._journal_path(name)):
                    message = message.replace(str(meanwhile), str(final))
            raise type(error)(message.replace(str(self.files), str(self._output.path)) + hint) from error

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    @property
    def _new_run(self) -> Path:
        return self.path / "run.json.new"

    @property
    def _journals(self) -> Path:
        return self.path / "journal"

    def _journal_path(self, file: str) -> Path:
        # A result that is one file may have the longest name there can be.
        return self._journals / f"{file if self.folder else 'file'}.jsonl"

    def _unfinished(self) -> bool:
        """Whether a run was begun and not published; of one that was published just the remains may be there."""
        return self._run.is_file() and (self.files.is_dir() if self.folder else not self._was_moved())

    def _was_moved(self) -> bool:
        seal = read_journal(self._journal_path(self._names[0]))[1]
        return seal is not None and not (self.files / self._names[0]).exists()

    def _is_published(self) -> bool:
        path = self._output.path
        return any(path.iterdir()) if self.folder and path.is_dir() else path.is_file()

    def _remove_remains(self) -> None:
        """Of a run that ended when its result was published, before it had tidied up."""
        if self.path.is_dir():
            with as_checkpoint_error(f"{self._output.path} cannot be written"):
                self._claim.take()
            self.discard()

    def _is_own(self, path: Path, mode: int) -> bool:
        """Whether a file or a directory is what a run makes."""
        if stat.S_ISDIR(mode):
            within = self.files in path.parents and path.name not in self._names
            return within or path in (self.path, self.files, self._journals)
        return path.parent != self.path or path in (self._run, self._new_run)

    def _refuse_incomparable(self, terms: RunInputs) -> None:
        if INCOMPARABLE in json.dumps(terms):
            raise ArgumentError(
                f"{self._output.path} cannot be gone on with: its scheme, or its observer, holds something that cannot "
                "be compared with what it was begun with, such as a function; begin anew (--replace, "
                "Output(replace=True))"
            )

    def _check(self, terms: RunInputs) -> None:
        try:
            found = parse_object(self._run.read_bytes(), self._run, "record of a run")
        except FewbitsError:
            found = {}
        before = found.get("terms")
        if changed := list(_differences(before if isinstance(before, dict) else {}, json.loads(json.dumps(terms)))):
            raise ArgumentError(
                f"{self._output.path} was begun with something else, and cannot be gone on with: {'; '.join(changed)}. "
                "Bring back what it was begun with, or begin anew (--replace, Output(replace=True))"
            )
        if self._target.is_file() and not found.get("replaces") and not self._output.replace:
            raise ArgumentError(
                f"{self._output.path} has come there since the run was begun that would replace it; move it away, or "
                "let it be replaced (--replace, Output(replace=True))"
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _differences(before: RunInputs, now: RunInputs) -> Iterator[str]:
    """What has changed, in words."""
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield f"{name}: {_changed(old, new)} changed"
        else:
            yield f"{name} changed" if isinstance(new or old, (dict, list)) else f"{name} was {old}, is {new}"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys whose values differ; behind each, in brackets, those within it."""
    found = []
    for key in sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        before, now = old.get(key), new.get(key)
        within = f" ({_changed(before, now)})" if isinstance(before, dict) and isinstance(now, dict) else ""
        found.append(key + within)
    return ", ".join(found)
