"""`Scheme`: how ``config_groups`` of compressed-tensors describe weights. The keys follow compressed-tensors 0.20."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from fewbits.numerics.spec import Activations, Granularity, QuantSpec
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


@attrs.frozen
class Scheme:
    """The scheme of a group of weights.

    Attributes:
        bits: bits per code.
        strategy: which weights share a scale.
        group_size: columns per scale, for groups.
        symmetric: whether there are no zero points.
        is_float: whether the codes are float8 numbers.
        activations: how inputs are rounded to int8; None if they are not.
    """

    bits: int
    strategy: Granularity
    group_size: int | None
    symmetric: bool
    is_float: bool
    activations: Activations | None

    @classmethod
    def of(cls, spec: QuantSpec) -> Scheme:
        """Return the scheme of a spec. Specs that differ in the dtype of scales have the same scheme."""
        return cls(
            spec.bits, spec.granularity, spec.group_size, spec.symmetric, spec.levels is not None, spec.activations
        )

    @property
    def format(self) -> str:
        """The name of the format of such weights."""
        if self.is_float:
            return "float-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return the entry in ``config_groups``.

        Args:
            targets: classes, or patterns of names.
        """
        sizes = {"num_bits": self.bits, "strategy": self.strategy, "group_size": self.group_size}
        kind = {"type": "float" if self.is_float else "int", "symmetric": self.symmetric, "dynamic": False}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": list(targets),
            "format": self.format,
            "weights": sizes | kind,
            "input_activations": None if self.activations is None else inputs,
            "output_activations": None,
        }


def coded(ledger: Ledger) -> list[tuple[LedgerRow, QuantSpec]]:
    """Return the rows of weights that are stored as codes, with their specs."""
    return [(row, row.spec) for row in ledger if isinstance(row.spec, QuantSpec)]


def scheme_of(row: LedgerRow) -> Scheme | None:
    """Return the scheme of a weight; None if it is not stored as codes."""
    return Scheme.of(row.spec) if isinstance(row.spec, QuantSpec) else None


def rows_by_scheme(ledger: Ledger) -> dict[Scheme, list[LedgerRow]]:
    """Group the weights that are stored as codes. The scheme that covers the most bytes comes first."""
    groups: dict[Scheme, list[LedgerRow]] = {}
    for row, spec in coded(ledger):
        groups.setdefault(Scheme.of(spec), []).append(row)
    first = max(groups, key=lambda scheme: sum(row.bytes_before for row in groups[scheme]), default=None)
    return groups if first is None else {first: groups[first], **groups}
