"""`TensorReport`: the findings on one tensor, and the verdict on it."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs

from fewbits.numerics.metrics import Measurement
from fewbits.numerics.spec import QuantSpec, Spec
from fewbits.selection.row import Fate

Verdict = Literal["good", "fair", "warning", "critical"]

#: SQNR in decibels below which a tensor's verdict is critical (a failure), a warning, or fair.
CRITICAL_DB, WARNING_DB, FAIR_DB = 10.0, 20.0, 30.0


def verdict_of(sqnr_db: float, fail_under: float = CRITICAL_DB) -> Verdict:
    """Return the verdict on an SQNR: below `fail_under` critical, below 20 dB warning, up to 30 dB fair, above good.

    >>> [verdict_of(db) for db in (9.9, 17.9, 25.0, 40.1)]
    ['critical', 'warning', 'fair', 'good']
    """
    if math.isnan(sqnr_db) or sqnr_db < fail_under:
        return "critical"
    if sqnr_db < WARNING_DB:
        return "warning"
    return "fair" if sqnr_db <= FAIR_DB else "good"


def advice_on(spec: Spec | None) -> str:
    """Say what loses less than a spec whose SQNR is low."""
    if isinstance(spec, QuantSpec) and spec.rounding == "free":
        return "smaller groups or int8 lose less"
    if isinstance(spec, QuantSpec) and spec.bits <= 4:
        return 'rounding="gptq" with data, smaller groups, or int8 lose less'
    return 'int8 per channel, smaller groups, or observer="mse" lose less'


@attrs.frozen
class TensorReport:
    """The findings on one tensor.

    Attributes:
        name: the tensor's name in the source.
        fate: quantized, cast or kept.
        scheme: the spec as text.
        measurement: errors relative to the source; None if the tensor was not compared.
        verdict: the verdict on `output_sqnr_db` or, where that is not known, on the SQNR; None without either.
        failures: a sentence for each failure; empty if the tensor passed.
        notes: remarks that are not failures.
        output_sqnr_db: the SQNR of the layer's output, in dB, from the rounding of this weight alone: the power of
            ``W x`` over the power of ``(W - Q) x``, for inputs x that the layer has seen. None if it has seen none.
        spec: how the tensor is stored; None for a kept tensor.
    """

    name: str
    fate: Fate
    scheme: str
    measurement: Measurement | None = None
    verdict: Verdict | None = None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output_sqnr_db: float | None = None
    spec: Spec | None = None

    @property
    def deciding(self) -> tuple[float, str] | None:
        """The SQNR that decides the verdict, in dB, and its name; None if there is none."""
        if self.output_sqnr_db is not None:
            return self.output_sqnr_db, "output SQNR"
        return None if self.measurement is None else (self.measurement.sqnr_db, "SQNR")

    def judged(self, fail_under: float) -> TensorReport:
        """Return this report with its verdict, and with a failure if that is critical."""
        if self.deciding is None:
            return self
        sqnr_db, name = self.deciding
        verdict = verdict_of(sqnr_db, fail_under)
        low = (f"{name} {sqnr_db:.2f} dB is below {fail_under:g} dB",) if verdict == "critical" else ()
        return attrs.evolve(self, verdict=verdict, failures=(*self.failures, *low))

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-compatible values. An infinite SQNR is null, with ``"exact": true``."""
        found: dict[str, Any] = {
            "name": self.name, "fate": self.fate, "scheme": self.scheme, "verdict": self.verdict,
            "failures": list(self.failures), "notes": list(self.notes),
        }  # fmt: skip
        if (m := self.measurement) is not None:
            found |= {
                "exact": m.noise == 0,
                "sqnr_db": finite(m.sqnr_db),
                "max_abs_error": finite(m.max_abs_error),
                "cosine": finite(m.cosine),
                "worst_bound_ratio": finite(m.worst_bound_ratio),
                "elements": m.elements,
                "clipped": m.clipped,
                "codes": None if m.code_min is None else [m.code_min, m.code_max],
                "scales": None if m.scale_min is None else [finite(m.scale_min), finite(m.scale_max)],
            }
        if self.output_sqnr_db is not None:
            found |= {"output_sqnr_db": finite(self.output_sqnr_db)}
        return found


def finite(figure: float | None) -> float | None:
    """Return a figure for JSON: None in place of NaN and Inf."""
    return figure if figure is not None and math.isfinite(figure) else None
