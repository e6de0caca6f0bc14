"""The tensors of a report, and the groups of those with the same fate and reason, for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from fewbits._table import elide_all
from fewbits.checkpoint.metadata import Metrics
from fewbits.pages.content import Cell, Group, TensorLine, decibels, percent, percent_of_bound
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from fewbits.validation.tensors import TensorReport, verdict_of

#: The most characters of a name on a page.
_NAME_WIDTH = 160

#: Bars of SQNR end at this many decibels, unless a tensor has more.
_LEAST_SCALE_DB = 40.0

#: Fate, scheme and reason of a tensor.
Key = tuple[str, str, str]


@attrs.frozen
class Judged:
    """All facts about one tensor.

    Attributes:
        name: its name in the source.
        fate: quantized, cast, kept, alias or merged.
        scheme: the spec as text; "" without a spec.
        row: its row in the ledger; None for a tensor that could not be read.
        tensor: the findings on it; None for an alias or a merged scale.
        reason: why it has this fate, as a summary says it.
        sqnr_db: the SQNR of the weight, in dB; None if it is not known.
        bound_ratio: the largest ratio of an error to its bound; None if it is not known.
        recorded: whether these two figures were measured when the file was written, and not for this report.
    """

    name: str
    fate: str
    scheme: str
    row: LedgerRow | None
    tensor: TensorReport | None
    reason: str = ""
    sqnr_db: float | None = None
    bound_ratio: float | None = None
    recorded: bool = False

    def measured(self, recorded: Metrics | None) -> Judged:
        """Add the measured figures, or else the recorded ones, which do not count for a tensor that failed."""
        if self.tensor is not None and (found := self.tensor.measurement) is not None:
            return attrs.evolve(self, sqnr_db=found.sqnr_db, bound_ratio=found.worst_bound_ratio)
        if self.failures or recorded is None:
            return self
        sqnr_db = math.inf if recorded.max_abs_error == 0 else recorded.sqnr_db
        return attrs.evolve(self, sqnr_db=sqnr_db, bound_ratio=recorded.worst_bound_ratio, recorded=True)

    @property
    def output_sqnr_db(self) -> float | None:
        """The SQNR of the layer's output, in dB."""
        return None if self.tensor is None else self.tensor.output_sqnr_db

    @property
    def deciding(self) -> float | None:
        """The SQNR that decides the verdict, in dB."""
        return self.sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db

    @property
    def clipped(self) -> int:
        """The number of clipped elements; 0 if nothing was measured for this report."""
        measured = None if self.tensor is None else self.tensor.measurement
        return 0 if measured is None else measured.clipped

    @property
    def failures(self) -> Sequence[str]:
        """A sentence for each failure."""
        return () if self.tensor is None else self.tensor.failures

    @property
    def status(self) -> str:
        """Return "failed", the verdict, or "" for a tensor that is not judged."""
        if self.failures:
            return "failed"
        if self.tensor is not None and self.tensor.verdict is not None:
            return self.tensor.verdict
        return "" if self.deciding is None else verdict_of(self.deciding)

    @property
    def key(self) -> Key:
        """Fate, scheme and reason, which the tensors of a group share."""
        return self.fate, self.scheme, self.reason

    @property
    def nbytes(self) -> tuple[int, int]:
        """The bytes before and after."""
        return (0, 0) if self.row is None else (self.row.bytes_before, self.row.bytes_after)

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Sorts failures first, then rising quality, then tensors without a figure."""
        figure = math.nan if self.deciding is None else self.deciding
        return not self.failures, self.deciding is None, -math.inf if math.isnan(figure) else figure


def judged_tensors(
    ledger: Ledger | None, tensors: Sequence[TensorReport], recorded: Mapping[str, Metrics]
) -> Iterator[Judged]:
    """Yield the facts about all tensors, in the order of the ledger; tensors that the ledger lacks come last.

    Args:
        ledger: the ledger of the result; None in a report that was made by hand.
        tensors: the findings on single tensors.
        recorded: the figures that the file records, by the name of the tensor.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    reasons = {} if ledger is None else ledger.short_reasons
    for row in () if ledger is None else ledger:
        tensor = by_name.pop(row.name, None)
        scheme = row.scheme if tensor is None else tensor.scheme
        reason = reasons[row.name]
        yield Judged(row.name, row.fate, scheme, row, tensor, reason).measured(recorded.get(row.name))
    for tensor in by_name.values():
        yield Judged(tensor.name, tensor.fate, tensor.scheme, None, tensor).measured(None)


def groups_of(judged: Sequence[Judged]) -> dict[Key, Group]:
    """Group tensors by fate, scheme and reason, in the order of their first tensors."""
    members: dict[Key, list[Judged]] = {}
    for one in judged:
        members.setdefault(one.key, []).append(one)
    total = sum(one.nbytes[1] for one in judged)
    return {key: _group(number, key, several, total) for number, (key, several) in enumerate(members.items(), 1)}


def _group(number: int, key: Key, members: Sequence[Judged], total: int) -> Group:
    before, after = (sum(one.nbytes[side] for one in members) for side in (0, 1))
    return Group(number, *key, len(members), before, after, 100 * after / total if total else 0.0)


def lines_of(judged: Sequence[Judged], groups: Mapping[Key, Group]) -> Iterator[TensorLine]:
    """Yield the lines of the table of all tensors: failed ones, then by rising quality."""
    names = dict(zip((one.name for one in judged), shortened([one.name for one in judged]), strict=True))
    weights, outputs = (_scale([getattr(o, of) for o in judged]) for of in ("sqnr_db", "output_sqnr_db"))
    largest = max((max(one.nbytes) for one in judged), default=0)
    for one in sorted(judged, key=lambda one: one.order):
        before, after = (Cell(f"{count:,}", percent(count, largest)) for count in one.nbytes)
        yield TensorLine(
            name=names[one.name],
            shape="" if one.row is None else "×".join(map(str, one.row.shape)) or "scalar",
            fate=one.fate,
            scheme=_with(one.row, names) or one.scheme.partition(",")[0],
            sqnr=_bar(one.sqnr_db, weights),
            output=_bar(one.output_sqnr_db, outputs),
            bound=percent_of_bound(one.bound_ratio),
            before=before,
            after=after,
            status=one.status,
            group=groups[one.key].number,
        )


def shortened(names: Sequence[str]) -> list[str]:
    """Shorten very long names in their middle."""
    if max(map(len, names), default=0) <= _NAME_WIDTH:
        return list(names)
    return elide_all(names, _NAME_WIDTH)


def _with(row: LedgerRow | None, names: Mapping[str, str]) -> str:
    """Name the tensor that holds the values of an alias, or uses up a merged scale."""
    other = None if row is None else row.alias_of or row.merged_into
    return "" if other is None else f"with {names[other]}"


def _scale(figures: Sequence[float | None]) -> float:
    """Return the SQNR at which bars end."""
    return max([_LEAST_SCALE_DB, *(f for f in figures if f is not None and math.isfinite(f))])


def _bar(figure: float | None, scale: float) -> Cell:
    if figure is None or math.isnan(figure):
        return Cell(decibels(figure))
    return Cell(decibels(figure), percent(max(figure, 0.0), scale) if math.isfinite(figure) else 100 * (figure > 0))
