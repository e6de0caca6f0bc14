"""`Quantizer`: the lifecycle, and the two small methods that a scheme may override."""

from __future__ import annotations

import os
import typing
import warnings
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, final, get_args

import attrs
import torch
from torch import Tensor, nn

from fewbits import calibration
from fewbits._events import emit
from fewbits._sizes import parse_size
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.conversion.file_job import FileJob
from fewbits.conversion.file_run import FileRun
from fewbits.conversion.job import Conversion, Job, Share
from fewbits.conversion.live_job import LiveJob
from fewbits.errors import ArgumentError, CalibrationError, NumericsError, StateError, ValidationError
from fewbits.kernels.base import Compute
from fewbits.kernels.choose import check_compute
from fewbits.nn.compute import prepack
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.plain import not_plain
from fewbits.numerics.quantize import cast, check_finite, quantize
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers import OBSERVERS
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.observers.named import ObserverRecipe, make_observer
from fewbits.quantizers.lifecycle import TRANSITIONS, State, after, guard
from fewbits.quantizers.plan import plan
from fewbits.quantizers.resolving import Ragged, check_ragged, refuse_ragged, resolve_spec
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import UNLESS_ASKED, Ledger, LedgerRow
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.rules import TypeRule, check_types, is_of_type, type_name
from fewbits.selection.selector import Decision, LayerSelector, Selector
from fewbits.sources.base import LiveSource, Source
from fewbits.sources.file import FileSource
from fewbits.sources.open import open_source
from fewbits.validation.report import CRITICAL_DB, LOSE_LESS, Report

OnFailure = Literal["error", "warn", "ignore"]


