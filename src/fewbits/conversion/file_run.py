"""`FileRun`: one conversion from disk to disk, file by file, by one process or by many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch

from fewbits._events import emit
from fewbits._version import __version__
from fewbits.checkpoint.chunks import Chunk, columns_of
from fewbits.checkpoint.journal import Journal, Note, Seal
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import CheckpointWriter
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import STEM, Shard, write_index
from fewbits.conversion.job import Share
from fewbits.conversion.recipe import described, fingerprint
from fewbits.conversion.staging import RunInputs, StagingDirectory
from fewbits.conversion.streaming import Converted, Streaming
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError
from fewbits.formats.fp8 import tell_unscaled
from fewbits.numerics.metrics import Measurement, Tally
from fewbits.selection.progress import Progress, Step
from fewbits.sources.model_config import Readers

_RESUME = "what is done is kept: --resume, or Output(resume=True), goes on with it"

_CHANGED = (
    "the source has changed since this run was begun, and the run cannot be gone on with: begin anew (--replace, "
    "Output(replace=True)), or bring back the source as it was"
)


@attrs.frozen
class Finished:
    """A result that is complete.

    Attributes:
        headers: the digest in the header of each file, by its name.
        measured: how each tensor compares with its source, if it was compared.
    """

    headers: Mapping[str, str]
    measured: Mapping[str, Measurement]


class FileRun:
    """One conversion from disk to disk.

    Args:
        streaming: converts chunks.
        serializer: writes files.
        shards: the files of the result.
        workplace: where they are made.
        readers: who can open the result, if its source is a model of transformers.
        paranoid: whether what was read earlier is read again.
        shared: whether other processes write files of it, too.
        progress: told about every chunk.

    Attributes:
        share: what this process has done of it.
        begun: whether `begin` has found anything to do.
    """

    def __init__(
        self,
        streaming: Streaming,
        serializer: Serializer,
        shards: Sequence[Shard],
        workplace: StagingDirectory,
        *,
        readers: Readers | None,
        paranoid: bool,
        shared: bool,
        progress: Progress,
    ) -> None:
        self._streaming, self._serializer, self._workplace = streaming, serializer, workplace
        self._shards, self._readers = {shard.file: shard for shard in shards}, readers
        self._paranoid, self._shared, self._progress = paranoid, shared, progress
        self.share = Share()
        self.begun = False
        self._source_changed = False

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of the result."""
        return tuple(self._shards.values())

    @cached_property
    def _source_state(self) -> Mapping[str, Any]:
        """What tells the source as it was when this began, or joined, from any other."""
        return self._streaming.source.fingerprint()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the source that are converted for each file of the result: scales that are merged do not count."""
        return {
            file: sum(Chunk.whole(row).nbytes for row in shard.ledger.stored) for file, shard in self._shards.items()
        }

    def begin(self) -> bool:
        """Make the place, or take over what is there; see `StagingDirectory.begin`.

        Raises:
            ArgumentError: also if the source is in that place, where it would be removed.
        """
        source = self._streaming.source.path
        if self._workplace.path in Path(os.path.realpath(source)).parents:
            raise ArgumentError(f"{source} is where the result is made, in {self._workplace.path}; move it elsewhere")
        with self._workplace.in_place():
            self.begun = self._workplace.begin(self._terms())
        return self.begun

    def join(self) -> None:
        """Take part in what another process has begun; see `StagingDirectory.join`."""
        self._workplace.join(self._terms())

    def _terms(self) -> RunInputs:
        """Everything that the bytes of the result depend on."""
        streaming = self._streaming
        return {
            "fewbits": __version__,
            "torch": str(torch.__version__),
            "recipe": {
                "what becomes of each tensor": fingerprint([row.to_dict() for row in streaming.demand.ledger]),
                "scheme": described(streaming.conversion.recipe()),
                "comparison with the source": streaming.demand.measuring,
                "serializer": described(type(self._serializer)),
            },
            # Names alone do not tell: another limit on their size can give as many files, cut elsewhere.
            "files of the result": [
                [file, fingerprint([row.name for row in shard.ledger])] for file, shard in self._shards.items()
            ],
            "source": self._source_state,
        }

    def write(self, files: Sequence[str]) -> None:
        """Write some files of the result: what is missing of them. Each is read back before it counts as complete.

        Raises:
            CheckpointError: if one cannot be written. What has been written stays for another run.
            NumericsError: if a tensor cannot be converted.
        """
        told = _RunProgress(self._progress, sum(self.sizes[file] for file in files))
        with self._keeping():
            complete = self._workplace.seals()
            # What is there comes first: the rate of what follows is that of this run.
            for file in sorted(files, key=lambda file: file not in complete):
                self._write(self._shards[file], told)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Leave what is done to another run, if one could go on with it; otherwise remove it."""
        try:
            yield
        except BaseException as error:
            passing = isinstance(error, CheckpointError) or not isinstance(error, FewbitsError)
            kept = self._shared or (passing and self._workplace.has_progress())
            if kept:
                self._workplace.release()
            else:
                self._workplace.discard()
            hint = _CHANGED if kept and self._has_source_changed() else _RESUME
            if kept and isinstance(error, KeyboardInterrupt):
                error.args = error.args or (f"interrupted; {hint}",)
            with self._workplace.in_place(f"; {hint}" if kept else ""):
                raise

    def _has_source_changed(self) -> bool:
        """Whether a later run would find another source. One that cannot be read may come back."""
        try:
            return self._source_changed or self._streaming.source.fingerprint() != self._source_state
        except CheckpointError:
            return False

    def release(self) -> None:
        """Let other processes begin. What is not published stays."""
        self._workplace.release()

    def _write(self, shard: Shard, told: _RunProgress) -> None:
        with self._workplace.journal(shard.file) as journal:
            if journal.seal is not None and self._is_sound(shard, journal.seal):
                self._check_source(shard, journal.notes)
                self._count(shard, 0, self.sizes[shard.file])
                told.skip(shard.ledger.stored[-1].name, self.sizes[shard.file])
                return
            path = self._workplace.files / shard.file
            extra = self._streaming.source.extra
            with CheckpointWriter(self._serializer, path, shard.ledger, extra=extra, resumable=True) as writer:
                taken = writer.take_over(journal.notes)
                self._check_source(shard, taken)
                journal.rewrite(taken)
                measured = self._fill(shard, writer, journal, taken, told)
                seal = Seal(
                    writer.close(self._streaming.budget.threads),
                    {name: attrs.asdict(found, recurse=False) for name, found in measured.items()},
                )
            journal.add(seal)

    def _fill(
        self, shard: Shard, writer: CheckpointWriter, journal: Journal, taken: Sequence[Note], told: _RunProgress
    ) -> dict[str, Measurement]:
        """Write all that is missing of a file."""
        done = {note.tensor: note.stop for note in taken}
        found = _Measurements()
        for note in taken:
            if note.tally is not None:
                found.add(Chunk(shard.ledger[note.tensor], note.start, note.stop), Tally.from_dict(note.tally))
        converted, resumed = 0, sum(_nbytes(shard, note) for note in taken)
        if taken:
            told.skip(taken[-1].tensor, resumed)
        for ready in self._streaming.convert(shard.ledger, done):
            told.begin(ready.chunk)
            self._put(ready, writer, journal, found)
            converted += ready.chunk.nbytes
            told.end(ready.chunk)
        self._count(shard, converted, resumed)
        for row in shard.ledger.stored:
            writer.set_measurement(row, found.measured.get(row.name))
        return found.measured

    def _put(self, ready: Converted, writer: CheckpointWriter, journal: Journal, found: _Measurements) -> None:
        chunk, row = ready.chunk, ready.chunk.row
        writer.append(chunk, ready.value)
        tally = None if ready.tally is None else ready.tally.to_dict()
        journal.add(Note(row.name, chunk.start, chunk.stop, ready.source, writer.written(row), tally))
        if ready.tally is not None:
            found.add(chunk, ready.tally)

    def _count(self, shard: Shard, converted: int, resumed: int) -> None:
        share = self.share
        self.share = Share((*share.files, shard.file), share.converted + converted, share.resumed + resumed)

    def _is_sound(self, shard: Shard, seal: Seal) -> bool:
        """Whether a file that was complete still is what it was."""
        try:
            found = Checkpoint(self._workplace.files / shard.file, self._serializer)
            return found.headers == {shard.file: seal.header} and not found.damaged()
        except CheckpointError:
            return False

    def _check_source(self, shard: Shard, notes: Sequence[Note]) -> None:
        """Read the source again, as far as it has been read.

        Raises:
            CheckpointError: naming what has changed.
        """
        for note in notes if self._paranoid else ():
            row = shard.ledger[note.tensor]
            if self._streaming.source_digest(Chunk(row, note.start, note.stop)) != note.source:
                self._source_changed = True
                raise CheckpointError(
                    f"{self._streaming.source.path}: {row.name} has changed since it was read, between elements "
                    f"{note.start:,} and {note.stop:,}"
                )

    def check_complete(self) -> dict[str, Seal]:
        """See that every file has been written.

        Returns:
            the end of each file's journal, by the name of the file.

        Raises:
            CheckpointError: naming those that have not.
        """
        with self._workplace.in_place():
            seals = self._workplace.seals()
            if missing := sorted(self._shards.keys() - seals.keys()):
                raise CheckpointError(
                    f"not complete: {', '.join(missing)}; what is done is kept until they are written"
                )
            return seals

    def finish(self) -> Finished:
        """Write the index, copy what goes with the tensors, and publish the result.

        Raises:
            CheckpointError: if a file is missing, or that cannot be done.
        """
        source = self._streaming.source
        seals = self.check_complete()
        with self._keeping():
            self._workplace.clear()
            headers = {file: seal.header for file, seal in seals.items()}
            if self._workplace.folder:
                stem = STEM if self._readers is None else self._readers.stem
                write_index(self._workplace.files, self.shards, headers, self._serializer.suffix, stem)
                source.copy_companions(self._workplace.files, self._readers)
            self._workplace.publish()
        tell_unscaled(self._streaming.demand.ledger)
        if source.left_behind:
            emit("warning", "left_behind", folder=str(source.folder), files=list(source.left_behind))
        return Finished(
            headers,
            {name: _measurement(found) for seal in seals.values() for name, found in seal.measured.items()},
        )


