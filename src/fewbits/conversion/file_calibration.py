"""`FileCalibration`: quantizes the weights of a checkpoint beside a model that holds them, and tunes and compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from fewbits.calibration.blocks import BlockCalibration, Part
from fewbits.calibration.running import Forward, default_forward
from fewbits.checkpoint.codec import Value
from fewbits.conversion.data_effects import DataEffects
from fewbits.conversion.encoder import TensorEncoder, naming
from fewbits.conversion.file_evaluation import FileEvaluation
from fewbits.conversion.job import warn_of_missing_data
from fewbits.conversion.kept_parts import KeptPart, KeptParts
from fewbits.conversion.planned_tuning import PlannedTuning
from fewbits.conversion.recipe import described, fingerprint
from fewbits.conversion.staging import INCOMPARABLE
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, WeightSteps
from fewbits.selection.row import LedgerRow
from fewbits.sources.file import FileSource
from fewbits.sources.matching import matched_parameters


class FileCalibration:
    """Quantizes the weights of a checkpoint with statistics of their inputs, from a model with the same weights.

    The results can then be tuned and compared with the model, before they are written.

    Args:
        model: the model; it is not changed.
        source: the checkpoint.
        ledger: the fate of each tensor of the checkpoint.
        observers: the observer of each quantized tensor, by name.
        rounding: picks the codes.

    Attributes:
        values: the quantized tensors, by name; empty until `run`.
        remarks: remarks on them for the ledger, by name.
        tuned: the names of the tensors whose scales were tuned.
        outputs: the SQNR of layers' outputs, in dB, by the names of the weights, as far as it is known: measured by the
            evaluation, or else by the calibration, before tuning.
        model_metrics: how the outputs of the model compare with those of the float model; empty if it was not run.
        notes: notes for the report.

    Raises:
        ArgumentError: if two tensors of one parameter are cut into rows differently.
        MismatchError: naming the quantized tensors that are not exactly one parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: FileSource,
        ledger: Ledger,
        observers: Mapping[str, Observer],
        rounding: Rounding,
    ) -> None:
        self.model, self._source, self._observers, self._rounding = model, source, observers, rounding
        rows = [row for row in ledger.stored if isinstance(row.spec, QuantSpec)]
        names = matched_parameters(model, [row.name for row in rows], source.read)
        self._rows: dict[str, list[LedgerRow]] = {}
        for row in rows:
            self._rows.setdefault(names[row.name], []).append(row)
        layouts = {name: _layout(rows) for name, rows in self._rows.items()}
        self._blocks = BlockCalibration(model, layouts, rounding.needs)
        self._data: list[str] = []
        self._tuning: PlannedTuning | None = None
        self._evaluation: FileEvaluation | None = None
        self.values: dict[str, Value] = {}
        self.remarks: dict[str, str] = {}
        self.tuned: list[str] = []
        self.outputs: dict[str, float] = {}
        self.model_metrics: Mapping[str, float | None] = {}
        self.notes: list[str] = []

    def plan(self, tuning: PlannedTuning | None, evaluation: FileEvaluation | None) -> None:
        """Plan work on the results before they are written.

        Args:
            tuning: how to tune the scales; None leaves them unchanged.
            evaluation: how to compare the result with the model; None does not compare.

        Raises:
            ArgumentError: if `tuning` asks for more than scales.
        """
        if tuning is not None:
            tuning.check_for_file()
        self._tuning, self._evaluation = tuning, evaluation

    def watching(self, forward: Forward | None, spill: Path | None) -> Forward:
        """Return a forward that observes each batch.

        Args:
            forward: runs one batch; None means `default_forward`.
            spill: a folder for temporary files with the activations; None keeps the activations in memory.

        Raises:
            ArgumentError: if the data would change nothing.
        """
        observe = forward or default_forward
        if self._rounding.needs != "nothing":
            self._blocks.spill = spill
            observe = self._blocks.watching(observe, nullcontext, alone=True)
        elif self._tuning is None:
            raise ArgumentError(
                f"{self._rounding!r} looks at no data; leave out the data, or choose rounding='qronos', or tune="
            )
        described_forward = described(forward)

        def noted(model: nn.Module, batch: Any) -> None:
            observe(model, batch)
            known = [described_forward, described(batch)]
            self._data.append(INCOMPARABLE if INCOMPARABLE in json.dumps(known) else fingerprint(known))

        return noted

    def encoder(self, plain: TensorEncoder) -> CalibratedEncoder:
        """Return an encoder that gives the results of this calibration.

        Args:
            plain: the encoder that the calibration quantizes with.
        """
        inputs = {"calibration data": self._data, "tuning": None if self._tuning is None else self._tuning.inputs()}
        if self._evaluation is not None:
            inputs["evaluation"] = self._evaluation.inputs()
        return CalibratedEncoder(
            plain.scheme, plain.recipe, plain.rounding, inputs=inputs, calibration=self, plain=plain
        )

    def check_data(self) -> None:
        """Refuse to go on without data that the rounding needs, with a CalibrationError."""
        if self._rounding.needs != "nothing":
            self._blocks.check_data(self._rounding)

    def run(self, encoder: TensorEncoder, kept: KeptParts, progress: Progress) -> None:
        """Quantize the weights, block by block.

        Args:
            encoder: makes the codes.
            kept: holds the parts that an earlier run has finished, and takes new ones.
            progress: called before and after each weight.
        """
        self.values, self.remarks, self.tuned, self.outputs = {}, {}, [], {}
        effects = DataEffects(self._rounding)
        steps = WeightSteps(progress, [row for rows in self._rows.values() for row in rows])
        for at, part in enumerate(self._blocks.parts()):
            rows = [row for name in part.weights for row in self._rows[name]]
            found = kept.read(at, rows)
            if found is None:
                self._quantize(part, encoder, steps, effects)
                self.outputs |= effects.recorded
                if rows:
                    own = Ledger(rows).with_remarks(self.remarks)
                    kept.write(at, own.rows, self.values, self.outputs)
            else:
                self._take_over(found, rows, effects)
                for name in part.weights:
                    self._replace(name)
                steps.skip(rows)
        effects.notes += warn_of_missing_data(self._rounding, self.remarks, self._source.infos)
        effects.warn()
        self.notes = effects.notes
        if self._tuning is not None:
            self._tune(self._tuning, progress)
        if self._evaluation is not None:
            self.outputs |= self._evaluation.run_early(self.values, progress)
            self.model_metrics = self._evaluation.metrics

    def remarked(self, ledger: Ledger) -> Ledger:
        """Return a ledger of some tensors, with remarks, and with tuned tensors marked."""
        return ledger.with_remarks(self.remarks).with_tuned([name for name in self.tuned if name in ledger])

    def _tune(self, tuning: PlannedTuning, progress: Progress) -> None:
        values = {name: self.values[rows[0].name] for name, rows in self._rows.items()}
        quantized = {name: value for name, value in values.items() if isinstance(value, QuantizedTensor)}
        for name, value in tuning.tuned_values(quantized, progress).items():
            for row in self._rows[name]:
                self.values[row.name] = attrs.evolve(value, dtype=row.dtype)
                self.tuned.append(row.name)

    def _take_over(self, part: KeptPart, rows: Sequence[LedgerRow], effects: DataEffects) -> None:
        """Take over a part that an earlier run has finished."""
        self.values |= part.values
        self.remarks |= part.remarks
        self.outputs |= part.outputs
        for row in rows:
            value = part.values[row.name]
            if not part.remarks[row.name] and isinstance(value, QuantizedTensor):
                weight = WeightMatrix(self._source.read(row.name), value.layout)
                effects.compare(weight, value, self._observers[row.name])

    def _quantize(self, part: Part, encoder: TensorEncoder, steps: WeightSteps, effects: DataEffects) -> None:
        for group in part.groups:
            for name, inputs in group.items():
                for row in self._rows[name]:
                    steps.before(row)
                    tensor, observer = self._source.read(row.name), self._observers[row.name]
                    with naming(row):
                        value = self.values[row.name] = encoder.encode(row, tensor, observer, inputs)
                        if isinstance(value, QuantizedTensor):
                            effects.add(row.name, tensor, value, inputs, observer)
                    self.remarks[row.name] = self._rounding.remark(_layout([row]).rows, inputs)
                    steps.after(row)
                self._replace(name)

    def _replace(self, name: str) -> None:
        value = self.values[self._rows[name][0].name]
        if isinstance(value, QuantizedTensor):
            self._blocks.replace(name, value.dequantize())