class Quantizer(ABC):
    """Makes a model, a state dict or a checkpoint smaller: prepare, observe, convert, validate, save.

    A subclass says how codes look with `spec`, an attribute of the class, or of the instance, set before this
    `__init__` runs. Where that depends on the tensor it overrides `spec_for`; where plain rounding is not enough,
    `quantize_tensor`. The lifecycle itself is final.

    Args:
        observer: picks scales and zero points: a name in `fewbits.observers.OBSERVERS` such as ``"mse"``, a table with
            that ``name`` and the observer's arguments, or an observer, of which every layer gets a fresh copy.
        activation_observer: likewise, picks the scales of inputs, for specs with static int8 activations.
        selector: decides which tensors are quantized.
        serializer: writes and reads the result.
        skip_types: classes, or their names, that are kept unless a rule of the selector names them; None stands for
            the scheme's `default_skip`.
        scale_dtype: the dtype of all scales; None stands for each weight's own.
        ragged: what becomes of rows that groups do not divide. ``"auto"``: rows shorter than one group take per-channel
            int8, longer ones get a shorter last group. ``"shorter"``: a shorter last (or only) group. ``"fallback"``:
            per-channel int8. ``"error"``: `prepare` refuses, and names them all.

    Attributes:
        spec: how the codes of this scheme look.
        name: what the scheme is called in tables and messages; the name of the class unless it is set.
        default_skip: classes that this scheme keeps unless asked.
        min_elements: tensors with fewer elements are kept unless asked: their scales, names and shapes would cost about
            what their codes save.
    """

    spec: Spec
    name: ClassVar[str]
    default_skip: ClassVar[tuple[TypeRule, ...]] = ()
    min_elements: ClassVar[int] = 512

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        overridden = [call for call in TRANSITIONS if getattr(cls, call) is not getattr(Quantizer, call)]
        if overridden:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(overridden)}; the lifecycle is final: override spec, spec_for or "
                "quantize_tensor, or inject an observer, a selector or a serializer"
            )

    def __init__(
        self,
        *,
        observer: ObserverRecipe | None = None,
        activation_observer: ObserverRecipe | None = None,
        selector: Selector | None = None,
        serializer: Serializer | None = None,
        skip_types: Sequence[TypeRule] | None = None,
        scale_dtype: torch.dtype | None = None,
        ragged: Ragged = "auto",
    ) -> None:
        if not isinstance(getattr(self, "spec", None), Spec):
            raise ArgumentError(f"{type(self).__name__} has no spec; set one: spec = QuantSpec(...) or CastSpec(...)")
        self.observer = _observer("observer", observer)
        self.activation_observer = _observer("activation_observer", activation_observer)
        self.selector: Selector = _instance("selector", selector, Selector, LayerSelector)
        self.serializer: Serializer = _instance("serializer", serializer, Serializer, SafetensorsSerializer)
        self.skip_types = check_types("skip_types", self.default_skip if skip_types is None else skip_types)
        if scale_dtype is not None and isinstance(self.spec, CastSpec):
            raise ArgumentError(f"{self.name} has no scales; scale_dtype goes with schemes that have")
        self.scale_dtype = scale_dtype
        self.ragged = check_ragged(ragged)
        self._state = State.CREATED
        self._job: Job | None = None

    # What a scheme writes.

    def spec_for(self, info: TensorInfo) -> Spec:
        """The spec for one tensor, which `info.layout` tells how to cut. Rules of the selector outrank it."""
        return self.spec

    def quantize_tensor(self, weight: WeightMatrix, spec: QuantSpec, observer: Observer) -> QuantizedTensor:
        """Make the codes of one weight.

        Args:
            weight: the tensor, seen as a matrix of whole rows.
            spec: how the codes shall look, with its `scale_dtype` settled and without activations, which are no
                matter of the weight.
            observer: this layer's own copy, after it has seen its data.
        """
        return quantize(weight, spec, observer.observe_weight)

    # Where it is.

    @property
    def state(self) -> State:
        """Where this quantizer is in its life."""
        return self._state

    @property
    def ledger(self) -> Ledger:
        """The fate of every tensor, known once a source is prepared.

        Raises:
            StateError: before `prepare`.
        """
        if self._job is None:
            raise StateError(f"there is no ledger in state {self._state.name}; call prepare(model) first")
        return self._job.ledger

    @property
    def report(self) -> Report:
        """What the last validation found.

        Raises:
            StateError: before `validate`.
        """
        if self._job is None or self._job.report is None:
            raise StateError(f"there is no report in state {self._state.name}; call validate() first")
        return self._job.report

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Files of a source directory that go neither into the result nor with it; known as the ledger is."""
        return () if self._job is None else tuple(self._job.left_behind)

    @property
    def opens_in(self) -> str | None:
        """Who can open the result, and why others cannot. Known as the ledger is.

        None unless the source is the directory of a transformers model.
        """
        return None if self._job is None or self._job.readers is None else str(self._job.readers)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What each process did when the result was written: one, or all ranks; empty if the result is in memory."""
        return () if self._job is None else tuple(self._job.shares)

    def shards(self, output: str | os.PathLike[str] | Output) -> tuple[Shard, ...]:
        """The files that `convert` would write there, with the ledger of each; none if the source is in memory.

        Raises:
            StateError: before `prepare`.
            ArgumentError: if the result cannot be written there, or not within the limits of the output.
        """
        if self._job is None:
            raise StateError(f"there is nothing planned in state {self._state.name}; call prepare(path) first")
        return self._job.shards(self._conversion(), self.serializer, Output.of(output))

    # The lifecycle.

    @final
    def prepare(self, source: object, *, inplace: bool = False, entry: str | None = None) -> Any:
        """Take a source and settle the fate of every tensor in it.

        Args:
            source: an `nn.Module`, a state dict, or the path of a checkpoint: a safetensors file, one of
                `torch.save`, or a directory of either. It is not modified.
            inplace: quantize the model or mapping itself; `convert` replaces its weights one by one.
            entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that, as a
                training checkpoint does; ``"a.b"`` names an entry within an entry.

        Returns:
            of a model, a copy of its structure over the same weights, to run for calibration (the model itself, if
            `inplace`); otherwise `source`.

        Raises:
            StateError: in any state but CREATED.
            ArgumentError: if `source` is nothing that can be quantized, or has no such entry.
            SelectionError: if a rule matches nothing, or nothing is left to quantize.
            SourceError: if the source cannot be quantized as it is.
            CalibrationError: if an observer needs data, and the source has no forward to show it any.
            CheckpointError: if a file cannot be read.
        """
        guard(self._state, "prepare")
        opened = open_source(source, inplace=inplace, entry=entry)
        infos = [
            attrs.evolve(info, skip=self._skip_reason(info), min_elements=self.min_elements) for info in opened.infos
        ]
        ledger = plan(infos, list(self.selector.select(infos)), self._choose)
        refuse_ragged(ledger, self.ragged)
        coded = {row.name: row.spec for row in ledger if isinstance(row.spec, QuantSpec)}
        observers = {name: self.observer.fresh() for name in coded}
        static = [name for name, spec in coded.items() if spec.activations == "static"]
        input_observers = {name: self.activation_observer.fresh() for name in static}
        self._job = _job_of(opened)(opened, ledger, observers, input_observers)
        self._advance("prepare", tensors=len(ledger), quantized=ledger.count("quantized"), cast=ledger.count("cast"))
        return opened.prepared()

    @final
    def observe(
        self,
        batches: Iterable[Any],
        *,
        forward: calibration.Forward | None = None,
        samples: int | None = calibration.SAMPLES,
        progress: Progress = no_progress,
    ) -> calibration.Observed:
        """Run data through the prepared model, for observers that look at inputs. As often as you like.

        Args:
            batches: a list, a DataLoader or another iterable of tensors, (input, target) pairs, or mappings such as
                a tokenizer of transformers returns.
            forward: runs one batch, ``forward(model, batch)``, where these do not fit.
            samples: stop after this many; the first axis of a batch counts them, be they sentences, images or tokens.
                None runs all batches.
            progress: told how far it is, from 50 samples up.

        Returns:
            how many samples and batches this call ran, and whether data was left. The report of `validate` has the sum
            over all calls.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            CalibrationError: if the source has no forward, or there is no batch, or one cannot be fed.
        """
        job = self._guarded("observe")
        model = job.source.module()
        if model is None:
            raise CalibrationError("a state dict or a file has no forward to observe; prepare the model itself")
        seen = calibration.run(model, batches, forward, samples=samples, progress=progress)
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
        """Quantize, a tensor at a time. The weights are read now.

        Args:
            output: where to write the result, if the source is a path; required then. A path, or an `Output` that says
                how, too.
            compare: compare every element with the source, while it is there. None does so where `validate` could
                not do it later (in place) or the file shall carry the figures (a path).
            compute: what the layers of a model may do to be fast; see `fewbits.set_compute`.
            progress: told about every tensor, before and after it.

        Returns:
            what came in, quantized: a model, a mapping {name: Tensor or QuantizedTensor}, or the path of a file.

        Raises:
            StateError: in any state but PREPARED and OBSERVED.
            ArgumentError: if `output` is missing, or it or `compute` does not go with the source; if an unfinished run
                is there that the output does not mention, or that cannot be gone on with.
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
        inplace = isinstance(job.source, LiveSource) and job.source.inplace
        result = job.convert(
            self._conversion(),
            self.serializer,
            output=output,
            measuring=job.measures if compare is None else compare,
            progress=progress,
        )
        if isinstance(result, nn.Module):
            # What a scheme of somebody else's has made may be held elsewhere, and so may what is in a model of theirs.
            prepack(result, compute, reuse_memory=self._rounds_itself and not inplace)
        self._advance("convert", bytes_before=job.ledger.bytes_before, bytes_after=job.ledger.bytes_after)
        return result

    @final
    def validate(
        self,
        *,
        on_failure: OnFailure = "error",
        fail_under: float = CRITICAL_DB,
        progress: Progress = no_progress,
    ) -> Report:
        """Check the result against the source, element by element, and against itself after a save and a load.

        Args:
            on_failure: whether a failure raises, warns, or is only in the report.
            fail_under: SQNR in dB below which a tensor is critical, which is a failure.
            progress: told about every tensor, before and after it.

        Raises:
            StateError: in any state but CONVERTED and VALIDATED.
            ValidationError: if something failed and `on_failure` is "error"; it carries the report.
            ArgumentError: for another value of `on_failure`, or a `fail_under` that is no number.
        """
        job = self._guarded("validate")
        check_on_failure(on_failure)
        report = job.examine(self.serializer, fail_under, progress)
        if job.leads:
            self._tell(report)
        if not report.ok and on_failure != "ignore":
            message = f"validation failed:\n{report.summary()}"
            if on_failure == "error":
                raise ValidationError(message, report)
            warnings.warn(message, stacklevel=2)
        self._advance("validate", ok=report.ok)
        return report

    @final
    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write the result to a file, or a directory of several, atomically, and read it back.

        Args:
            path: the file, which is replaced if it exists; or the directory, which must be new.
            max_shard_size: the most bytes of tensors in one file of a directory, as a number or a text such as
                ``"5GB"``; a larger tensor has a file of its own. None writes a single file.

        Raises:
            StateError: before `convert`.
            ArgumentError: if the path is that of the float source, or of a directory with files in it, or the name
                that of a file of another format.
            CheckpointError: if it cannot be written, or what is read back is not what was written.
        """
        size = None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size")
        self._guarded("save").save(self.serializer, path, size)
        self._advance("save", path=os.fspath(path))

    @final
    def reset(self) -> None:
        """Let go of source and result and go back to CREATED."""
        if self._job is not None:
            self._job.drop()
            self._job = None
        self._advance("reset")

    # A path whose result other processes write, too; see `fewbits.fleet`.

    def _shared_run(self, output: Output, *, measuring: bool, progress: Progress) -> FileRun:
        """The conversion of a prepared path, not begun."""
        return self._file_job().run(
            self._conversion(), self.serializer, output, measuring=measuring, shared=True, progress=progress
        )

    def _conclude(self, run: FileRun, output: Output, shares: Sequence[Share]) -> None:
        """Publish what was written; from here on it is as if `convert` had done it."""
        job = self._file_job()
        job.conclude(run, self.serializer, output, shares)
        self._advance("convert", bytes_before=job.ledger.bytes_before, bytes_after=job.ledger.bytes_after)

    def _file_job(self) -> FileJob:
        return typing.cast(FileJob, self._guarded("convert"))

    # The work behind it.

    def _guarded(self, call: str) -> Job:
        """The job, if the call is legal now."""
        guard(self._state, call)
        if self._job is None:
            raise StateError(f"{call}() needs a source; call reset(), then prepare(model)")
        return self._job

    def _advance(self, call: str, **fields: object) -> None:
        self._state = after(self._state, call)
        emit("info", call, scheme=self.name, state=self._state.name, **fields)

    def _tell(self, report: Report) -> None:
        """An event for every tensor that was measured, and warnings that nobody can miss."""
        for t in report.tensors:
            if t.measurement is not None and t.verdict is not None:
                level: Literal["info", "warning"] = "warning" if t.verdict == "critical" else "info"
                sqnr_db = round(t.measurement.sqnr_db, 2)
                emit(level, "sqnr", tensor=t.name, scheme=t.scheme, sqnr_db=sqnr_db, verdict=t.verdict)
        if report.warnings:
            count, least = len(report.warnings), report.warnings[0]
            emit("warning", "low_sqnr", scheme=self.name, tensors=count, least=least, advice=LOSE_LESS)
        for failure in report.failures:
            emit("warning", "validation_failure", scheme=self.name, finding=failure)

    def _skip_reason(self, info: TensorInfo) -> str | None:
        for rule in self.skip_types:
            if is_of_type(info, rule):
                kind = "an embedding by name," if info.is_embedding_by_name else f"{type_name(rule)} is"
                return f"{kind} kept by {self.name} {UNLESS_ASKED}"
        return None

    def _choose(self, info: TensorInfo, decision: Decision) -> tuple[Spec, str]:
        """The spec for a tensor, and the reason for the ledger."""
        own = self.spec_for(info)
        spec = own if decision.override is None else decision.override.spec(own)
        reason = decision.reason if spec == self.spec or decision.override else f"{self.name} chose {spec} for it"
        if isinstance(spec, CastSpec):
            return spec, reason
        if self.scale_dtype is not None and (decision.override is None or spec.scale_dtype is None):
            spec = attrs.evolve(spec, scale_dtype=self.scale_dtype)
        return resolve_spec(spec, info, self.ragged, reason)

    @property
    def _rounds_itself(self) -> bool:
        """Whether `quantize_tensor` is the one of this class: codes of a row depend on nothing else then."""
        return getattr(self.quantize_tensor, "__func__", None) is Quantizer.quantize_tensor

    def _conversion(self) -> Conversion:
        return Conversion(self._convert_tensor, by_rows=self._rounds_itself, recipe=self._recipe)

    def _recipe(self) -> object:
        """What decides on codes besides the ledger, which holds what the selector and `spec_for` have decided."""
        if self._rounds_itself:
            return self.observer
        apart = {"selector", "serializer", "activation_observer", "_state", "_job"}
        return [type(self), {name: value for name, value in vars(self).items() if name not in apart}]

    def _convert_tensor(self, row: LedgerRow, tensor: Tensor, observer: Observer | None) -> Value:
        if isinstance(row.spec, CastSpec):
            return cast(tensor, row.spec.dtype)
        if row.spec is None or row.layout is None or observer is None:
            raise ArgumentError(f"{row.name} is {row.fate}; only quantized and cast tensors are converted")
        weight = WeightMatrix(tensor, row.layout)
        spec = row.spec.weight_only()
        if type(self).quantize_tensor is not Quantizer.quantize_tensor:
            check_finite(tensor)  # which `quantize` does block by block
        value = self.quantize_tensor(weight, spec, observer)
        if not isinstance(value, QuantizedTensor):
            raise NumericsError(
                f"{type(self).__name__}.quantize_tensor returned a {type(value).__name__}, not a QuantizedTensor"
            )
        if (value.spec, value.layout, value.dtype) != (spec, row.layout, row.dtype):
            raise NumericsError(
                f"{type(self).__name__}.quantize_tensor returned {value.spec} of shape {value.shape} in "
                f"{dtype_name(value.dtype)}; it must keep the spec, layout and dtype it was given"
            )
        for part, held in value.parts().items():
            if why := not_plain(held):
                raise NumericsError(f"the part {part!r} of what {type(self).__name__}.quantize_tensor returned {why}")
        return value


