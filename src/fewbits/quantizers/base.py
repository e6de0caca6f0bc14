"""`Quantizer`: a scheme with its lifecycle: prepare, observe, convert, validate, save."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final, get_args

from torch import nn

from fewbits._sizes import parse_size
from fewbits.calibration.batches import SAMPLES, Observed
from fewbits.calibration.running import Forward, run
from fewbits.checkpoint.output import Output
from fewbits.conversion.coordinator import Coordinator, Written
from fewbits.conversion.file_job import FileJob
from fewbits.conversion.live_job import LiveJob
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.kernels.base import Compute
from fewbits.kernels.choose import check_compute
from fewbits.nn.computing import prepack
from fewbits.quantizers.lifecycle import TRANSITIONS, Lifecycle, guard
from fewbits.quantizers.outcome import OnFailure, act_on_failure, emit_report, evaluation_of
from fewbits.quantizers.scheme import check_choice
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.file import FileSource
from fewbits.sources.open import open_source
from fewbits.validation.checks import check_fail_under
from fewbits.validation.report import Report
from fewbits.validation.tensors import CRITICAL_DB


class Quantizer(Lifecycle):
    """Quantizes one model, state dict or checkpoint in steps: `prepare`, `observe`, `convert`, `validate`, `save`.

    `observe` is needed for strategies that look at data; `validate` and `save` are optional. For a path, `convert`
    writes the result.

    A subclass sets `spec`, the format of stored weights: on the class, or on `self` before it calls
    ``super().__init__()``. It overrides `spec_for` to choose a spec for each tensor, and `quantize_tensor` to make
    codes in a way that no `rounding` offers; such a scheme takes no `rounding`. The steps are final. The arguments of
    `__init__` choose the strategies.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overridden = [call for call in TRANSITIONS if getattr(cls, call) is not getattr(Quantizer, call)]
        if overridden:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}; the lifecycle is final: override spec, spec_for or "
                "quantize_tensor, or inject an observer, a selector or a serializer"
            )

    @final
    def prepare(
        self,
        source: object,
        *,
        inplace: bool = False,
        entry: str | None = None,
        model: nn.Module | None = None,
    ) -> Any:
        """Open a source and decide the fate of every tensor in it.

        Args:
            source: an `nn.Module`, a state dict, or the path of a checkpoint: a safetensors file, one of
                `torch.save`, or a directory of either. It is not modified.
            inplace: quantize the model or mapping itself; `convert` replaces its weights one by one.
            entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that, as a
                training checkpoint does; ``"a.b"`` names an entry within an entry.
            model: a model with the weights of the checkpoint `source`, for a rounding strategy that needs data, or for
                `validate` with data. It does not change. Names may differ from those in the files: parameters are found
                by their shape and values.

        Returns:
            for a model, a copy of its structure that shares its weights, to run for calibration (the model itself, if
            `inplace`); otherwise `source`.

        Raises:
            StateError: in any state but CREATED.
            ArgumentError: if `source` cannot be quantized, or has no such entry.
            SelectionError: if a rule matches nothing, or nothing is left to quantize.
            SourceError: if the source cannot be quantized, such as a model that cannot be copied.
            CalibrationError: if an observer needs data, and the source cannot run any.
            CheckpointError: if a file cannot be read; a MismatchError if `model` lacks a tensor to quantize.
        """
        guard(self._state, "prepare")
        opened = open_source(source, inplace=inplace, entry=entry)
        if model is not None and not isinstance(opened, FileSource):
            raise ArgumentError("model= goes with the path of a checkpoint; load a state dict into the model first")
        ledger = self._plan(opened.infos)
        if isinstance(opened, FileSource):
            self._job = FileJob(opened, ledger, self.observer, self.activation_observer, self.rounding, model)
        else:
            self._job = LiveJob(opened, ledger, self.observer, self.activation_observer, self.rounding)
        self._advance("prepare", tensors=len(ledger), quantized=ledger.count("quantized"), cast=ledger.count("cast"))
        return opened.prepared()

    @final
    def observe(
        self,
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
        samples: int | None = SAMPLES,
        spill: str | os.PathLike[str] | None = None,
        progress: Progress = no_progress,
    ) -> Observed:
        """Run data through the prepared model, for strategies that look at inputs. Can be called repeatedly.

        Args:
            batches: a list, a DataLoader or another iterable of tensors, (input, target) pairs, or mappings such as
                the output of a transformers tokenizer.
            forward: runs one batch, ``forward(model, batch)``, if the model takes other inputs.
            samples: stop after this many; the length of a batch's first axis is its number of samples. None runs all
                batches.
            spill: a directory for temporary files with the activations that a rounding strategy needs; None keeps them
                in memory.
            progress: called after every batch.

        Returns:
            how many samples and batches this call ran, and whether data was left. The report of `validate` has the sum
            over all calls.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            CalibrationError: if the source has no forward, or there is no batch, or the model cannot run one.
        """
        job = self._guarded("observe")
        model = job.module()
        if model is None:
            raise CalibrationError("a state dict or a file has no forward to observe; prepare it with a model")
        watching = job.watching(forward, None if spill is None else Path(spill))
        seen = run(model, batches, watching, samples=samples, progress=progress)
        job.observed = seen if job.observed is None else job.observed + seen
        self._advance("observe", **seen.to_dict())
        return seen

    @final
    def convert(
        self,
        *,
        output: str | os.PathLike[str] | Output | None = None,
        compare: bool | None = None,
        compute: Compute = "auto",
        progress: Progress = no_progress,
    ) -> Any:
        """Quantize the source with its current weights, a tensor at a time.

        Args:
            output: where to write the result, a path or an `Output`; required if the source is a path.
            compare: compare every element with the source. None compares if `validate` could not do it later (in
                place), or if the file records the measurements (a path).
            compute: how the layers of a model may compute; see `fewbits.set_compute`.
            progress: called before and after every tensor.

        Returns:
            the quantized model, mapping {name: Tensor or QuantizedTensor}, or path, like the source.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            ArgumentError: if `output` is missing, or `output` or `compute` does not go with the source; if an
                unfinished run exists, and the output does not mention it, or the run cannot be resumed.
            CalibrationError: if an observer needs data and has seen none.
            SourceError: if the source has changed since it was prepared, or would go on using a float weight.
            CheckpointError: if a file cannot be written.
            RankError: with `Output(distributed=True)`, if another rank fails.
            NumericsError: if a tensor holds NaN or Inf, or numbers that its scheme cannot hold. Nothing has been
                returned or published then; in place, the model is usable, and `convert` can be called again.
        """
        job = self._guarded("convert")
        check_compute(compute)
        if compute != "auto" and job.source.module() is None:
            raise ArgumentError(f"compute={compute!r} goes with a model; a state dict or a file has no layers")
        encoder = self._encoder()
        comparing = job.compares if compare is None else compare
        target = None if output is None else Output.of(output)
        result = job.convert(encoder, self.serializer, target, comparing, progress)
        if isinstance(result, nn.Module):
            # A custom `quantize_tensor` may keep its tensors, and the caller those of a model quantized in place.
            prepack(result, compute, reuse_memory=encoder.quantize_tensor is None and not job.source.inplace)
        self._advance("convert", bytes_before=job.ledger.bytes_before, bytes_after=job.ledger.bytes_after)
        return result

    @final
    def validate(
        self,
        data: Iterable[Any] | None = None,
        *,
        forward: Forward | None = None,
        metrics: Sequence[str] | None = None,
        limits: Mapping[str, float] | None = None,
        on_failure: OnFailure = "error",
        fail_under: float = CRITICAL_DB,
        progress: Progress = no_progress,
    ) -> Report:
        """Check the result against the source, element by element, and save and load it once.

        With data, the float model and the quantized model run side by side, and the report says how their outputs
        differ, and what the rounding of each weight does to the output of its layer.

        Args:
            data: batches, as for `observe`; all of them are run. None compares no outputs.
            forward: runs one batch, ``forward(model, batch)``, and returns the output to compare.
            metrics: what to compare: "kl" and "top1" (for logits), "cosine", "sqnr", "perplexity" (for logits of the
                next token). None takes "kl" and "top1" for an output named ``logits``, else "cosine" and "sqnr".
            limits: figures of metrics beyond which the model fails, such as ``{"kl": 0.1, "top1": 0.9}``: the most for
                "kl" (nats) and "perplexity", the least for "top1", "cosine" and "sqnr" (dB).
            on_failure: whether a failure raises an error, warns, or only appears in the report.
            fail_under: SQNR in dB below which a tensor is critical, which is a failure. Where the error of the layer's
                output is known, the SQNR of the output counts, else that of the weight.
            progress: called before and after every tensor, and after every batch.

        Raises:
            StateError: in any state but CONVERTED and VALIDATED.
            ValidationError: if something failed and `on_failure` is "error"; it carries the report.
            ArgumentError: for another value of `on_failure`, a `fail_under` that is no number, an unknown metric, or
                settings of a comparison without data.
            CalibrationError: if `data` is given for a source without a float model (a state dict, a file without
                `model`, a model quantized in place), or the outputs of a batch cannot be compared.
        """
        job = self._guarded("validate")
        check_choice("on_failure", on_failure, get_args(OnFailure))
        check_fail_under(fail_under)
        job.evaluate(evaluation_of(data, forward, metrics, limits), progress)
        report = job.examine(self.serializer, fail_under, progress)
        if job.leads:
            emit_report(report, self.name)
        act_on_failure(report, on_failure)
        self._advance("validate", ok=report.ok)
        return report

    @final
    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write the result atomically to a file, or to a directory of several, and read it back.

        Args:
            path: the file, which is replaced if it exists; or the directory, which must be new.
            max_shard_size: the most bytes of tensors in one file of a directory, as a number or a text such as
                ``"5GB"``; a larger tensor gets its own file. None writes a single file.

        Raises:
            StateError: before `convert`.
            ArgumentError: if the path is that of the float source, or of a directory with files in it, or its suffix
                belongs to another format.
            CheckpointError: if it cannot be written, or reading back gives other bytes.
        """
        size = None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size")
        self._guarded("save").save(self.serializer, path, size)
        self._advance("save", path=os.fspath(path))

    @final
    def reset(self) -> None:
        """Release source and result, and return to CREATED."""
        if self._job is not None:
            self._job.drop()
            self._job = None
        self._advance("reset")

    # A conversion that several processes share; see `fewbits.FleetRun`.

    @final
    def share(
        self, output: str | os.PathLike[str] | Output, *, compare: bool = True, progress: Progress = no_progress
    ) -> Coordinator:
        """Plan the conversion of a prepared path, for several processes that share it.

        Args:
            output: where the result goes.
            compare: compare every element with the source.
            progress: called before and after every chunk.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            ArgumentError: if the source is in memory, or the result cannot be written to `output`.
        """
        return self._guarded_file_job().coordinator(
            self._encoder(), self.serializer, Output.of(output), comparing=compare, shared=True, progress=progress
        )

    @final
    def adopt(self, written: Written) -> None:
        """Take over a result that processes have shared, in place of calling `convert`.

        Args:
            written: the result of `Coordinator.finish`.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            ArgumentError: if the source is in memory.
        """
        job = self._guarded_file_job()
        job.adopt(written)
        self._advance("convert", bytes_before=job.ledger.bytes_before, bytes_after=job.ledger.bytes_after)
