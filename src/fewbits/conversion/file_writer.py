"""`FileWriter`: writes the files of a result, and keeps a journal of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from fewbits.checkpoint.chunks import Chunk, columns_of
from fewbits.checkpoint.journal import Note
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import CheckpointWriter
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.conversion.staging import StagingDirectory
from fewbits.conversion.streaming import Streaming
from fewbits.errors import CheckpointError
from fewbits.numerics.metrics import Measurement, Tally
from fewbits.selection.progress import Progress, Step


@attrs.frozen
class Share:
    """The work of one process on a result on disk.

    Attributes:
        files: the files that the process wrote, or found complete.
        converted: bytes of the source that the process converted.
        resumed: bytes of the source that an earlier run had converted.
    """

    files: tuple[str, ...] = ()
    converted: int = 0
    resumed: int = 0


@attrs.frozen(eq=False)
class FileWriter:
    """Writes files of one result.

    Attributes:
        streaming: converts chunks.
        serializer: the format of the files.
        shards: the files of the result, by name.
        staging: the directory where the files are written.
        progress: called before and after every chunk.
        sizes: bytes of the source that each file takes in, by file name; scales that are merged into their weights do
            not count.
    """

    streaming: Streaming
    serializer: Serializer
    shards: Mapping[str, Shard]
    staging: StagingDirectory
    progress: Progress
    sizes: Mapping[str, int] = attrs.field(init=False)

    @sizes.default
    def _sizes(self) -> dict[str, int]:
        return {
            file: sum(Chunk.whole(row).nbytes for row in shard.ledger.stored) for file, shard in self.shards.items()
        }

    def write(self, files: Sequence[str]) -> Share:
        """Write the missing parts of some files. A file counts as complete after it was read back.

        Raises:
            CheckpointError: if a file cannot be written; a later run can continue with the written part.
            NumericsError: if a tensor cannot be converted.
        """
        done, total = 0, sum(self.sizes[file] for file in files)

        def advance(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.progress(Step("convert", name, done, total))

        # Complete files come first, so that the progress afterwards shows the speed of this run.
        complete = self.staging.seals()
        files = sorted(files, key=lambda file: file not in complete)
        counts = [self._write(self.shards[file], advance) for file in files]
        return Share(tuple(files), sum(converted for converted, _ in counts), sum(resumed for _, resumed in counts))

    def measured(self) -> dict[str, Measurement]:
        """How each tensor compares with its source, according to the journals of the complete files."""
        files = [_Measurements(shard, self.staging.notes(file)) for file, shard in self.shards.items()]
        return {name: measurement for file in files for name, measurement in file.complete.items()}

    def _write(self, shard: Shard, advance: Callable[[str, int], None]) -> tuple[int, int]:
        """Write the missing chunks of one file.

        Returns:
            the bytes of the source that were converted now, and the bytes that an earlier run had converted.
        """
        with self.staging.journal(shard.file) as journal:
            if journal.seal is not None and self._is_sound(shard, journal.seal):
                advance(shard.ledger.stored[-1].name, self.sizes[shard.file])
                return 0, self.sizes[shard.file]
            encoder, extra = self.streaming.encoder, self.streaming.source.extra
            outputs = encoder.output_sqnr_db(shard.ledger)
            ledger, of_model = encoder.remarked(shard.ledger), encoder.model_metrics
            about = Metadata(ledger, extra=extra, output_sqnr_db=outputs, model_metrics=of_model)
            with CheckpointWriter(self.serializer, self.staging.files / shard.file, about, resumable=True) as writer:
                taken = writer.take_over(journal.notes)
                journal.rewrite(taken)
                resumed = sum(_chunk(shard, note).nbytes for note in taken)
                if taken:
                    advance(taken[-1].tensor, resumed)
                measurements = _Measurements(shard, taken)
                done = {note.tensor: note.stop for note in taken}
                for chunk, value, tally in self.streaming.convert(shard.ledger, done):
                    name = chunk.row.name
                    advance(name, 0)
                    writer.append(chunk, value)
                    journal.add(Note(name, chunk.start, chunk.stop, writer.written(chunk.row), tally))
                    measurements.add(chunk, tally)
                    advance(name, chunk.nbytes)
                header = writer.close(measurements.complete, self.streaming.budget.threads)
            journal.add_seal(header)
        return self.sizes[shard.file] - resumed, resumed

    def _is_sound(self, shard: Shard, header: str) -> bool:
        """Whether a complete file has not changed since."""
        try:
            found = Checkpoint(self.staging.files / shard.file, self.serializer)
            return found.headers == {shard.file: header} and not found.damaged()
        except CheckpointError:
            return False


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
            self.add(_chunk(shard, note), note.tally)

    def add(self, chunk: Chunk, tally: Tally | None) -> None:
        """Add the next chunk of a tensor. After the last chunk, only the measurement stays in memory."""
        if tally is None:
            return
        name = chunk.row.name
        if not chunk.is_first:
            self._tallies[name].join(tally)
            tally = self._tallies[name]
        self._tallies[name] = tally
        if chunk.is_last:
            self.complete[name] = self._tallies.pop(name).measurement(columns_of(chunk.row))
