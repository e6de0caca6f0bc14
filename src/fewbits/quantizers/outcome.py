"""Before a validation: check its arguments. After it: emit events, and raise or warn of failures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fewbits._events import emit
from fewbits.calibration.running import Forward
from fewbits.errors import ArgumentError, ValidationError
from fewbits.validation.evaluation import Evaluation, checked_model
from fewbits.validation.report import Report

#: What to do if a validation fails.
OnFailure = Literal["error", "warn", "ignore"]


def evaluation_of(
    data: Iterable[Any] | None,
    forward: Forward | None,
    metrics: Sequence[str] | None,
    limits: Mapping[str, float] | None,
) -> Evaluation | None:
    """Make an evaluation from arguments; None without data.

    Raises:
        ArgumentError: if there are settings and no data.
    """
    if data is not None:
        return Evaluation(data, forward, metrics, limits or {})
    settings = {"forward": forward, "metrics": metrics, "limits": limits}
    if given := [name for name, value in settings.items() if value is not None]:
        raise ArgumentError(f"{' and '.join(given)} without data: pass the batches to compare outputs on")
    return None


def emit_report(report: Report, scheme: str) -> None:
    """Emit an event for every measured tensor, for low SQNR, and for every failure."""
    for t in report.tensors:
        if t.measurement is not None and t.verdict is not None:
            sqnr_db = round(t.measurement.sqnr_db, 2)
            level: Literal["info", "warning"] = "warning" if t.verdict == "critical" else "info"
            output = {} if t.output_sqnr_db is None else {"output_sqnr_db": round(t.output_sqnr_db, 2)}
            emit(level, "sqnr", tensor=t.name, scheme=t.scheme, sqnr_db=sqnr_db, **output, verdict=t.verdict)
    if report.model is not None:
        emit("info", "model_metrics", scheme=scheme, **report.model.to_dict())
    if found := report.warnings:
        emit("warning", "low_sqnr", scheme=scheme, tensors=len(found), least=found[0], advice=report.advice)
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


def planned_evaluation(
    float_model: object,
    evaluate: Iterable[Any] | None,
    forward: Forward | None,
    metrics: Sequence[str] | None,
    limits: Mapping[str, float] | None,
    *,
    validate: bool,
    inplace: bool,
) -> Evaluation | None:
    """Make the evaluation that follows a conversion; None without `evaluate`. Its first batch runs now.

    Raises:
        ArgumentError: for settings that the validation would refuse, or not use, after a long conversion.
        CalibrationError: if no outputs of the float model can be compared, or it cannot run the first batch.
    """
    settings = {"evaluate": evaluate, "metrics": metrics, "limits": limits}
    given = [f"{name}=" for name, value in settings.items() if value is not None]
    if given and not validate:
        raise ArgumentError(f"{' and '.join(given)} set up the validation, which validate=False turns off")
    if given and evaluate is None:
        raise ArgumentError(f"{' and '.join(given)} without evaluate=: pass the batches to compare outputs on")
    if evaluate is None:
        return None
    return Evaluation(evaluate, forward, metrics, limits or {}).tried(checked_model(float_model, inplace=inplace))
