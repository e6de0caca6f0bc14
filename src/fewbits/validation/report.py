"""`Report`: the findings of a validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs

from fewbits._sizes import bytes_in_words
from fewbits._table import elide_first, render_table, wrap
from fewbits.calibration import Observed
from fewbits.numerics.metrics import Measurement, pooled_sqnr_db
from fewbits.selection.ledger import Fate

Verdict = Literal["good", "fair", "warning", "critical"]

#: Decibels below which a tensor is critical (and fails), a warning, only fair.
CRITICAL_DB, WARNING_DB, FAIR_DB = 10.0, 20.0, 30.0

#: Advice for an SQNR that is a warning.
LOSE_LESS = 'int8, smaller groups, or observer="mse" lose less'


def verdict_of(sqnr_db: float, fail_under: float = CRITICAL_DB) -> Verdict:
    """The verdict on an SQNR: below `fail_under` critical, below 20 dB warning, up to 30 fair, above good.

    >>> [verdict_of(db) for db in (9.9, 17.9, 25.0, 40.1)]
    ['critical', 'warning', 'fair', 'good']
    """
    if math.isnan(sqnr_db) or sqnr_db < fail_under:
        return "critical"
    if sqnr_db < WARNING_DB:
        return "warning"
    return "fair" if sqnr_db <= FAIR_DB else "good"


@attrs.frozen
class TensorReport:
    """The findings for one tensor.

    Attributes:
        name: its name in the source.
        fate: quantized, cast or kept.
        scheme: its spec in words.
        measurement: how it compares with the source; None if that was not compared.
        verdict: on its SQNR; None without a measurement.
        failures: one sentence for each failure.
        notes: one sentence for each remark that is not a failure.
    """

    name: str
    fate: Fate
    scheme: str
    measurement: Measurement | None
    verdict: Verdict | None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; an infinite SQNR is null with ``"exact": true``."""
        found: dict[str, Any] = {
            "name": self.name, "fate": self.fate, "scheme": self.scheme, "verdict": self.verdict,
            "failures": list(self.failures), "notes": list(self.notes),
        }  # fmt: skip
        if (m := self.measurement) is not None:
            found |= {
                "exact": m.noise == 0,
                "sqnr_db": _finite(m.sqnr_db),
                "max_abs_error": _finite(m.max_abs_error),
                "cosine": _finite(m.cosine),
                "worst_bound_ratio": _finite(m.worst_bound_ratio),
                "elements": m.elements,
                "clipped": m.clipped,
                "codes": None if m.code_min is None else [m.code_min, m.code_max],
                "scales": None if m.scale_min is None else [_finite(m.scale_min), _finite(m.scale_max)],
            }
        return found


