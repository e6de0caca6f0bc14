"""`Coordinator`: one result on disk, made by a lead and any number of workers."""

from __future__ import annotations

import math
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
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.shards import STEM, Shard, write_index
from fewbits.conversion.file_writer import FileWriter, Share
from fewbits.conversion.job import measurements
from fewbits.conversion.ranks import Ranks, spread
from fewbits.conversion.recipe import described, fingerprint
from fewbits.conversion.staging import RunInputs
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError
from fewbits.formats.fp8 import tell_unscaled
from fewbits.formats.model_config import Readers
from fewbits.numerics.metrics import Measurement
from fewbits.selection.ledger import Ledger
from fewbits.validation.verify import verify

_RESUME = "finished work is kept: continue with --resume, or Output(resume=True)"

_CHANGED = (
    "the source has changed since this run began, so the run cannot be resumed: start over (--replace, "
    "Output(replace=True)), or restore the source"
)


@attrs.frozen
class Written:
    """A complete result on disk.

    Attributes:
        path: the file or directory.
        headers: the digest in the header of each file, by file name.
        measured: how each tensor compares with its source, if it was compared.
        shares: the work of each process.
    """

    path: Path
    headers: Mapping[str, str]
    measured: Mapping[str, Measurement]
    shares: tuple[Share, ...]


