"""`Report`: the findings of a validation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from fewbits._sizes import bytes_in_words
from fewbits._table import render_fitting, wrap
from fewbits.calibration.batches import Observed
from fewbits.nn.explain import Explanation
from fewbits.numerics.metrics import Measurement, pooled_sqnr_db
from fewbits.pages.curve import Curve
from fewbits.pages.rendering import HtmlPage, check_page_path, load_template, render
from fewbits.selection.ledger import Ledger
from fewbits.sources.open import open_source
from fewbits.validation.outputs import ModelReport
from fewbits.validation.page import PageInputs, page_of
from fewbits.validation.tensors import WARNING_DB, TensorReport, advice_on, finite


@attrs.frozen(repr=False)
class Report:
    """The findings of a validation: every tensor, every check, and whether the result passed.

    Attributes:
        tensors: one entry for each stored tensor.
        checks: the names of the checks that ran.
        unchecked: checks that could not run, with the reason.
        general: failures of the result as a whole.
        about: notes on the result as a whole.
        bytes_before: bytes of the source's tensors.
        bytes_after: bytes of the result's tensors, counted from the tensors.
        observed: the amount of data that `observe` ran before the weights were converted; None if it ran none.
        model: how the outputs of the quantized model compare with those of the float model; None unless `validate` got
            data.
        ledger: the fate of every tensor, for `show` and `save_html`; None in a report that was made by hand.
    """

    tensors: tuple[TensorReport, ...]
    checks: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    unchecked: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    observed: Observed | None = None
    model: ModelReport | None = None
    ledger: Ledger | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no failures. Warnings do not count."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """All failures: of the result as a whole, then of tensors, each with the tensor's name."""
        return [*self.general, *(f"{t.name}: {failure}" for t in self.tensors for failure in t.failures)]

    @property
    def warnings(self) -> list[str]:
        """A line for every tensor with the verdict "warning", the lowest SQNR first."""
        return [f"{t.name}: {name} {sqnr_db:.2f} dB in {t.scheme}" for sqnr_db, name, t in self._low()]

    @property
    def advice(self) -> str:
        """What loses less for the tensor with the lowest SQNR; "" if there are no warnings."""
        low = self._low()
        return advice_on(low[0][2].spec) if low else ""

    @property
    def notes(self) -> list[str]:
        """All notes: on the result as a whole, then on tensors, each distinct note once with its first tensor."""
        names: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for note in tensor.notes:
                names.setdefault(note, []).append(tensor.name)
        return [*self.about, *(f"{note} ({_counted(found)})" for note, found in names.items())]

    @property
    def sqnr_db(self) -> float | None:
        """SQNR pooled over all measured tensors; None if no tensor was measured."""
        measured = [measurement for _, measurement in self._measured()]
        return pooled_sqnr_db(measured) if measured else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values."""
        return {
            "ok": self.ok,
            "failures": self.failures,
            "warnings": self.warnings,
            "notes": self.notes,
            "checks": list(self.checks),
            "unchecked": list(self.unchecked),
            "sqnr_db": None if self.sqnr_db is None else finite(self.sqnr_db),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "observed": None if self.observed is None else self.observed.to_dict(),
            "model": None if self.model is None else self.model.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the report as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def show(
        self,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        against: object = None,
        entry: str | None = None,
        curve: str | os.PathLike[str] | None = None,
        kernels: Explanation | None = None,
    ) -> HtmlPage:
        """Return the report as a page for browsers. A notebook shows it, if it is the last value of a cell.

        Args:
            checkpoint: the path of the checkpoint that this report is about. The page then has histograms of its worst
                weights, versions, digests, and the figures that the file records.
            against: the source of the checkpoint, for histograms of errors: a model, a state dict or a path.
            entry: the entry of `against`, as in `fewbits.quantize`.
            curve: the path of a JSON file with sizes and errors, as ``fewbits allocate`` writes it; docs/report.md has
                its form.
            kernels: the result of `fewbits.explain` for the quantized model.

        Raises:
            ArgumentError: if Jinja2 is not installed, `against` is no source, or the report is about another
                checkpoint.
            CheckpointError: if a file cannot be read.
        """
        load_template()  # a missing package is told before the files are read
        source = None if against is None else open_source(against, entry=entry)
        drawn = None if curve is None else Curve.read(curve)
        return render(page_of(self, PageInputs(checkpoint, source, drawn, kernels)))

    def save_html(self, path: str | os.PathLike[str], *, replace: bool = False, **parts: Any) -> None:
        """Write the page of `show` to one file, which refers to no other file.

        Args:
            path: the file; its name ends in .html or .htm.
            replace: whether to replace an existing file.
            parts: the arguments of `show`.

        Raises:
            ArgumentError: if the file exists or its name has another ending; or as `show`.
            CheckpointError: if a file cannot be read, or the page cannot be written.
        """
        check_page_path(path, replace=replace)
        self.show(**parts).save(path, replace=replace)

    def summary(self, width: int = 80, *, advise: bool = True) -> str:
        """Return the verdict in a few lines, with every failure and the number of warnings.

        Args:
            width: maximum line width; longer lines wrap. A failure is always one line, so that it can be searched for.
            advise: whether a warning says what loses less.
        """
        passed = "passed" if self.ok else "FAILED"
        lines = [
            f"{passed}: {len(self.tensors)} tensors, {bytes_in_words(self.bytes_before, self.bytes_after)}",
            *([] if self.model is None else self.model.lines()),
            *self._figures(),
            *([] if self.observed is None else [f"observed: {self.observed}"]),
            f"checked: {', '.join(self.checks)}",
            *(f"not checked: {reason}" for reason in self.unchecked),
            *(f"note: {note}" for note in self.notes),
            *self._warning(advise),
        ]
        failures = [f"failure: {failure}" for failure in self.failures]
        return "\n".join([*(part for line in lines for part in wrap(line, width, "  ")), *failures])

    def table(self, width: int | None = None) -> str:
        """Return a table with a line for every tensor.

        Args:
            width: maximum line width; None means no limit. A table that is too wide loses columns, and the middle of
                long names.
        """
        outputs = any(t.output_sqnr_db is not None for t in self.tensors)
        output = ("output dB",) if outputs else ()
        whole = [
            ("name", "fate", "scheme", "SQNR dB", *output, "max error", "of bound", "cosine", "verdict", "failures")
        ]
        short = [("name", "scheme", "SQNR dB", *(output or ("cosine",)), "verdict")]
        for t in self.tensors:
            sqnr_db, error, ratio, cosine = _figures_of(t.measurement)
            verdict = t.verdict or ""
            own = ("" if t.output_sqnr_db is None else f"{t.output_sqnr_db:.2f}",) if outputs else ()
            figures = (sqnr_db, *own, error, ratio, cosine)
            whole.append((t.name, t.fate, t.scheme, *figures, verdict, "; ".join(t.failures)))
            scheme = t.scheme.partition(",")[0] or t.fate
            short.append((t.name, scheme, sqnr_db, *(own or (cosine,)), "failed" if t.failures else verdict))
        return render_fitting(whole, short, width, right=("SQNR dB", *output, "max error", "of bound", "cosine"))

    def _measured(self) -> list[tuple[TensorReport, Measurement]]:
        return [(t, t.measurement) for t in self.tensors if t.measurement is not None]

    def _figures(self) -> Iterator[str]:
        """Lines that summarize the errors of all tensors."""
        if outputs := [(t.output_sqnr_db, t.name) for t in self.tensors if t.output_sqnr_db is not None]:
            sqnr_db, name = min(outputs)
            yield f"output SQNR of {len(outputs)} weights on data: least {sqnr_db:.2f} dB ({name})"
        measured = self._measured()
        if not measured or self.sqnr_db is None:
            return
        tensor, worst = min(measured, key=lambda pair: pair[1].sqnr_db)
        yield f"SQNR: {self.sqnr_db:.2f} dB over {len(measured)} tensors, least {worst.sqnr_db:.2f} dB ({tensor.name})"
        yield f"error bound: {_bound_in_words([m for _, m in measured])}"
        if clipped := sum(m.clipped for _, m in measured):
            yield f"clipped: {clipped:,} elements, by choice of the observer or the rounding; their bound is wider"

    def _low(self) -> list[tuple[float, str, TensorReport]]:
        """The deciding SQNR, its name, and every tensor with the verdict "warning", the lowest SQNR first."""
        low = [(*t.deciding, t) for t in self.tensors if t.verdict == "warning" and t.deciding is not None]
        return sorted(low, key=lambda found: (found[0], found[2].name))

    def _warning(self, advise: bool) -> Iterator[str]:
        """At most one line, which counts the tensors with the verdict "warning"."""
        if low := self._low():
            sqnr_db, _, least = low[0]
            judged = sum(t.verdict is not None for t in self.tensors)
            advice = f" {self.advice}." if advise else ""
            yield (
                f"warning: {len(low)} of {judged} tensors are below {WARNING_DB:g} dB, the least at {sqnr_db:.2f} dB "
                f"({least.name}).{advice} To list them: --tensors, or print(report) in Python"
            )

    def __repr__(self) -> str:
        return f"Report(ok={self.ok}, {len(self.failures)} failures, {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary()}"


def _bound_in_words(measured: Sequence[Measurement]) -> str:
    """Whether all errors are within their bounds, and how close the largest is. The percentage is rounded down."""
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
