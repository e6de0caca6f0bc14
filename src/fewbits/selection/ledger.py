"""`Ledger`: one row for every parameter and buffer of the source. Nothing is left out, and the bytes add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_from_name, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import Spec, spec_from_dict

Fate = Literal["quantized", "cast", "kept", "alias"]


@attrs.frozen
class LedgerRow:
    """The fate of one tensor.

    Attributes:
        name: full dotted name.
        shape: its shape.
        dtype: its dtype before.
        fate: ``"quantized"``, ``"cast"``, ``"kept"``, or ``"alias"`` of another.
        reason: why.
        bytes_before: bytes in the source; 0 for an alias, which shares them.
        bytes_after: bytes in the result, as predicted from shapes and spec.
        scheme: the spec in words, "" if kept.
        spec: how its codes look; None unless quantized or cast.
        layout: how it is cut; None unless quantized.
        alias_of: the name whose storage it shares; None unless an alias.
        persistent: whether the source's state dict has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fate: Fate
    reason: str
    bytes_before: int
    bytes_after: int
    spec: Spec | None = None
    layout: Layout | None = None
    alias_of: str | None = None
    persistent: bool = True

    @property
    def scheme(self) -> str:
        return "" if self.spec is None else str(self.spec)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `from_dict` reads it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "fate": self.fate,
            "scheme": self.scheme,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "spec": None if self.spec is None else self.spec.to_dict(),
            "layout": None if self.layout is None else self.layout.to_dict(),
            "alias_of": self.alias_of,
            "persistent": self.persistent,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LedgerRow:
        """Read back what `to_dict` wrote."""
        fields = {name: value for name, value in fields.items() if name != "scheme"}
        fields["shape"] = tuple(fields["shape"])
        fields["dtype"] = dtype_from_name(fields["dtype"])
        fields["spec"] = None if fields["spec"] is None else spec_from_dict(fields["spec"])
        fields["layout"] = None if fields["layout"] is None else Layout(**fields["layout"])
        return cls(**fields)


#: Goes through rows and may tell somebody how far it is: ``for row in progress("convert", rows)``.
Progress = Callable[[str, Sequence[LedgerRow]], Iterable[LedgerRow]]


def _rows(rows: Iterable[LedgerRow]) -> tuple[LedgerRow, ...]:
    return tuple(rows)


@attrs.frozen
class Ledger:
    """All rows, in the order of the source. Prints as a table, turns into JSON."""

    rows: tuple[LedgerRow, ...] = attrs.field(converter=_rows)

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LedgerRow:
        """The row of the tensor of that name.

        Raises:
            ArgumentError: if the source has no such tensor.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError(f"the ledger has no tensor named {name!r}")

    @property
    def bytes_before(self) -> int:
        """Bytes of the source's tensors, shared storage counted once."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the result's tensors; the bytes of the file, its header aside."""
        return sum(row.bytes_after for row in self.rows)

    def count(self, fate: Fate) -> int:
        """How many tensors met this fate."""
        return sum(row.fate == fate for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The ledger as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent)

    def summary(self) -> str:
        """A few lines: how many tensors met each fate for which reason, and the bytes."""
        groups: dict[tuple[str, str, str], list[LedgerRow]] = {}
        for row in self.rows:
            reason = "shares storage" if row.fate == "alias" else row.reason
            groups.setdefault((row.fate, row.scheme, reason), []).append(row)
        table = [("fate", "scheme", "tensors", "bytes before", "bytes after", "reason")]
        for (fate, scheme, reason), rows in groups.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            table.append((fate, scheme, f"{len(rows)}", f"{before:,}", f"{after:,}", reason))
        return render_table(table, right=(2, 3, 4)) + "\n" + self._total()

    def _total(self) -> str:
        fates = Counter(row.fate for row in self.rows)
        counted = ", ".join(f"{number} {fate}" for fate, number in fates.items())
        ratio = f" ({self.bytes_before / self.bytes_after:.2f}x smaller)" if self.bytes_after else ""
        return f"{len(self.rows)} tensors: {counted}; {self.bytes_before:,} -> {self.bytes_after:,} bytes{ratio}"

    def __str__(self) -> str:
        table = [("name", "shape", "dtype", "fate", "scheme", "before", "after", "reason")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            before, after = f"{row.bytes_before:,}", f"{row.bytes_after:,}"
            table.append((row.name, shape, dtype_name(row.dtype), row.fate, row.scheme, before, after, row.reason))
        return render_table(table, right=(5, 6)) + "\n" + self._total()


def no_progress(activity: str, rows: Sequence[LedgerRow]) -> Iterable[LedgerRow]:
    """The `Progress` that tells nobody."""
    return rows


def render_table(rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> str:
    """Rows of equal length as aligned text; the first is the heading, the columns in `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
