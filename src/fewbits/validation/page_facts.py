"""The main figures of a report, in words, for a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fewbits._sizes import bytes_in_words
from fewbits.pages.content import Fact, Group, decibels, percent_of_bound, size_in_words
from fewbits.validation.outputs import METRICS
from fewbits.validation.page_tensors import Judged, shortened
from fewbits.validation.tensors import CRITICAL_DB, FAIR_DB, WARNING_DB

if TYPE_CHECKING:
    from fewbits.validation.report import Report

LEGEND = (
    f"A verdict goes by the SQNR of the output, or else of the weight: below {CRITICAL_DB:g} dB critical, below "
    f"{WARNING_DB:g} dB a warning, up to {FAIR_DB:g} dB fair, above good."
)
_RECORDED = "as measured when the file was written"


def facts_of(report: Report, judged: Sequence[Judged], groups: Sequence[Group]) -> Iterator[Fact]:
    """Yield the main figures: sizes, numbers of tensors, SQNR and errors."""
    sizes = bytes_in_words(report.bytes_before, report.bytes_after)
    yield Fact("Size of all tensors", size_in_words(report.bytes_after), sizes)
    fates = Counter[str]()
    for group in groups:
        fates[group.fate] += group.tensors
    yield Fact("Tensors", f"{len(judged):,}", ", ".join(f"{count:,} {fate}" for fate, count in fates.items()))
    yield from _sqnr(report, judged)
    yield from _outputs(judged)
    yield from _largest_error(judged)


def _sqnr(report: Report, judged: Sequence[Judged]) -> Iterator[Fact]:
    """The SQNR of all weights; without their source, the least one."""
    known = [(one.sqnr_db, one) for one in judged if one.sqnr_db is not None]
    if not known:
        return
    figure, worst = _least(known)
    least = f"{decibels(figure)} dB"
    if report.sqnr_db is None:
        yield Fact("Least SQNR of a weight", least, f"{_name(worst)}; {_RECORDED}")
    else:
        remark = f"over {len(known):,} tensors; least {least} ({_name(worst)})"
        yield Fact("SQNR of the weights", f"{decibels(report.sqnr_db)} dB", remark)


def _outputs(judged: Sequence[Judged]) -> Iterator[Fact]:
    known = [(one.output_sqnr_db, one) for one in judged if one.output_sqnr_db is not None]
    if known:
        figure, worst = _least(known)
        yield Fact("Least SQNR of an output", f"{decibels(figure)} dB", f"{_name(worst)}; of {len(known):,} layers")


def _least(known: Sequence[tuple[float, Judged]]) -> tuple[float, Judged]:
    """Return the least SQNR, with NaN counted as less than any number, and its tensor."""
    return min(known, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])


def _largest_error(judged: Sequence[Judged]) -> Iterator[Fact]:
    known = _bounded(judged)
    if known:
        ratio, worst = known[-1]
        yield Fact("Largest error", percent_of_bound(ratio), f"of its proved bound, in {_name(worst)}")


def model_facts(figures: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield the figures of the whole model, from the values of `ModelReport.to_dict`."""
    over = f"over {figures.get('positions', 0):,} positions in {figures.get('batches', 0):,} batches"
    for name, metric in METRICS.items():
        if (figure := figures.get(name)) is None:
            continue
        worst, own = figures.get(f"worst_{name}"), figures.get(f"float_{name}")
        remarks = [
            *([] if own is None else [f"float model {metric.unit.format(own)}"]),
            *([] if worst is None else [f"worst batch {metric.unit.format(worst)}"]),
            over,
        ]
        yield Fact(f"Model: {metric.title}", metric.unit.format(figure), "; ".join(remarks))


def warning_of(judged: Sequence[Judged], advice: str) -> Iterator[str]:
    """Yield at most one sentence, which counts the tensors with a low SQNR."""
    low = [one for one in judged if one.status == "warning"]
    if low:
        worst = min(low, key=lambda one: one.order)
        count = f"{len(low):,} of {sum(one.status != '' for one in judged):,} judged tensors"
        least = f"the least at {decibels(worst.deciding)} dB ({_name(worst)})"
        yield f"{count} are below {WARNING_DB:g} dB, {least}.{f' {advice}.' if advice else ''}"


def shares_of(groups: Sequence[Group], bytes_before: int) -> list[tuple[str, float]]:
    """Return the fates whose tensors take bytes, with their share of the source's bytes, in percent."""
    taken = Counter[str]()
    for group in groups:
        taken[group.fate] += group.after
    return [(fate, 100 * count / max(bytes_before, taken.total())) for fate, count in taken.items() if count]


def bounds_of(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield sentences on how the errors compare with the bounds of their schemes."""
    known = _bounded(judged)
    if not known:
        return
    beyond = [one for ratio, one in known if not ratio <= 1]
    ratio, worst = known[-1]
    how = f", {_RECORDED}" if worst.recorded else ""
    if beyond:
        yield f"{len(beyond):,} of {len(known):,} tensors have an error beyond the bound of their scheme{how}."
    else:
        yield f"Every element of {len(known):,} tensors is within the error bound of its scheme{how}."
    yield f"The largest error is {percent_of_bound(ratio)} of its bound ({_name(worst)})."
    clipped = sum(one.clipped for one in judged)
    if clipped:
        yield f"{clipped:,} elements are clipped, by choice of the observer or the rounding; their bound is wider."


def _bounded(judged: Sequence[Judged]) -> list[tuple[float, Judged]]:
    """Return the ratios of the largest errors to their bounds, by rising ratio."""
    known = [(math.inf if math.isnan(o.bound_ratio) else o.bound_ratio, o) for o in judged if o.bound_ratio is not None]
    return sorted(known, key=lambda pair: pair[0])


def _name(one: Judged) -> str:
    return shortened([one.name])[0]
