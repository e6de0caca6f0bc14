"""`FileWriter`: writes the files of a result, and keeps a journal of each."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from fewbits.checkpoint.chunks import Chunk, columns_of
from fewbits.checkpoint.journal import Journal, Note, Seal
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import CheckpointWriter
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.conversion.staging import StagingDirectory
from fewbits.conversion.streaming import Converted, Streaming
from fewbits.errors import CheckpointError
from fewbits.numerics.metrics import Measurement, Tally
from fewbits.selection.progress import Progress, Step


@attrs.frozen
class Share:
    """The work of one process on a result on disk.

    Attributes:
        files: the files that it wrote, or found complete.
        converted: bytes of the source that it converted.
        resumed: bytes of the source that an earlier run had converted.
    """

    files: tuple[str, ...] = ()
    converted: int = 0
    resumed: int = 0


class FileWriter:
    """Writes files of one result.

    Args:
        streaming: converts chunks.
        serializer: the format of the files.
        shards: the files of the result.
        staging: where the files are written.
        paranoid: whether to read the source again, as far as an earlier run has read it.
        progress: called before and after every chunk.

    Attributes:
        source_changed: whether the source has changed since an earlier run read it.
    """

    def __init__(
        self,
        streaming: Streaming,
        serializer: Serializer,
        shards: Sequence[Shard],
        staging: StagingDirectory,
        *,
        paranoid: bool,
        progress: Progress,
    ) -> None:
        self.streaming, self.serializer, self.staging = streaming, serializer, staging
        self.shards = {shard.file: shard for shard in shards}
        # Scales that are merged into their weights do not count.
        self.sizes = {
            file: sum(Chunk.whole(row).nbytes for row in shard.ledger.stored) for file, shard in self.shards.items()
        }
        self.source_changed = False
        self._paranoid, self._progress = paranoid, progress

    def write(self, files: Sequence[str]) -> Share:
        """Write the missing parts of some files. A file counts as complete after it was read back.

        Raises:
            CheckpointError: if a file cannot be written; a later run can continue with the written part.
            NumericsError: if a tensor cannot be converted.
        """
        progress = _RunProgress(self._progress, sum(self.sizes[file] for file in files))
        complete = self.staging.seals()
        # Complete files come first, so that the progress afterwards shows the speed of this run.
        shares = [self._write(self.shards[file], progress) for file in sorted(files, key=lambda f: f not in complete)]
        return Share(
            tuple(file for share in shares for file in share.files),
            sum(share.converted for share in shares),
            sum(share.resumed for share in shares),
        )

    def _write(self, shard: Shard, progress: _RunProgress) -> Share:
        with self.staging.journal(shard.file) as journal:
            if journal.seal is not None and self._is_sound(shard, journal.seal):
                self._check_source(shard, journal.notes)
                progress.advance(shard.ledger.stored[-1].name, self.sizes[shard.file])
                return Share((shard.file,), 0, self.sizes[shard.file])
            path, extra = self.staging.files / shard.file, self.streaming.source.extra
            with CheckpointWriter(self.serializer, path, shard.ledger, extra=extra, resumable=True) as writer:
                taken = writer.take_over(journal.notes)
                self._check_source(shard, taken)
                journal.rewrite(taken)
                resumed = sum(_chunk(shard, note).nbytes for note in taken)
                if taken:
                    progress.advance(taken[-1].tensor, resumed)
                converted, measured = self._convert(shard, writer, journal, taken, progress)
                for row in shard.ledger.stored:
                    writer.set_measurement(row, measured.get(row.name))
                header = writer.close(self.streaming.budget.threads)
            journal.add(Seal(header, {name: attrs.asdict(found, recurse=False) for name, found in measured.items()}))
        return Share((shard.file,), converted, resumed)

    def _convert(
        self,
        shard: Shard,
        writer: CheckpointWriter,
        journal: Journal,
        taken: Sequence[Note],
        progress: _RunProgress,
    ) -> tuple[int, dict[str, Measurement]]:
        """Convert and write the missing chunks of a file.

        Returns:
            the bytes of these chunks in the source, and the measurements of all tensors in the file.
        """
        converted, measurements = 0, _Measurements(shard, taken)
        for ready in self.streaming.convert(shard.ledger, {note.tensor: note.stop for note in taken}):
            name, nbytes = ready.chunk.row.name, ready.chunk.nbytes
            progress.advance(name, 0)
            _put(ready, writer, journal)
            if ready.tally is not None:
                measurements.add(ready.chunk, ready.tally)
            converted += nbytes
            progress.advance(name, nbytes)
        return converted, measurements.complete

    def _is_sound(self, shard: Shard, seal: Seal) -> bool:
        """Whether a complete file has not changed since."""
        try:
            found = Checkpoint(self.staging.files / shard.file, self.serializer)
            return found.headers == {shard.file: seal.header} and not found.damaged()
        except CheckpointError:
            return False

    def _check_source(self, shard: Shard, notes: Sequence[Note]) -> None:
        """If paranoid, read the source again, as far as an earlier run has read it."""
        for note in notes if self._paranoid else ():
            chunk = _chunk(shard, note)
            if self.streaming.source_digest(chunk) != note.source:
                self.source_changed = True
                raise CheckpointError(
                    f"{self.streaming.source.path}: {note.tensor} has changed since it was read, between elements "
                    f"{note.start:,} and {note.stop:,}"
                )


def _put(ready: Converted, writer: CheckpointWriter, journal: Journal) -> None:
    chunk, row = ready.chunk, ready.chunk.row
    writer.append(chunk, ready.value)
    tally = None if ready.tally is None else ready.tally.to_dict()
    journal.add(Note(row.name, chunk.start, chunk.stop, ready.source, writer.written(row), tally))


def _chunk(shard: Shard, note: Note) -> Chunk:
    return Chunk(shard.ledger[note.tensor], note.start, note.stop)


class _Measurements:
    """Measurements of the tensors in one file, from the tallies of their chunks.

    Attributes:
        complete: the measurement of each tensor that has been compared with its source.
    """

    def __init__(self, shard: Shard, notes: Sequence[Note]) -> None:
        self.complete: dict[str, Measurement] = {}
        self._tallies: dict[str, Tally] = {}
        for note in notes:
            if note.tally is not None:
                self.add(_chunk(shard, note), Tally.from_dict(note.tally))

    def add(self, chunk: Chunk, tally: Tally) -> None:
        """Add the next chunk of a tensor. After the last chunk, only the measurement stays in memory."""
        name = chunk.row.name
        if not chunk.is_first:
            self._tallies[name].join(tally)
            tally = self._tallies[name]
        self._tallies[name] = tally
        if chunk.is_last:
            self.complete[name] = self._tallies.pop(name).measurement(columns_of(chunk.row))


class _RunProgress:
    """Reports the progress of a run over all its files."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def advance(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        self._progress(Step("convert", name, self._done, self._total))