@attrs.frozen(eq=False)
class CalibratedEncoder(TensorEncoder):
    """Gives the results of a calibration for quantized tensors.

    Attributes:
        calibration: has the results, after `begin`.
        plain: encodes all other tensors.
    """

    calibration: FileCalibration = attrs.field(kw_only=True)
    plain: TensorEncoder = attrs.field(kw_only=True)

    @property
    def by_rows(self) -> bool:
        """False: the results are whole weights."""
        return False

    def begin(self, folder: Path, progress: Progress) -> None:
        """Run the calibration. An unfinished one continues after its last finished part."""
        self.calibration.run(self.plain, KeptParts(folder), progress)

    def remarked(self, ledger: Ledger) -> Ledger:
        """Add remarks from the calibration, and mark tuned tensors."""
        return self.calibration.remarked(ledger)

    def output_sqnr_db(self, ledger: Ledger) -> Mapping[str, float]:
        """Return what the calibration knows of the outputs of layers."""
        return {name: figure for name, figure in self.calibration.outputs.items() if name in ledger}

    @property
    def model_metrics(self) -> Mapping[str, float | None]:
        """What the comparison of the model's outputs has found."""
        return self.calibration.model_metrics

    def encode(
        self, row: LedgerRow, tensor: Tensor, observer: Observer | None, inputs: Sequence[RowInputs] = ()
    ) -> Value:
        """Return the result for a quantized tensor.

        Raises:
            CalibrationError: if there is none, because this process has not run the calibration.
        """
        if not isinstance(row.spec, QuantSpec):
            return self.plain.encode(row, tensor, observer)
        if row.name not in self.calibration.values:
            raise CalibrationError("a calibration runs in one process; call convert(), without distributed=True")
        return self.calibration.values[row.name]


def _layout(rows: Sequence[LedgerRow]) -> Layout:
    """Return the layout of all tensors of one parameter."""
    first = rows[0].layout
    if first is None or any(row.layout != first for row in rows):
        names = ", ".join(row.name for row in rows)
        raise ArgumentError(f"{names} are one parameter of the model, and must have the same input_axes")
    return first
