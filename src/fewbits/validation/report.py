"""`Report`: what validation found, as a value."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import attrs

from fewbits._table import render_table
from fewbits.calibration import Observed
from fewbits.numerics.metrics import Measurement, pooled_sqnr_db
from fewbits.selection.ledger import Fate

Verdict = Literal["good", "fair", "warning", "critical"]

#: Decibels below which a tensor is critical (and fails), a warning, only fair.
CRITICAL_DB, WARNING_DB, FAIR_DB = 10.0, 20.0, 30.0

_SHOWN_WARNINGS = 5


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
    """What was found about one tensor.

    Attributes:
        name: its name in the source.
        fate: quantized, cast or kept.
        scheme: its spec in words.
        measurement: how it compares with the source; None if that was not compared.
        verdict: on its SQNR; None without a measurement.
        failures: what is wrong, in words; empty if nothing is.
        notes: what else there is to know, in words; nothing that fails it.
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
    """What validation found: every tensor, every check, and whether the result is what was promised.

    Attributes:
        tensors: one entry for each stored tensor.
        checks: what was checked, in words.
        unchecked: what could not be checked, and why.
        general: what is wrong with the result as a whole, in words.
        about: what else there is to know of the result as a whole, in words.
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
        """A line for every tensor whose SQNR is a warning."""
        return [f"{t.name}: SQNR {t.measurement.sqnr_db:.2f} dB in {t.scheme}" for t in self.tensors
                if t.verdict == "warning" and t.measurement is not None]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What else there is to know: of the result, and, each with the first tensor it is about, of tensors."""
        names: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for note in tensor.notes:
                names.setdefault(note, []).append(tensor.name)
        return [*self.about, *(f"{note} ({_counted(found)})" for note, found in names.items())]

    @property
    def sqnr_db(self) -> float | None:
        """SQNR pooled over all quantized and cast tensors; None if none was measured."""
        measured = [t.measurement for t in self.tensors if t.measurement is not None]
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

    def summary(self) -> str:
        """The verdict in a few lines, with every failure; of the warnings, the first few."""
        ratio = f" ({self.bytes_before / self.bytes_after:.2f}x smaller)" if self.bytes_after else ""
        lines = [
            f"{'passed' if self.ok else 'FAILED'}: {len(self.tensors)} tensors, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes{ratio}"
        ]
        measured = [(t.name, t.measurement) for t in self.tensors if t.measurement is not None]
        if measured and self.sqnr_db is not None:
            name, worst = min(measured, key=lambda pair: pair[1].sqnr_db)
            tightest = max(m.worst_bound_ratio for _, m in measured)
            lines.append(
                f"SQNR: {self.sqnr_db:.2f} dB over {len(measured)} tensors, least {worst.sqnr_db:.2f} dB ({name})"
            )
            lines.append(f"error bound: the largest error of any element is {tightest:.4f} of its bound")
            if clipped := sum(m.clipped for _, m in measured):
                lines.append(f"clipped: {clipped:,} elements, by choice of the observer; their bound is wider")
        if self.observed is not None:
            lines.append(f"observed: {self.observed}")
        lines.append(f"checked: {', '.join(self.checks)}")
        lines += [f"not checked: {reason}" for reason in self.unchecked]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"failure: {failure}" for failure in self.failures]
        lines += [f"warning: {warning}" for warning in self.warnings[:_SHOWN_WARNINGS]]
        if len(self.warnings) > _SHOWN_WARNINGS:
            more = len(self.warnings) - _SHOWN_WARNINGS
            lines.append(
                f"and {more} warnings more: str(report), its JSON, and fewbits verify --against IN --tensors have all"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Report(ok={self.ok}, {len(self.failures)} failures, {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        table = [("name", "fate", "scheme", "SQNR dB", "max error", "of bound", "cosine", "verdict", "failures")]
        for t in self.tensors:
            figures = ("", "", "", "")
            if (m := t.measurement) is not None:
                figures = (
                    f"{m.sqnr_db:.2f}",
                    f"{m.max_abs_error:.3g}",
                    f"{m.worst_bound_ratio:.3f}",
                    f"{m.cosine:.6f}",
                )
            table.append((t.name, t.fate, t.scheme, *figures, t.verdict or "", "; ".join(t.failures)))
        return render_table(table, right=(3, 4, 5, 6)) + "\n" + self.summary()


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} the first"


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None