@attrs.frozen(repr=False)
class Report:
    """The findings of a validation: every tensor, every check, and whether the result is correct.

    Attributes:
        tensors: one entry for each stored tensor.
        checks: the names of the checks.
        unchecked: checks that were not possible, each with the reason.
        general: failures of the result as a whole.
        about: remarks on the result as a whole.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the result's tensors, counted from the tensors.
        observed: how much data `observe` ran before the weights were converted; None if none.
    """

    tensors: tuple[TensorReport, ...]
    checks: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    unchecked: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    observed: Observed | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed. Warnings do not count."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """Every failure, with the name of its tensor."""
        return [*self.general, *(f"{t.name}: {failure}" for t in self.tensors for failure in t.failures)]

    @property
    def warnings(self) -> list[str]:
        """A line for every tensor whose SQNR is a warning, the least SQNR first."""
        return [f"{name}: SQNR {sqnr_db:.2f} dB in {scheme}" for sqnr_db, name, scheme in self._low()]

    @property
    def notes(self) -> list[str]:
        """Remarks on the result, then on tensors; each names the first tensor that it is about."""
        names: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for note in tensor.notes:
                names.setdefault(note, []).append(tensor.name)
        return [*self.about, *(f"{note} ({_counted(found)})" for note, found in names.items())]

    @property
    def sqnr_db(self) -> float | None:
        """SQNR pooled over all quantized and cast tensors; None if none was measured."""
        measured = [measurement for _, measurement in self._measured()]
        return pooled_sqnr_db(measured) if measured else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {
            "ok": self.ok,
            "failures": self.failures,
            "warnings": self.warnings,
            "notes": self.notes,
            "checks": list(self.checks),
            "unchecked": list(self.unchecked),
            "sqnr_db": None if self.sqnr_db is None else _finite(self.sqnr_db),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "observed": None if self.observed is None else self.observed.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def summary(self, width: int = 80) -> str:
        """The verdict in a few lines, with every failure; the warnings are counted.

        Args:
            width: of the longest line; longer text is wrapped. A failure is one line, however long it
                is, so that it can be searched for.
        """
        passed = "passed" if self.ok else "FAILED"
        lines = [
            f"{passed}: {len(self.tensors)} tensors, {bytes_in_words(self.bytes_before, self.bytes_after)}",
            *self._figures(),
            *([] if self.observed is None else [f"observed: {self.observed}"]),
            f"checked: {', '.join(self.checks)}",
            *(f"not checked: {reason}" for reason in self.unchecked),
            *(f"note: {note}" for note in self.notes),
            *self._warning(),
        ]
        failures = [f"failure: {failure}" for failure in self.failures]
        return "\n".join([*(part for line in lines for part in wrap(line, width, "  ")), *failures])

    def table(self, width: int | None = None) -> str:
        """A line for every tensor.

        Args:
            width: of the longest line; None means the whole table. Where that is wider, columns are left out, and
                names lose their middle.
        """
        whole = [("name", "fate", "scheme", "SQNR dB", "max error", "of bound", "cosine", "verdict", "failures")]
        short = [("name", "scheme", "SQNR dB", "cosine", "verdict")]
        for t in self.tensors:
            sqnr_db, error, ratio, cosine = _figures_of(t.measurement)
            verdict = t.verdict or ""
            whole.append((t.name, t.fate, t.scheme, sqnr_db, error, ratio, cosine, verdict, "; ".join(t.failures)))
            scheme = t.scheme.partition(",")[0] or t.fate
            short.append((t.name, scheme, sqnr_db, cosine, "failed" if t.failures else verdict))
        table = render_table(whole, right=(3, 4, 5, 6))
        if width is None or len(table.splitlines()[1]) <= width:
            return table
        return render_table(elide_first(short, width), right=(2, 3))

    def _measured(self) -> list[tuple[TensorReport, Measurement]]:
        return [(t, t.measurement) for t in self.tensors if t.measurement is not None]

    def _figures(self) -> Iterator[str]:
        """The errors of all tensors, in words."""
        measured = self._measured()
        if not measured or self.sqnr_db is None:
            return
        tensor, worst = min(measured, key=lambda pair: pair[1].sqnr_db)
        yield f"SQNR: {self.sqnr_db:.2f} dB over {len(measured)} tensors, least {worst.sqnr_db:.2f} dB ({tensor.name})"
        yield f"error bound: {_bound_in_words([m for _, m in measured])}"
        if clipped := sum(m.clipped for _, m in measured):
            yield f"clipped: {clipped:,} elements, by choice of the observer; their bound is wider"

    def _low(self) -> list[tuple[float, str, str]]:
        """SQNR, name and scheme of every tensor whose SQNR is a warning, the least SQNR first."""
        return sorted((m.sqnr_db, t.name, t.scheme) for t, m in self._measured() if t.verdict == "warning")

    def _warning(self) -> Iterator[str]:
        """One line, however many tensors it is about."""
        if low := self._low():
            sqnr_db, name, _ = low[0]
            yield (
                f"warning: {len(low)} of {len(self._measured())} tensors are below {WARNING_DB:g} dB, the least at "
                f"{sqnr_db:.2f} dB ({name}). {LOSE_LESS}. To list them: --tensors, or print(report) in Python"
            )

    def __repr__(self) -> str:
        return f"Report(ok={self.ok}, {len(self.failures)} failures, {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary()}"


def _bound_in_words(measured: Sequence[Measurement]) -> str:
    """Whether all errors are within their bounds, and how close the largest comes; never rounded up to the bound."""
    largest = max(m.worst_bound_ratio for m in measured)
    if broken := sum(m.broken_at is not None or not m.worst_bound_ratio <= 1 for m in measured):
        return f"exceeded in {broken} of {len(measured)} tensors; the largest error is {largest:.4g} times it"
    percent = math.floor(10_000 * largest) / 100
    return f"every element is within it; the largest error is {percent:g} % of it"


def _figures_of(m: Measurement | None) -> tuple[str, str, str, str]:
    if m is None:
        return "", "", "", ""
    return f"{m.sqnr_db:.2f}", f"{m.max_abs_error:.3g}", f"{m.worst_bound_ratio:.3f}", f"{m.cosine:.6f}"


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} the first"


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None
