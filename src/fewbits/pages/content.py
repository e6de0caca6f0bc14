"""The content of a page about a quantized checkpoint, as values. All figures are texts already, or percentages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from fewbits.pages.charts import CurveChart, Histogram

_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


@attrs.frozen
class Fact:
    """A label, a text, and a remark."""

    label: str
    text: str
    remark: str = ""


@attrs.frozen
class Cell:
    """A figure in a table, with the length of its bar in percent; None draws no bar."""

    text: str
    percent: int | None = None


@attrs.frozen
class Group:
    """The tensors that share a fate, a scheme and a reason.

    Attributes:
        number: its number on the page, from 1.
        fate: quantized, cast, kept, alias or merged.
        scheme: the spec as text; "" without a spec.
        reason: why the tensors have this fate.
        tensors: how many they are.
        before: their bytes in the source.
        after: their bytes in the result.
        share: their share of the result's bytes, in percent.
    """

    number: int
    fate: str
    scheme: str
    reason: str
    tensors: int
    before: int
    after: int
    share: float


@attrs.frozen
class TensorLine:
    """One tensor in the table of all tensors.

    Attributes:
        name: its name in the source.
        shape: its shape as text.
        fate: as in `Group`.
        scheme: the spec as text; for an alias or a merged scale, the tensor that it goes with.
        sqnr: the SQNR of the weight, in dB.
        output: the SQNR of the layer's output, in dB.
        bound: the largest ratio of an error to its bound, in percent.
        before: bytes in the source.
        after: bytes in the result.
        status: "failed", a verdict, or "" for a tensor that is not judged.
        group: the number of its `Group`.
    """

    name: str
    shape: str
    fate: str
    scheme: str
    sqnr: Cell
    output: Cell
    bound: str
    before: Cell
    after: Cell
    status: str
    group: int


@attrs.frozen
class Spread:
    """The histograms of one tensor.

    Attributes:
        name: the name of the tensor.
        about: the figure that put it among the worst.
        weights: of its decoded weights.
        errors: of the decoded weights minus the original ones; None without a source.
    """

    name: str
    about: str
    weights: Histogram
    errors: Histogram | None


@attrs.frozen
class KernelLine:
    """Which kernel computed a layer."""

    layer: str
    layout: str
    rows: int
    dtype: str
    kernel: str


@attrs.frozen
class Page:
    """The content of a page.

    Attributes:
        title: the name of the checkpoint.
        ok: whether it passed.
        failures: a sentence for each failure.
        facts: the main figures.
        notes: remarks on the result, and its warnings.
        checks: the names of the checks that ran.
        unchecked: checks that could not run, with the reason.
        shares: the fates, with their shares of the source's bytes in the result, in percent.
        groups: the fates and reasons.
        legend: the meaning of the verdicts.
        tensors: all tensors, failed ones first, then by rising quality.
        spreads: histograms of the worst tensors.
        curve: size against quality; None if it is not known.
        bounds: sentences on the error bounds.
        kernels: which kernels computed the layers; empty if no model has run.
        refusals: why preferred kernels did not compute.
        origin: versions, files and digests.
        absent: sentences on the parts that this page does not have, and how to get them.
    """

    title: str
    ok: bool
    failures: Sequence[str]
    facts: Sequence[Fact]
    notes: Sequence[str]
    checks: Sequence[str]
    unchecked: Sequence[str]
    shares: Sequence[tuple[str, float]]
    groups: Sequence[Group]
    legend: str
    tensors: Sequence[TensorLine]
    spreads: Sequence[Spread]
    curve: CurveChart | None
    bounds: Sequence[str]
    kernels: Sequence[KernelLine]
    refusals: Sequence[str]
    origin: Sequence[Fact]
    absent: Sequence[str]

    @property
    def fates(self) -> list[str]:
        """The fates on the page, each once, in the order of the groups."""
        return list(dict.fromkeys(group.fate for group in self.groups))

    @property
    def statuses(self) -> list[str]:
        """The statuses of tensors on the page, each once, the worst first."""
        found = {line.status for line in self.tensors}
        return [status for status in ("failed", "critical", "warning", "fair", "good") if status in found]

    @property
    def has_outputs(self) -> bool:
        """Whether the SQNR of some layer's output is known."""
        return any(line.output.text for line in self.tensors)


def decibels(figure: float | None) -> str:
    """Return an SQNR as text, without its unit; "" for None.

    >>> decibels(17.8912), decibels(float("inf")), decibels(None)
    ('17.89', 'exact', '')
    """
    if figure is None:
        return ""
    return "exact" if figure == math.inf else f"{figure:.2f}"


def percent_of_bound(ratio: float | None) -> str:
    """Return the ratio of an error to its bound as text. It is rounded down, so that 100 % means all of the bound.

    >>> percent_of_bound(0.99999), percent_of_bound(1.5), percent_of_bound(None)
    ('99.99 %', '150.00 %', '')
    """
    if ratio is None:
        return ""
    return f"{math.floor(10_000 * ratio) / 100:.2f} %" if math.isfinite(ratio) else "not finite"


def percent(part: float, whole: float) -> int:
    """Return a share for the length of a bar: a whole number from 0 to 100.

    >>> percent(1, 3), percent(5, 4), percent(1, 0)
    (33, 100, 0)
    """
    return round(100 * min(max(part / whole, 0), 1)) if whole else 0


def size_in_words(count: int) -> str:
    """Return a number of bytes with three digits.

    >>> size_in_words(53_518_928), size_in_words(999), size_in_words(1_000), size_in_words(123_456_789)
    ('53.5 MB', '999 B', '1.00 kB', '123 MB')
    """
    name, size = next((unit for unit in _UNITS if count >= unit[1]), ("B", 1))
    value = count / size
    return f"{value:.{0 if size == 1 or value >= 100 else 1 if value >= 10 else 2}f} {name}"
