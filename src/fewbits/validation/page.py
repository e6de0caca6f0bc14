"""Turn a report into the content of a page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import ArgumentError, FormatError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.registry import open_quantized
from fewbits.nn.explain import Explanation
from fewbits.numerics.dtypes import dtype_name
from fewbits.pages.content import Fact, KernelLine, Page
from fewbits.pages.curve import Curve
from fewbits.sources.base import Source
from fewbits.validation.page_facts import LEGEND, bounds_of, facts_of, model_facts, shares_of, warning_of
from fewbits.validation.page_tensors import groups_of, judged_tensors, lines_of
from fewbits.validation.spreads import spreads_of

if TYPE_CHECKING:
    from fewbits.validation.report import Report

_NO_KERNELS = (
    "Kernels: they depend on the machine, the model and its input. In Python, pass kernels=fewbits.explain(model, "
    "example_input)."
)
_NO_SOURCE = "Histograms of errors: they need the source. Pass --against SOURCE, or against= in Python."
_NO_CHECKPOINT = "Histograms, versions and digests: they are in the file. In Python, pass checkpoint= with its path."
_NO_CURVE = "Size against quality: pass the curve that fewbits allocate writes, --curve FILE, or curve= in Python."


@attrs.frozen
class PageInputs:
    """The parts of a page beyond its report; each may be missing.

    Attributes:
        checkpoint: the path of the checkpoint.
        source: the source that it was made from.
        curve: size against quality.
        kernels: which kernels compute the layers of the model.
    """

    checkpoint: str | os.PathLike[str] | None = None
    source: Source | None = None
    curve: Curve | None = None
    kernels: Explanation | None = None

    def opened(self, report: Report) -> Checkpoint | ForeignCheckpoint | None:
        """Open the checkpoint; None if there is none, or it cannot be read and the report says so.

        Raises:
            ArgumentError: if the report is about another checkpoint.
            FormatError: if it is no quantized checkpoint.
        """
        if self.checkpoint is None:
            return None
        try:
            opened = open_quantized(self.checkpoint)
        except FormatError:
            if report.ok:
                raise
            return None
        ledgers = (opened.ledger, *([] if report.ledger is None else [report.ledger]))
        if len({frozenset((row.name, row.shape) for row in ledger) for ledger in ledgers}) > 1:
            raise ArgumentError(f"{self.checkpoint} has other tensors than the checkpoint that this report is about")
        return opened


def page_of(report: Report, inputs: PageInputs) -> Page:
    """Collect the content of a page.

    Raises:
        ArgumentError: if the report is about another checkpoint.
        CheckpointError: if it cannot be read.
    """
    checkpoint = inputs.opened(report)
    metadata = checkpoint.metadata if isinstance(checkpoint, Checkpoint) else None
    judged = [*judged_tensors(report.ledger, report.tensors, {} if metadata is None else metadata.metrics)]
    groups = groups_of(judged)
    figures = report.model.to_dict() if report.model is not None else metadata.model_metrics if metadata else {}
    return Page(
        title="Quantized model" if inputs.checkpoint is None else Path(inputs.checkpoint).name or "Checkpoint",
        ok=report.ok,
        failures=report.failures,
        facts=[*facts_of(report, judged, [*groups.values()]), *model_facts(figures)],
        notes=[*warning_of(judged, report.advice), *report.notes, *_advice(report)],
        checks=report.checks,
        unchecked=report.unchecked,
        shares=shares_of([*groups.values()], report.bytes_before),
        groups=[*groups.values()],
        legend=LEGEND,
        tensors=[*lines_of(judged, groups)],
        spreads=[] if checkpoint is None else spreads_of(judged, checkpoint, inputs.source),
        curve=None if inputs.curve is None else inputs.curve.drawn(),
        bounds=[*bounds_of(judged)],
        kernels=[] if inputs.kernels is None else [*_kernels(inputs.kernels)],
        refusals=[] if inputs.kernels is None else inputs.kernels.notes(),
        origin=[*_origin(checkpoint)],
        absent=[*_absent(inputs)],
    )


def _advice(report: Report) -> Iterator[str]:
    """The advice of the ledger."""
    for advice in () if report.ledger is None else report.ledger.advice():
        yield advice.removeprefix("note: ")


def _kernels(kernels: Explanation) -> Iterator[KernelLine]:
    for row in kernels.rows:
        yield KernelLine(row.name, row.weight_layout, row.rows, dtype_name(row.dtype), row.kernel)


def _origin(checkpoint: Checkpoint | ForeignCheckpoint | None) -> Iterator[Fact]:
    """Versions, files and digests."""
    if isinstance(checkpoint, ForeignCheckpoint):
        yield Fact("Format", checkpoint.format)
    if not isinstance(checkpoint, Checkpoint):
        return
    metadata = checkpoint.metadata
    yield Fact("Written by", ", ".join(f"{name} {version}" for name, version in metadata.versions.items()))
    yield Fact("Architecture", metadata.architecture or "not known")
    for file, digest in checkpoint.headers.items():
        yield Fact(file, digest, "SHA-256 of the header, which has the digest of every tensor")


def _absent(inputs: PageInputs) -> Iterator[str]:
    """Yield a sentence for each part that is missing."""
    given = {_NO_SOURCE: inputs.source, _NO_CURVE: inputs.curve, _NO_KERNELS: inputs.kernels}
    if inputs.checkpoint is None:
        yield _NO_CHECKPOINT
        del given[_NO_SOURCE]
    yield from (sentence for sentence, part in given.items() if part is None)
