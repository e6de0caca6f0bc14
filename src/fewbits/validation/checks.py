"""The checks of a result. All errors are measured by one function, `fewbits.numerics.metrics.measure`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import columns_of
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import save
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, CheckpointError
from fewbits.numerics.metrics import Measurement, Tally
from fewbits.numerics.params import are_sound
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, followed, no_progress
from fewbits.selection.row import LedgerRow
from fewbits.validation.report import Report
from fewbits.validation.tensors import CRITICAL_DB, TensorReport

#: Note on a tensor that another tool quantized.
NOT_NEAREST = "errors beyond half a step, as from clipping, error feedback or rounding in a narrower dtype"

#: Note on a kept tensor that tuning changed.
TUNED = "tuned, so it differs from the source"
_UNSOUND, _INVALID = "a scale is zero, NaN or Inf", "a code has no level"

#: Yields the chunks of a row, each with its source; None in place of a missing source.
Pairs = Callable[[LedgerRow], Iterator[tuple[Value, Tensor | None]]]


@attrs.frozen
class Known:
    """What is known of tensors before they are examined, by name.

    Attributes:
        measured: measurements taken earlier; these tensors are not measured again.
        failures: the failures of tensors that must not be read.
        outputs: the SQNR of the layer's output, in dB; see `TensorReport.output_sqnr_db`.
    """

    measured: Mapping[str, Measurement] = attrs.field(factory=dict)
    failures: Mapping[str, str] = attrs.field(factory=dict)
    outputs: Mapping[str, float] = attrs.field(factory=dict)


def examine(
    ledger: Ledger,
    pairs: Pairs,
    bytes_after: int,
    *,
    known: Known | None = None,
    uncompared: str = "no source to compare with",
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Compare every stored tensor with its source and with the ledger.

    Args:
        ledger: the ledger of the result.
        pairs: yields the chunks of each stored tensor with their source, if there is one.
        bytes_after: bytes of the result's tensors, counted from the tensors.
        known: what is known of tensors already.
        uncompared: why tensors without a source are not compared.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        ArgumentError: if `fail_under` is not a number of decibels.
    """
    check_fail_under(fail_under)
    known = known or Known()
    tensors = []
    for row in followed("validate", ledger.stored, progress):
        if row.name in known.failures:
            tensors.append(TensorReport(row.name, row.fate, row.scheme, failures=(known.failures[row.name],)))
        else:
            found = examine_tensor(row, pairs, known.measured.get(row.name))
            tensors.append(attrs.evolve(found, output_sqnr_db=known.outputs.get(row.name)).judged(fail_under))
    failures = []
    if bytes_after != ledger.bytes_after:
        failures.append(f"the ledger predicted {ledger.bytes_after:,} bytes, but the result has {bytes_after:,}")
    checked, unchecked = _coverage(tensors, uncompared)
    return Report(
        tensors=tuple(tensors),
        checks=("size", "scales", *checked),
        bytes_before=ledger.bytes_before,
        bytes_after=bytes_after,
        unchecked=unchecked,
        general=tuple(failures),
        ledger=ledger,
    )


