"""`LiveJob`: a model or a state dict on its way to a quantized one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from fewbits._events import emit
from fewbits.calibration.blocks import BlockCalibration
from fewbits.calibration.running import Forward, default_forward
from fewbits.calibration.watch import InputWatch
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.digests import value_digest
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.saving import save
from fewbits.checkpoint.serializer import Serializer
from fewbits.conversion.data_effects import DataEffects
from fewbits.conversion.encoder import TensorEncoder, naming
from fewbits.conversion.job import Job, measurements, warn_of_missing_data
from fewbits.errors import ArgumentError, CalibrationError, CheckpointError, NumericsError, SourceError, StateError
from fewbits.formats.fp8 import tell_unscaled
from fewbits.nn.eligibility import rounds_inputs
from fewbits.nn.walk import parent_of, slots
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import Measurement, measure
from fewbits.numerics.params import check_params
from fewbits.numerics.spec import INPUT_SPEC, QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import LiveSource, Target
from fewbits.sources.module import ModuleSource
from fewbits.validation.checks import Known, check_reload, examine
from fewbits.validation.evaluation import Evaluation, checked_model
from fewbits.validation.layers import LayerErrors
from fewbits.validation.outputs import ModelReport
from fewbits.validation.report import Report

_WAY_BACK = (
    "fewbits.dequantize(model) gives a float copy that can be quantized again; weights that were converted stay rounded"
)


class LiveJob(Job):
    """The conversion of a model or a state dict.

    In place, a second `convert` continues where a failed one stopped, unless the rounding needs data.
    """

    source: LiveSource
    _ledger: Ledger

    def __init__(
        self, source: LiveSource, ledger: Ledger, observer: Observer, activation_observer: Observer, rounding: Rounding
    ) -> None:
        self._target: Target | None = None
        self._tuned: Mapping[str, int] = {}
        super().__init__(source, ledger, observer, activation_observer, rounding)
        self.compares = source.inplace
        if not isinstance(source, ModuleSource):
            self.refuse_calibration()
        self._watch = InputWatch(_watched(source, ledger, self.data_observers, self.input_observers))
        self._blocks = _block_calibration(source, ledger, rounding)
        self._inputs: Sequence[RowInputs] = ()
        self._done: set[str] = set()
        self._measured: dict[str, Measurement] = {}
        self._digests: dict[str, str] = {}
        self._effects = DataEffects(rounding)
        self._model: ModelReport | None = None
        self._outputs: dict[str, float] = {}
        self._beyond_limits: tuple[str, ...] = ()

    @property
    def ledger(self) -> Ledger:
        """The fate of each tensor. It follows the result, which `fewbits.tune` may change at any time."""
        tuned = {} if self._target is None else self._target.tuned()
        if tuned != self._tuned:
            self._tuned, self._ledger = tuned, self._ledger.with_tuned(tuned)
            for name in tuned:  # measured before it was tuned
                self._measured.pop(name, None)
                self._digests.pop(name, None)
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def convert(
        self, encoder: TensorEncoder, serializer: Serializer, output: Output | None, comparing: bool, progress: Progress
    ) -> object:
        """Convert every tensor that an earlier call has not converted in place."""
        if output is not None:
            raise ArgumentError("output= goes with a path; a result in memory is returned, and written by save(path)")
        if self._blocks is not None:
            if self._done and self.source.inplace:
                raise CalibrationError(
                    f"the model is quantized in part, and cannot show float inputs again; {_WAY_BACK}"
                )
            self._blocks.check_data(self.rounding)
        if unseen := self._watch.unseen():
            raise CalibrationError(
                f"no data for {', '.join(unseen)}, whose observers need some; call observe(batches) with inputs that "
                "reach these layers, or exclude them"
            )
        if not self.source.inplace:
            self._target, self._done, self._measured = None, set(), {}
        self._effects = DataEffects(self.rounding)
        with self._watch.detached():
            target = self._target = self._target or self.source.target(self.ledger)
            for row in followed("convert", self.ledger.stored, progress, self._in_order()):
                if row.name not in self._done:
                    self._convert_row(row, target, encoder, comparing)
            tell_unscaled(self.ledger)
            return target.finish()

    def watching(self, forward: Forward | None, spill: Path | None) -> Forward | None:
        """Return a forward that also shows each batch to the calibration."""
        if self._blocks is None:
            return forward
        self._blocks.spill = spill
        alone = self._watch.is_empty
        # Observers see each batch once.
        return self._blocks.watching(forward or default_forward, self._watch.paused, alone=alone)

    def _in_order(self) -> Iterator[LedgerRow]:
        """Yield all stored rows; set the inputs that each is to be converted with."""
        rows = {row.name: row for row in self.ledger.stored}
        notes = {}
        for group in self._blocks.groups() if self._blocks is not None else ():
            for name, self._inputs in group.items():
                notes[name] = self._remark(rows[name])
                yield rows.pop(name)
        self._inputs = ()
        yield from rows.values()
        self.ledger = self.ledger.with_remarks(notes)
        self._effects.notes += warn_of_missing_data(self.rounding, notes, self.source.infos)
        self._effects.warn()

    def _remark(self, row: LedgerRow) -> str:
        return "" if row.layout is None else self.rounding.remark(row.layout.rows, self._inputs)

    def _convert_row(self, row: LedgerRow, target: Target, encoder: TensorEncoder, comparing: bool) -> None:
        tensor = self.source.read(row.name)
        if (tuple(tensor.shape), tensor.dtype) != (row.shape, row.dtype):
            raise SourceError(
                f"{row.name} was {dtype_name(row.dtype)} of shape {row.shape} when it was prepared, now it is "
                f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}; prepare it again"
            )
        value: Value = tensor
        if row.spec is not None:
            with naming(row):
                own = self.observers.get(row.name)
                value = encoder.encode(row, tensor, own, self._inputs)
                if self._blocks is not None and isinstance(value, QuantizedTensor):
                    self._blocks.replace(row.name, value.dequantize())
                if isinstance(row.spec, QuantSpec) and row.spec.activations and isinstance(value, QuantizedTensor):
                    observer = self.input_observers.get(row.name)
                    scale = None if observer is None else static_scale(observer).to(tensor.device)
                    value = attrs.evolve(value, spec=row.spec.for_dtype(row.dtype), input_scale=scale)
                if own is not None and isinstance(value, QuantizedTensor):
                    self._effects.add(row.name, tensor, value, self._inputs, own)
        if comparing and row.spec is not None:
            self._measured[row.name] = measure(tensor, value)
            if self.source.inplace:
                self._digests[row.name] = value_digest(value)
        target.put(row, value)
        self._done.add(row.name)

    def evaluate(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Run data through the float model and the quantized one."""
        self._model, self._outputs, self._beyond_limits = None, {}, ()
        if evaluation is None:
            return
        target, inplace = self._result(), self.source.inplace
        reference = checked_model(self.source.prepared(), inplace=inplace)
        model = checked_model(target.finish(), inplace=inplace)
        layers = LayerErrors(reference, self.ledger, target.value)
        self._model = evaluation.run(reference, model, watching=layers.watching, progress=progress)
        self._outputs = layers.sqnr_db()
        self._beyond_limits = tuple(self._model.failures(evaluation.limits))

    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check the result against the source and the ledger, and save and load it once."""
        ledger, target, inplace = self.ledger, self._result(), self.source.inplace

        def pairs(row: LedgerRow) -> Iterator[tuple[Value, Tensor | None]]:
            yield target.value(row.name), None if inplace else self.source.read(row.name)

        known = Known(outputs=self._output_sqnr_db())
        if inplace:
            changed = [name for name, digest in self._digests.items() if value_digest(target.value(name)) != digest]
            why = "it has changed since it was converted and measured"
            known = Known(self._measured, dict.fromkeys(changed, why), known.outputs)
        stored = (CODEC.encode(row.name, target.value(row.name)) for row in ledger.stored)
        bytes_after = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
        report = examine(ledger, pairs, bytes_after, known=known, fail_under=fail_under, progress=progress)
        report = check_reload(report, ledger, target.value, serializer)
        self._measured |= measurements(report)
        general, about = (*report.general, *self._beyond_limits), (*report.about, *self._effects.notes)
        self.report = attrs.evolve(report, observed=self.observed, model=self._model, general=general, about=about)
        return self.report

    def _output_sqnr_db(self) -> dict[str, float]:
        """The output SQNR of weights: as validation has measured it, or else as calibration has."""
        return self._effects.output_sqnr_db(self.ledger, self._result().value) | self._outputs

    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result, with every measurement."""
        if self.source.unstorable:
            raise CheckpointError(f"{path} is not written, it would be incomplete: {'; '.join(self.source.unstorable)}")
        about = Metadata(
            self.ledger,
            self.source.architecture,
            extra=self.source.extra,
            output_sqnr_db=self._output_sqnr_db(),
            model_metrics={} if self._model is None else self._model.to_dict(),
        )
        save(serializer, path, about, self._result().value, measured=self._measured, max_shard_size=max_shard_size)

    def drop(self) -> None:
        """Take the hooks off the prepared model; warn if the model stays quantized in part."""
        self._watch.remove()
        stored = [row.name for row in self.ledger.stored if row.spec is not None]
        left = [name for name in stored if name not in self._done]
        if self.source.inplace and 0 < len(left) < len(stored):
            emit("warning", "quantized_in_part", tensors=len(stored), left=len(left), first=left[0], advice=_WAY_BACK)

    def _result(self) -> Target:
        if self._target is None:
            raise StateError("there is no result; call convert() first")
        return self._target