class _Measurements:
    """What has been found out about tensors: of those that are through, no more than their measurement is held."""

    def __init__(self) -> None:
        self.measured: dict[str, Measurement] = {}
        self._tallies: dict[str, Tally] = {}

    def add(self, chunk: Chunk, tally: Tally) -> None:
        """Take in the next chunk of a tensor."""
        row = chunk.row
        if not chunk.is_first:
            self._tallies[row.name].join(tally)
            tally = self._tallies[row.name]
        self._tallies[row.name] = tally
        if chunk.is_last:
            self.measured[row.name] = self._tallies.pop(row.name).measurement(columns_of(row))


def _nbytes(shard: Shard, note: Note) -> int:
    return Chunk(shard.ledger[note.tensor], note.start, note.stop).nbytes


def _measurement(fields: Mapping[str, Any]) -> Measurement:
    broken = fields["broken_at"]
    return Measurement(**{**fields, "broken_at": None if broken is None else (broken[0], broken[1])})


class _RunProgress:
    """Tells how far a conversion is, over all its files."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def skip(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        self._progress(Step("convert", name, self._done, self._total))

    def begin(self, chunk: Chunk) -> None:
        self._progress(Step("convert", chunk.row.name, self._done, self._total))

    def end(self, chunk: Chunk) -> None:
        self._done += chunk.nbytes
        self._progress(Step("convert", chunk.row.name, self._done, self._total))