class Coordinator:
    """One result on disk, made by one lead and any number of workers on the same file system.

    The lead calls `begin`, has every file written, and calls `finish`. A worker calls `write`. One process can be lead
    and worker at once. Each process calls `release` in the end.

    Args:
        writer: writes the files.
        path: the path of the result.
        readers: who can open the result, if its source is a transformers model.
        shared: whether other processes are workers too. If so, the files of a failed run stay for them.

    Attributes:
        begun: whether `begin` has found anything to do.
        shards: the files of the result.
        sizes: bytes of the source that each file of the result takes in, by file name.
    """

    def __init__(self, writer: FileWriter, path: Path, readers: Readers | None, *, shared: bool) -> None:
        self._writer, self._path, self._readers, self._shared = writer, path, readers, shared
        self._streaming, self._staging, self._source = writer.streaming, writer.staging, writer.streaming.source
        self.begun, self.sizes = False, writer.sizes
        self.shards: tuple[Shard, ...] = tuple(writer.shards.values())

    # For the lead.

    def begin(self) -> list[str]:
        """Make the staging directory, or take over that of an interrupted run; see `StagingDirectory.begin`.

        Returns:
            the files to write; none if `Output(resume=True)` finds a complete result, which `finish` checks.

        Raises:
            ArgumentError: also if the source lies in the staging directory, where it would be removed.
        """
        source = self._source.path
        if self._staging.path in Path(os.path.realpath(source)).parents:
            raise ArgumentError(f"{source} lies in {self._staging.path}, where the result is made; move it elsewhere")
        with self._staging.in_place():
            self.begun = self._staging.begin(self._inputs())
        return [*self.sizes] if self.begun else []

    def check_complete(self) -> dict[str, str]:
        """Check that every file has been written.

        Returns:
            the digest in the header of each file, by file name.

        Raises:
            CheckpointError: naming the missing files.
        """
        with self._staging.in_place():
            seals = self._staging.seals()
            if missing := sorted(self._writer.shards.keys() - seals.keys()):
                raise CheckpointError(
                    f"not complete: {', '.join(missing)}; finished work is kept until they are written"
                )
            return seals

    def finish(self, shares: Sequence[Share]) -> Written:
        """Write the index, copy companion files, and publish the result.

        Where `begin` has found a complete result, compare all of that with the source instead.

        Args:
            shares: the results of all calls of `write`.

        Raises:
            CheckpointError: if a file is missing or cannot be written.
            ArgumentError: if a complete result differs from the result of this run.
        """
        if not self.begun:
            return self._accept()
        headers = self.check_complete()
        with self._keeping():
            measured = self._writer.measured()
            self._staging.clear()
            if self._staging.folder:
                stem = STEM if self._readers is None else self._readers.stem
                write_index(self._staging.files, self.shards, headers, self._writer.serializer.suffix, stem)
                readers = None if self._readers is None else self._readers.naming(self.shards[0].file)
                self._source.copy_companions(self._staging.files, readers)
            self._staging.publish()
        tell_unscaled(self._streaming.demand.ledger)
        if self._source.left_behind:
            emit("warning", "left_behind", folder=str(self._source.folder), files=list(self._source.left_behind))
        return Written(self._path, headers, measured, tuple(shares))

    def _accept(self) -> Written:
        """Accept a complete result, after comparing all of it with the source."""
        result = Checkpoint(self._path, self._writer.serializer)
        chunk_elements = self._streaming.budget.chunk_elements
        report = verify(result, self._source, chunk_elements=chunk_elements, fail_under=-math.inf)
        failures = report.failures
        if not _have_same_fates(result.ledger, self._streaming.demand.ledger):
            failures = ["the fates of its tensors differ", *failures]
        if result.headers.keys() != self.sizes.keys():
            failures = ["it consists of other files", *failures]
        if failures:
            raise ArgumentError(
                f"{self._path} exists already, and differs from the result for {self._source.path}: "
                f"{failures[0]}. Give another path, or replace it (--replace, Output(replace=True))"
            )
        share = Share(tuple(self.sizes), 0, sum(self.sizes.values()))
        return Written(self._path, result.headers, measurements(report), (share,))

    # For workers.

    def join(self) -> None:
        """Take part in a run that another process has begun; see `StagingDirectory.join`."""
        self._staging.join(self._inputs())

    def write(self, files: Sequence[str]) -> Share:
        """Write the missing parts of some files of the result.

        Raises:
            ArgumentError: if something that the result depends on has changed since the lead's `begin`.
            CheckpointError: if no run has begun, or a file cannot be written.
            NumericsError: if a tensor cannot be converted.
        """
        if not self.begun:
            self.join()
        with self._keeping():
            if not self._shared:
                self._streaming.encoder.begin(self._staging.parts, self._writer.progress)
            return self._writer.write(files)

    # For all.

    def release(self) -> None:
        """Let other runs begin. Unpublished files stay."""
        self._staging.release()

    @cached_property
    def _source_state(self) -> Mapping[str, Any]:
        """The fingerprint of the source at `begin` or `join`."""
        return self._source.fingerprint()

    def _inputs(self) -> RunInputs:
        """Everything that the bytes of the result depend on."""
        demand, encoder = self._streaming.demand, self._streaming.encoder
        return {
            "fewbits": __version__,
            "torch": str(torch.__version__),
            "recipe": {
                "fates of tensors": fingerprint([row.to_dict() for row in demand.ledger]),
                "scheme": described(encoder.recipe),
                **encoder.inputs,
                "comparison with the source": demand.comparing,
                "serializer": described(type(self._writer.serializer)),
            },
            # Another shard size can give files of the same names that hold other tensors.
            "files of the result": [
                [shard.file, fingerprint([row.name for row in shard.ledger])] for shard in self.shards
            ],
            "source": self._source_state,
        }

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """On an error, keep the written files if another run can continue with them; else remove them."""
        try:
            yield
        except BaseException as error:
            resumable = isinstance(error, CheckpointError) or not isinstance(error, FewbitsError)
            kept = self._shared or (resumable and self._staging.has_progress())
            if kept:
                self._staging.release()
            else:
                self._staging.discard()
            hint = _CHANGED if kept and self._has_source_changed() else _RESUME
            if kept and isinstance(error, KeyboardInterrupt):
                error.args = error.args or (f"interrupted; {hint}",)
            with self._staging.in_place(f"; {hint}" if kept else ""):
                raise

    def _has_source_changed(self) -> bool:
        """Whether the source has changed since `begin` or `join`. An unreadable source may come back."""
        try:
            return self._source.fingerprint() != self._source_state
        except CheckpointError:
            return False


def _have_same_fates(result: Ledger, planned: Ledger) -> bool:
    """Compare all rows. A calibration may have added remarks to the rows of a result."""
    found = {row.name: row for row in result}
    return found.keys() == {row.name for row in planned} and all(found[row.name].continues(row) for row in planned)


def convert_on_ranks(coordinator: Coordinator, ranks: Ranks) -> Written:
    """Make a result on all ranks: rank 0 leads, and every rank is a worker."""
    shares: list[Share] = []
    try:
        if ranks.lead(coordinator.begin):
            shares = ranks.gather(coordinator.write(spread(coordinator.sizes, ranks.count)[ranks.rank]))
        return ranks.lead(lambda: coordinator.finish(shares))
    finally:
        coordinator.release()
