"""Announce a validation: events, and an error or a warning if it failed."""

from __future__ import annotations

import warnings
from typing import Literal

from fewbits._events import emit
from fewbits.errors import ValidationError
from fewbits.validation.report import LOSE_LESS, Report

OnFailure = Literal["error", "warn", "ignore"]


def emit_report(report: Report, scheme: str) -> None:
    """Emit an event for every measured tensor, for low SQNR, and for every failure."""
    for t in report.tensors:
        if t.measurement is not None and t.verdict is not None:
            sqnr_db = round(t.measurement.sqnr_db, 2)
            level: Literal["info", "warning"] = "warning" if t.verdict == "critical" else "info"
            emit(level, "sqnr", tensor=t.name, scheme=t.scheme, sqnr_db=sqnr_db, verdict=t.verdict)
    if found := report.warnings:
        emit("warning", "low_sqnr", scheme=scheme, tensors=len(found), least=found[0], advice=LOSE_LESS)
    for failure in report.failures:
        emit("warning", "validation_failure", scheme=scheme, finding=failure)


def act_on_failure(report: Report, on_failure: OnFailure) -> None:
    """Raise an error or a warning if the validation failed and the caller asked for it."""
    if report.ok or on_failure == "ignore":
        return
    message = f"validation failed:\n{report.summary()}"
    if on_failure == "error":
        raise ValidationError(message, report)
    warnings.warn(message, stacklevel=3)
