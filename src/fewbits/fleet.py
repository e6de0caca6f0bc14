"""`FleetRun`: a conversion from disk to disk, shared by processes that the caller starts."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from fewbits.api import Result
from fewbits.checkpoint.output import Output
from fewbits.config.arguments import resolve_settings
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.coordinator import Coordinator
from fewbits.conversion.file_writer import Share
from fewbits.errors import ArgumentError, StateError
from fewbits.quantizers.base import Quantizer
from fewbits.selection.nearest import did_you_mean
from fewbits.selection.progress import Progress, no_progress


class FleetRun:
    """A conversion from disk to disk, shared by processes on one file system.

    One process, the driver, calls `begin`, has some process call `write` for each file, and calls `finish`::

        run = FleetRun("model", "int4", output=Output("model-int4", resume=True))
        shares = client.gather(client.map(run.write, run.begin()))  # Dask
        result = run.finish(shares)

    A pickled `FleetRun` carries its arguments only; the run that `begin` has started stays with the driver. The result
    has the same bytes as that of `quantize`.

    Args:
        source: the path of a checkpoint; made absolute.
        scheme: the name of a scheme, or a `Quantizer`, of which each process uses a copy.
        output: where the result goes, and how; made absolute. `begin` reads `resume` and `replace`; each process that
            writes reads `threads` and `max_memory`.
        entry: the name of the state dict in a file of `torch.save` that holds more than that.
        config: settings. A setting that is also an argument is replaced, not merged.
        validate: whether `write` compares each file with the source, and `finish` checks all digests.
        settings: observers, a selector, a serializer, and all other settings, as in `fewbits.quantize`.

    Raises:
        ArgumentError: as `fewbits.quantize` does; if the source is no path; if `output.distributed`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        scheme: str | Quantizer | None = None,
        *,
        output: str | os.PathLike[str] | Output,
        entry: str | None = None,
        config: QuantizationConfig | None = None,
        validate: bool = True,
        **settings: Any,
    ) -> None:
        if not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(f"a FleetRun goes from disk to disk; its source must be a path, not {source!r}")
        output = Output.of(output)
        if output.distributed:
            raise ArgumentError("distributed=True is for the ranks of torch.distributed; a FleetRun does not need it")
        self._config, self._quantizer = resolve_settings(scheme, config, settings, FleetRun)
        # A worker may run in another directory.
        self._source = os.path.abspath(source)
        self._output = attrs.evolve(output, path=Path(os.path.abspath(output.path)))
        self._validate, self._entry = validate, entry
        self._begun: tuple[Quantizer, Coordinator] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_begun": None}

    def begin(self) -> list[str]:
        """Make the staging directory, or take over that of an interrupted run, and keep other drivers out.

        Returns:
            the files of the result; call `write` for each. A file that an earlier run has completed is only read back.
            The list is empty if `Output(resume=True)` finds a complete result: `finish` compares that with the source.

        Raises:
            StateError: if this object has begun already.
            ArgumentError: if the output exists and may not be replaced; if an unfinished run exists, and `output` sets
                neither `resume` nor `replace`; or if an input of the resumed run has changed.
            CheckpointError: if the directory cannot be made, or another process is at work there.
            FewbitsError: the errors that `fewbits.quantize` raises before it reads a weight.
        """
        if self._begun is not None:
            raise StateError("begin() has been called already; write the files and call finish(), or call release()")
        quantizer, coordinator = self._prepared()
        files = coordinator.begin()
        self._begun = quantizer, coordinator
        return files

    def write(self, file: str, *, progress: Progress = no_progress) -> Share:
        """Write one file of the result, or the part of it that a process has not written before it died.

        Any process may call this after `begin`, as often as needed. A complete file is only read back.

        Args:
            file: a name that `begin` has returned.
            progress: called before and after every chunk.

        Returns:
            the work of this process.

        Raises:
            ArgumentError: if it is not a file of the result, or an input has changed since `begin`: the source, the
                arguments, the version of fewbits or torch.
            CheckpointError: if the run has not begun or is complete, if another process is writing the file, or if
                something cannot be read or written. The next `write` continues after the written part.
            NumericsError: if a tensor cannot be converted.
        """
        _, coordinator = self._prepared(progress)
        if file not in coordinator.sizes:
            raise ArgumentError(
                f"{file!r} is not a file of {self._output.path}{did_you_mean(file, coordinator.sizes)}; "
                "begin() returns the names"
            )
        try:
            return coordinator.write([file])
        finally:
            coordinator.release()

    def finish(self, shares: Sequence[Share] = (), *, progress: Progress = no_progress) -> Result:
        """Publish the index, companion files and all files at once. Then check them, unless ``validate=False``.

        Args:
            shares: the results of all calls of `write`; kept in `result.quantizer.shares`.
            progress: called for every tensor that is checked.

        Raises:
            StateError: unless this object has begun.
            CheckpointError: naming the incomplete files, if any: everything stays, and they can still be written. After
                any other failure, other drivers may continue (``Output(resume=True)``).
            ArgumentError: if a complete result existed already, and differs from the result of this run.
            ValidationError: as `fewbits.quantize` does.
        """
        if self._begun is None:
            raise StateError("call begin() first, in this process; Output(resume=True) continues an interrupted run")
        quantizer, coordinator = self._begun
        if coordinator.begun:
            coordinator.check_complete()
        try:
            quantizer.adopt(coordinator.finish(shares))
        finally:
            self.release()
        report = None
        if self._validate:
            config = self._config
            report = quantizer.validate(on_failure=config.on_failure, fail_under=config.fail_under, progress=progress)
        return Result(self._output.path, quantizer.ledger, report, quantizer)

    def release(self) -> None:
        """Let other drivers begin. Written files stay, for ``Output(resume=True)``."""
        if self._begun is not None:
            self._begun[1].release()
            self._begun = None

    def _prepared(self, progress: Progress = no_progress) -> tuple[Quantizer, Coordinator]:
        """Plan the run, from the arguments and the headers of the source."""
        quantizer = copy.deepcopy(self._quantizer)
        quantizer.prepare(self._source, entry=self._entry)
        return quantizer, quantizer.share(self._output, compare=self._validate, progress=progress)
