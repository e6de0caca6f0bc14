"""`FleetRun`: one conversion from disk to disk, shared by processes that somebody else starts."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from fewbits.api import Result, resolve_settings
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.file_run import FileRun
from fewbits.conversion.job import Share
from fewbits.errors import ArgumentError, StateError
from fewbits.observers.named import ObserverRecipe
from fewbits.quantizers.base import Quantizer
from fewbits.selection.nearest import did_you_mean
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import Selector


class FleetRun:
    """A conversion from disk to disk whose files are written by any processes that see the same file system.

    One process, the driver, calls `begin`, has each file written by a `write` somewhere, and calls `finish`::

        run = FleetRun("model", "int4", output=Output("model-int4", resume=True))
        shares = client.gather(client.map(run.write, run.begin()))  # Dask
        result = run.finish(shares)

    It can be pickled, for which only its arguments count: what `begin` holds stays with the driver. The result has the
    bytes that `quantize` gives.

    Args:
        source: the path of a checkpoint; made absolute.
        scheme: as in `fewbits.quantize`. A `Quantizer` is copied in each process, and stays as it is.
        output: where the result goes, and how; made absolute. `resume` and `replace` count in `begin`, `threads` and
            `max_memory` in each process that writes.
        entry: as in `fewbits.quantize`.
        config: as in `fewbits.quantize`.
        validate: likewise; files are compared with the source where they are written; `finish` checks all digests.
        observer: as in `fewbits.quantize`.
        activation_observer: likewise.
        selector: likewise.
        serializer: likewise.
        settings: likewise.

    Raises:
        ArgumentError: as `fewbits.quantize` does; for a source that is no path; if `output.distributed`.
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
        observer: ObserverRecipe | None = None,
        activation_observer: ObserverRecipe | None = None,
        selector: Selector | None = None,
        serializer: Serializer | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(f"a FleetRun goes from disk to disk; its source must be a path, not {source!r}")
        output = Output.of(output)
        if output.distributed:
            raise ArgumentError("distributed=True is for the ranks of torch.distributed; a FleetRun goes without it")
        strategies = {
            "observer": observer,
            "activation_observer": activation_observer,
            "selector": selector,
            "serializer": serializer,
        }
        self._config, self._quantizer = resolve_settings(scheme, config, strategies, settings)
        # A worker may be somewhere else.
        self._source = os.path.abspath(source)
        self._output = attrs.evolve(output, path=Path(os.path.abspath(output.path)))
        self._validate, self._entry = validate, entry
        self._begun: tuple[Quantizer, FileRun] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_begun": None}

    def begin(self) -> list[str]:
        """Make the place where the result is made, or take over that of an earlier run, and keep other drivers out.

        Returns:
            the files of the result. Each wants a `write`, which for one that an earlier run has completed just reads it
            back. None, if there is a complete result and `Output(resume=True)`: `finish` compares it with the source.

        Raises:
            StateError: if this object has begun already.
            ArgumentError: if something is in the way, or an unfinished run is and the output does not say what to do
                about it, or that run depends on something that has changed.
            CheckpointError: if it cannot be made, or another process is at work there.
            FewbitsError: what `fewbits.quantize` raises before it looks at a number.
        """
        if self._begun is not None:
            raise StateError("begin() has been called; write the files, then call finish(), or release() to let go")
        quantizer, run = self._prepared()
        files = [*run.sizes] if run.begin() else []
        self._begun = quantizer, run
        return files

    def write(self, file: str, *, progress: Progress = no_progress) -> Share:
        """Write one file of the result: all of it, or what another process has left to do when it died.

        For any process, as often as needed, after `begin`. A file that is complete is read back, and stays.

        Args:
            file: its name, one of those that `begin` has returned.
            progress: told about every piece of it.

        Returns:
            what this process has done.

        Raises:
            ArgumentError: if it is not a file of the result, or something that the result depends on has changed since
                `begin`: the source, the arguments, the version of fewbits or torch.
            CheckpointError: if the run has not been begun or is complete, another process is writing the file, or
                something cannot be read or written. What has been written stays for the next `write`.
            NumericsError: if a tensor cannot be converted.
        """
        _, run = self._prepared(progress)
        if file not in run.sizes:
            raise ArgumentError(
                f"{file!r} is not a file of {self._output.path}{did_you_mean(file, run.sizes)}; "
                "begin() returns the names"
            )
        try:
            run.join()
            run.write([file])
        finally:
            run.release()
        return run.share

    def finish(self, shares: Sequence[Share] = (), *, progress: Progress = no_progress) -> Result:
        """Publish the result: index, companions, and all files at once. Then check it, unless ``validate=False``.

        Args:
            shares: what the calls of `write` have returned, to be found in `result.quantizer.shares`.
            progress: told about every tensor that is checked.

        Raises:
            StateError: unless this object has begun.
            CheckpointError: if files are not complete, which it names: everything stays, and they can still be
                written. If something else fails, other drivers may go on (``Output(resume=True)``).
            ArgumentError: if a result was there already, and is not what this would have made.
            ValidationError: as `fewbits.quantize` does.
        """
        if self._begun is None:
            raise StateError("finish() goes with begin(), in the same process; Output(resume=True) goes on with a run")
        quantizer, run = self._begun
        if run.begun:
            run.check_complete()
        try:
            quantizer._conclude(run, self._output, shares)
        finally:
            self.release()
        report = None
        if self._validate:
            config = self._config
            report = quantizer.validate(on_failure=config.on_failure, fail_under=config.fail_under, progress=progress)
        return Result(self._output.path, quantizer.ledger, report, quantizer)

    def release(self) -> None:
        """Let other drivers begin. What has been written stays, for ``Output(resume=True)``."""
        if self._begun is not None:
            self._begun[1].release()
            self._begun = None

    def _prepared(self, progress: Progress = no_progress) -> tuple[Quantizer, FileRun]:
        """The quantizer that knows the source, and the run, not begun: both from the arguments and from headers."""
        quantizer = copy.deepcopy(self._quantizer)
        quantizer.prepare(self._source, entry=self._entry)
        return quantizer, quantizer._shared_run(self._output, measuring=self._validate, progress=progress)
