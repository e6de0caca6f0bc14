"""`Ledger`: one row for every parameter and buffer of the source. Nothing is left out, and the bytes add up."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs

from fewbits._sizes import bytes_in_words
from fewbits._table import render_fitting, render_table, wrap, wrap_last
from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_name
from fewbits.selection.row import Fate, LedgerRow

#: The reason for keeping a tensor that the scheme skips by default ends with these words.
UNLESS_ASKED = "unless asked for"

_KEPT_EMBEDDING = f"(?i)embedding.* {UNLESS_ASKED}"

#: A summary advises to quantize embeddings if kept ones take more than this share of the result's bytes.
_LARGE_SHARE = 0.25

#: The reason of a tensor that an override names begins with this word.
_OVERRIDE = "override "

#: The reasons of these fates in a summary; the rows' own reasons name single tensors.
_IN_SUMMARY = {"alias": "shares storage", "merged": "scales of dequantized weights"}


def _rows(rows: Iterable[LedgerRow]) -> tuple[LedgerRow, ...]:
    return tuple(rows)


@attrs.frozen(slots=False, repr=False)
class Ledger:
    """All rows, in the order of a model, or sorted by name for a state dict or file. Prints as a table or JSON."""

    rows: tuple[LedgerRow, ...] = attrs.field(converter=_rows)

    def __attrs_post_init__(self) -> None:
        """Refuse rows that contradict one another.

        Raises:
            ArgumentError: if two rows have the same name, an alias does not refer to a row that holds an equal tensor,
                or a row is merged into a tensor that is not dequantized.
        """
        holders = {row.name: (row.shape, row.dtype) for row in self.stored}
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ArgumentError("two rows of the ledger have the same name")
        for row in self.rows:
            if row.alias_of is not None and holders.get(row.alias_of) != (row.shape, row.dtype):
                raise ArgumentError(f"{row.name} is an alias of {row.alias_of!r}, which holds no such tensor")
        dequantized = {row.name for row in self.rows if row.dequantized_from is not None}
        for row in self.rows:
            if row.merged_into is not None and (row.merged_into not in dequantized or row.name in dequantized):
                raise ArgumentError(f"{row.name} is merged into {row.merged_into!r}, which is not dequantized")

    @cached_property
    def _by_name(self) -> dict[str, LedgerRow]:
        return {row.name: row for row in self.rows}

    @property
    def stored(self) -> list[LedgerRow]:
        """The rows that hold a tensor: all except aliases and merged scales."""
        return [row for row in self.rows if row.fate not in ("alias", "merged")]

    @property
    def present(self) -> list[LedgerRow]:
        """The rows whose names the result has: all except merged scales."""
        return [row for row in self.rows if row.fate != "merged"]

    def with_remarks(self, remarks: Mapping[str, str]) -> Ledger:
        """Return a ledger with remarks added to the reasons of some rows, by name; an empty remark adds nothing."""
        added = {name: f"; {remark}" for name, remark in remarks.items() if remark}
        return Ledger(attrs.evolve(row, reason=row.reason + added.get(row.name, "")) for row in self.rows)

    def with_tuned(self, names: Collection[str]) -> Ledger:
        """Return a ledger in which these tensors are tuned. The codes of a tuned weight count as free.

        Args:
            names: names of stored tensors, or of their aliases; other names have no effect.
        """
        holders = {self[name].holder for name in names if name in self}
        return Ledger(row.as_tuned() if row.name in holders and not row.tuned else row for row in self.rows)

    def names_by_holder(self) -> dict[str, list[str]]:
        """Map the name of each row that holds a tensor to all names of that tensor."""
        names: dict[str, list[str]] = {}
        for row in self.present:
            names.setdefault(row.holder, []).append(row.name)
        return names

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        """Tell whether the source has a tensor of that name."""
        return name in self._by_name

    def __getitem__(self, name: str) -> LedgerRow:
        """Return the row of the tensor of that name.

        Raises:
            ArgumentError: if the source has no such tensor.
        """
        if name not in self._by_name:
            raise ArgumentError(f"the ledger has no tensor named {name!r}")
        return self._by_name[name]

    @property
    def bytes_before(self) -> int:
        """The bytes of the source's tensors; shared storage counts once."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """The bytes of the result's tensors, which are the bytes of the file without its header."""
        return sum(row.bytes_after for row in self.rows)

    def count(self, fate: Fate) -> int:
        """Return the number of tensors with this fate."""
        return sum(row.fate == fate for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the ledger as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent)

    def summary(self, width: int = 80) -> str:
        """Summarize in a few lines: the number of tensors and their bytes for each fate and reason.

        Args:
            width: the largest line length; longer reasons are wrapped.
        """
        groups: dict[str, list[LedgerRow]] = {}
        for row in self.rows:
            fate = f"{row.fate} to {row.scheme}" if row.scheme else row.fate
            groups.setdefault(f"{fate}: {self.short_reasons[row.name]}", []).append(row)
        table = [("tensors", "bytes before", "bytes after", "fate and reason")]
        for fate, rows in groups.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            table.append((f"{len(rows)}", f"{before:,}", f"{after:,}", fate))
        lines = [self._counts(), bytes_in_words(self.bytes_before, self.bytes_after), *self.advice()]
        wrapped = [part for line in lines for part in wrap(line, width, "  ")]
        return "\n".join([render_table(wrap_last(table, width), right=(0, 1, 2)), *wrapped])

    @cached_property
    def short_reasons(self) -> Mapping[str, str]:
        """The reasons by name, without names of other tensors; several patterns of one fate and scheme are counted."""
        patterns: dict[tuple[str, str, str], dict[str, None]] = {}
        for row in self.rows:
            if row.reason.startswith(_OVERRIDE):
                pattern, _, more = row.reason.partition("; ")
                patterns.setdefault((row.fate, row.scheme, more), {})[pattern] = None
        short = {}
        for row in self.rows:
            _, sign, more = row.reason.partition("; ")
            count = len(patterns.get((row.fate, row.scheme, more), ())) if row.reason.startswith(_OVERRIDE) else 0
            counted = f"{count} overrides{sign}{more}"
            short[row.name] = counted if count > 1 else _IN_SUMMARY.get(row.fate, row.reason)
        return short

    def table(self, width: int | None = None) -> str:
        """Return a table with one line per tensor.

        Args:
            width: the largest line length; a wider table is shown with fewer columns and shortened names. None shows
                the whole table.
        """
        whole = [("name", "shape", "dtype", "fate", "scheme", "before", "after", "reason")]
        short = [("name", "shape", "after", "fate")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            before, after = f"{row.bytes_before:,}", f"{row.bytes_after:,}"
            whole.append((row.name, shape, dtype_name(row.dtype), row.fate, row.scheme, before, after, row.reason))
            short.append((row.name, shape, after, row.scheme.partition(",")[0] or row.fate))
        return render_fitting(whole, short, width, right=("before", "after"))

    def _counts(self) -> str:
        fates = Counter(row.fate for row in self.rows)
        return f"{len(self.rows)} tensors: " + ", ".join(f"{number} {fate}" for fate, number in fates.items())

    def advice(self) -> Iterator[str]:
        """Yield advice to quantize embeddings, if those that the scheme keeps by default take much of the result."""
        embeddings = [row for row in self.rows if row.fate == "kept" and re.search(_KEPT_EMBEDDING, row.reason)]
        kept = sum(row.bytes_after for row in embeddings)
        if kept > _LARGE_SHARE * self.bytes_after:
            yield (
                f"note: {100 * kept / self.bytes_after:.0f} % of these bytes are embeddings, which the scheme keeps by "
                "default; int8 may be smaller. To quantize them too: --embeddings int8, or embeddings='int8' in Python"
            )

    def __repr__(self) -> str:
        return f"Ledger({self._counts()}; {bytes_in_words(self.bytes_before, self.bytes_after)})"

    def __str__(self) -> str:
        return f"{self.table()}\n{self._counts()}; {bytes_in_words(self.bytes_before, self.bytes_after)}"