def _job_of(source: Source) -> Callable[..., Job]:
    return FileJob if isinstance(source, FileSource) else LiveJob


def check_on_failure(on_failure: str) -> None:
    """Refuse what `Quantizer.validate` does not know.

    Raises:
        ArgumentError: listing what it knows.
    """
    if on_failure not in get_args(OnFailure):
        raise ArgumentError(f"on_failure must be 'error', 'warn' or 'ignore', not {on_failure!r}")


def _observer(name: str, value: ObserverRecipe | None) -> Observer:
    """An observer, made if it is given by name; the default for None.

    Raises:
        ArgumentError: if it is something else, or there is none of that name.
    """
    if value is None:
        return MinMaxObserver()
    if isinstance(value, Observer):
        return value
    if isinstance(value, (str, Mapping)):
        return make_observer(name, value)
    known = ", ".join(map(repr, OBSERVERS))
    raise ArgumentError(f"{name} must be an instance of Observer, or the name of one: {known}; not {value!r}")


def _instance(name: str, value: Any, expected: type, default: Callable[[], Any]) -> Any:
    """A strategy, if it is one (the usual mistake is to pass its class); the default for None.

    Raises:
        ArgumentError: if it is something else.
    """
    if value is None:
        return default()
    if not isinstance(value, expected):
        raise ArgumentError(f"{name} must be an instance of {expected.__name__}, not {value!r}")
    return value
