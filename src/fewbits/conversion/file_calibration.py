"""`FileCalibration`: quantizes the weights of a checkpoint while data runs through a model that holds them."""

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
from fewbits.selection.progress import Progress, Step
from fewbits.selection.row import LedgerRow
from fewbits.sources.file import FileSource
from fewbits.sources.matching import matched_parameters


class FileCalibration:
    """Quantizes the weights of a checkpoint with statistics of their inputs, from a model with the same weights.

    Args:
        model: the model; it is not changed.
        source: the checkpoint.
        ledger: the fate of each tensor of the checkpoint.
        observers: the observer of each quantized tensor, by name.
        rounding: picks the codes.
        tuning: how to tune the scales after that; None leaves them as they are.

    Attributes:
        values: the quantized tensors, by name; empty until `run`.
        remarks: remarks on them for the ledger, by name.
        tuned: the names of the tensors whose scales were tuned.
        outputs: the SQNR of layers' outputs before tuning, in dB, by the names of the weights, as far as it is known.
        notes: notes for the report.

    Raises:
        ArgumentError: if `rounding` needs no data, `tuning` asks for more than scales, or two tensors of one parameter
            are cut into rows differently.
        MismatchError: naming the quantized tensors that are not exactly one parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: FileSource,
        ledger: Ledger,
        observers: Mapping[str, Observer],
        rounding: Rounding,
        tuning: PlannedTuning | None = None,
    ) -> None:
        if rounding.needs == "nothing":
            raise ArgumentError(f"{rounding!r} looks at no data; leave out the model, or choose rounding='qronos'")
        if tuning is not None:
            tuning.check_for_file()
        self.model, self._source, self._observers, self._rounding = model, source, observers, rounding
        rows = [row for row in ledger.stored if isinstance(row.spec, QuantSpec)]
        names = matched_parameters(model, [row.name for row in rows], source.read)
        self._rows: dict[str, list[LedgerRow]] = {}
        for row in rows:
            self._rows.setdefault(names[row.name], []).append(row)
        layouts = {name: _layout(rows) for name, rows in self._rows.items()}
        self._blocks = BlockCalibration(model, layouts, rounding.needs)
        self._data: list[str] = []
        self._tuning = tuning
        self.values: dict[str, Value] = {}
        self.remarks: dict[str, str] = {}
        self.tuned: list[str] = []
        self.outputs: dict[str, float] = {}
        self.notes: list[str] = []

    def watching(self, forward: Forward | None, spill: Path | None) -> Forward:
        """Return a forward that observes each batch.

        Args:
            forward: runs one batch; None means `default_forward`.
            spill: a folder for temporary files with the activations; None keeps the activations in memory.
        """
        self._blocks.spill = spill
        observe = self._blocks.watching(forward or default_forward, nullcontext, alone=True)
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
        return CalibratedEncoder(
            plain.scheme, plain.recipe, plain.rounding, inputs=inputs, calibration=self, plain=plain
        )

    def check_data(self) -> None:
        """Refuse to go on without data, with a CalibrationError."""
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
        steps = _Steps(progress, [row for rows in self._rows.values() for row in rows])
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

    def _quantize(self, part: Part, encoder: TensorEncoder, steps: _Steps, effects: DataEffects) -> None:
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


class _Steps:
    """Reports the progress of a calibration, in bytes of weights."""

    def __init__(self, progress: Progress, rows: Sequence[LedgerRow]) -> None:
        self._progress, self._done, self._total = progress, 0, sum(row.bytes_before for row in rows)

    def before(self, row: LedgerRow) -> None:
        self._progress(Step("calibrate", row.name, self._done, self._total))

    def after(self, row: LedgerRow) -> None:
        self._done += row.bytes_before
        self.before(row)

    def skip(self, rows: Sequence[LedgerRow]) -> None:
        self._done += sum(row.bytes_before for row in rows[:-1])
        for row in rows[-1:]:
            self.after(row)


def _layout(rows: Sequence[LedgerRow]) -> Layout:
    """Return the layout of all tensors of one parameter."""
    first = rows[0].layout
    if first is None or any(row.layout != first for row in rows):
        names = ", ".join(row.name for row in rows)
        raise ArgumentError(f"{names} are one parameter of the model, and must have the same input_axes")
    return first