def _coverage(tensors: list[TensorReport], why: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Text on the completed comparisons with the source, and text on the missing ones."""
    lossy = [t for t in tensors if t.fate != "kept"]
    blind = [t.name for t in lossy if t.measurement is None]
    if not blind:
        return ("SQNR", "error bound of every element", "constant rows"), ()
    if len(blind) == len(lossy):
        return (), (f"errors: {why}",)
    seen = "SQNR, error bound and constant rows of the others"
    return (seen,), (f"errors of {', '.join(blind)}: {why}",)


def check_fail_under(fail_under: object) -> None:
    """Refuse a limit that cannot be compared with an SQNR.

    Raises:
        ArgumentError: if it is not a number of decibels.
    """
    if not isinstance(fail_under, (int, float)) or math.isnan(fail_under):
        raise ArgumentError(f"fail_under must be a number of dB, not {fail_under!r}")


def examine_tensor(
    row: LedgerRow, pairs: Pairs, measurement: Measurement | None, *, bounded: bool = True
) -> TensorReport:
    """Compare one stored tensor with its source. The caller judges its SQNR.

    Args:
        row: the tensor's row in the ledger.
        pairs: yields the chunks of each stored tensor with their source, if there is one.
        measurement: a measurement taken earlier; None measures now, if there is a source.
        bounded: whether an error beyond its bound is a failure; otherwise it is a note.
    """
    if row.spec is None and row.tuned:
        return TensorReport(row.name, row.fate, row.scheme, notes=(TUNED,))
    if row.spec is None:
        kept = all(source is None or same_bits(source, value) for value, source in pairs(row))
        failures = [] if kept else ["kept, but not equal to the source"]
        return TensorReport(row.name, row.fate, row.scheme, failures=tuple(failures))
    failures, notes = list[str](), list[str]()
    if measurement is None:
        measurement, failures, notes = _measured(row, pairs)
    elif (
        measurement.scale_min is not None
        and measurement.scale_max is not None
        and not 0 < measurement.scale_min <= measurement.scale_max < math.inf
    ):
        failures.append(_UNSOUND)
    if measurement is not None:
        if measurement.broken_at is not None:
            (failures if bounded else notes).append(_broken(measurement) if bounded else NOT_NEAREST)
        failures += _patterns(measurement)
    return TensorReport(
        row.name, row.fate, row.scheme, measurement, failures=tuple(failures), notes=tuple(notes), spec=row.spec
    )


def _measured(row: LedgerRow, pairs: Pairs) -> tuple[Measurement | None, list[str], list[str]]:
    """Measure a tensor (None without a source), and list failures of its scales and codes, and notes.

    Without a source, equal codes are a note: only a comparison could tell whether they are right.
    """
    tally, codes, sound, valid = Tally(), set[int](), True, True
    for value, source in pairs(row):
        if source is not None:
            tally.add(source, value)
        elif isinstance(value, QuantizedTensor) and len(codes) < 2:
            codes.update(map(int, torch.aminmax(value.codes())))
        if isinstance(value, QuantizedTensor):
            sound &= are_sound(value.params().scale)
            valid &= value.has_valid_codes()
    failures, notes = [_UNSOUND] * (not sound) + [_INVALID] * (not valid), []
    if len(codes) == 1 and math.prod(row.shape) > 1:
        doubt = "only a comparison with the source can tell whether that is right"
        notes.append(f"all of its codes are {codes.pop()}; {doubt}")
    return tally.measurement(columns_of(row)) if tally.elements else None, failures, notes


def _broken(measurement: Measurement) -> str:
    row, column = measurement.broken_at or (0, 0)
    return (
        f"the error bound is broken, first at row {row}, column {column} "
        f"(up to {measurement.worst_bound_ratio:.4g} times the bound)"
    )


def _patterns(measurement: Measurement) -> list[str]:
    """Failures for patterns of codes that suggest lost or never written data."""
    if measurement.constant_rows and measurement.code_min == measurement.code_max:
        return [f"all of its codes are {measurement.code_min}, but rounding the source gives others"]
    if measurement.constant_rows:
        rows = f"{measurement.constant_rows:,} of its rows"
        return [f"one code throughout in {rows}, but rounding the source gives others"]
    return []


def check_reload(report: Report, ledger: Ledger, value_of: Callable[[str], Value], serializer: Serializer) -> Report:
    """Save to a temporary file, read it back, and compare the tensors bit for bit, one at a time.

    Returns:
        the report, extended by this check and its failures.
    """
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fewbits-") as folder:
        path = Path(folder) / "reload"
        try:
            save(serializer, path, Metadata(ledger), value_of, measured={})
            checkpoint = Checkpoint(path, serializer)
            for row in checkpoint.ledger.stored:
                if not same_bits(value_of(row.name), checkpoint.value(row.name)):
                    failures[row.name] = "differs after saving to a file and reading back"
        except CheckpointError as error:
            return attrs.evolve(report, general=(*report.general, f"reload: {error}"))
    tensors = [
        attrs.evolve(t, failures=(*t.failures, failures[t.name])) if t.name in failures else t for t in report.tensors
    ]
    return attrs.evolve(report, tensors=tuple(tensors), checks=(*report.checks, "reload, bit for bit"))