def _block_calibration(source: LiveSource, ledger: Ledger, rounding: Rounding) -> BlockCalibration | None:
    """Watch all quantized weights of a model, if the rounding needs data."""
    if rounding.needs == "nothing" or not isinstance(source, ModuleSource):
        return None  # `refuse_calibration` has refused other sources
    layouts = {row.name: row.layout for row in ledger.stored if isinstance(row.spec, QuantSpec) and row.layout}
    return BlockCalibration(source.prepared(), layouts, rounding.needs)


def _watched(
    source: LiveSource, ledger: Ledger, data_observers: Mapping[str, Observer], static: Mapping[str, Observer]
) -> list[tuple[str, nn.Module, Observer]]:
    """List (name of a weight, module that uses it, observer of the module's inputs).

    An observer of a tied weight watches any one of its modules. Observers of rounded inputs watch every module that
    rounds its inputs, each under its own name.
    """
    if not isinstance(source, ModuleSource):
        return []
    holder = {row.name: row.holder for row in ledger}
    watched = []
    # A module at two paths is watched once.
    for slot in {slot.key: slot for slot in slots(source.prepared())}.values():
        name = holder[slot.name]
        if name in data_observers:
            watched.append((name, slot.module, data_observers[name]))
        if name in static and rounds_inputs(slot.module, slot.local, parent_of(source.prepared(), slot)):
            watched.append((slot.name, slot.module, static[name]))
    return watched


def static_scale(observer: Observer) -> Tensor:
    """Ask an observer for the scale of a layer's int8 inputs.

    Raises:
        NumericsError: if the scale is negative, zero or not finite.
        CalibrationError: if the observer has seen nothing but zeros or nothing at all, or does not look at inputs.
    """
    scale = check_params(observer.input_params(INPUT_SPEC), INPUT_SPEC, (1, 1)).scale
    if float(scale) < 0:
        raise NumericsError(f"{type(observer).__name__} chose {float(scale)} as a scale of inputs; it must be positive")
    if float(scale) <= torch.finfo(torch.float32).tiny:
        raise CalibrationError(
            f"{type(observer).__name__} has seen only zeros, or numbers close to zero; observe other inputs, or "
            "override the activations of this layer with None"
        )
    return scale
