"""`Allocation`: a scheme for every tensor, with its bytes and its error."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import attrs

from fewbits._sizes import bytes_in_words
from fewbits._table import render_fitting
from fewbits.config.config import QuantizationConfig
from fewbits.config.writing import write_config
from fewbits.pages.curve import Curve
from fewbits.selection.ledger import Ledger


@attrs.frozen
class Allocated:
    """The scheme of one weight, with its bytes and its error.

    Attributes:
        name: the name of the weight.
        scheme: a short name of the candidate, such as ``"nf4:32:6"``.
        elements: the number of its elements.
        bytes: its bytes in the result.
        sqnr_db: SQNR of the weight in dB, when it is rounded to the nearest code; None if it stays as it is.
        error: the error that it adds; see `Allocation.label`.
    """

    name: str
    scheme: str
    elements: int
    bytes: int
    sqnr_db: float | None
    error: float


@attrs.frozen(eq=False, repr=False)
class Allocation:
    """A scheme for every tensor.

    Attributes:
        config: the settings, for ``fewbits.quantize(source, config=allocation.config)``.
        ledger: the fate of every tensor with these settings, with its exact bytes.
        weights: the weights that have a choice, in the order of the ledger.
        error: the sum of the errors of all weights.
        label: the meaning of the error.
        gap: the largest possible distance from the best choice, as a share of the error; of the size, if the budget
            limits the error.
        curve: the least error for each size.
    """

    config: QuantizationConfig
    ledger: Ledger
    weights: tuple[Allocated, ...]
    error: float
    label: str
    gap: float
    curve: Curve

    @property
    def bits_per_weight(self) -> float:
        """The bits of all tensors, over the number of all elements; a shared tensor counts once."""
        return 8 * self.ledger.bytes_after / sum(math.prod(row.shape) for row in self.ledger.stored)

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Write the settings to a TOML or JSON file that a person can edit, and read them back.

        Args:
            path: the file; its suffix is ``.toml`` or ``.json``.
            replace: replace the file if it exists.

        Raises:
            ArgumentError: if it exists, has another suffix, or cannot be written.
        """
        write_config(self.config, Path(path), [f"# {line}" for line in self.summary().splitlines()], replace=replace)

    def summary(self) -> str:
        """Return the size, the error, and the bytes in each scheme, in a few lines."""
        size = bytes_in_words(self.ledger.bytes_before, self.ledger.bytes_after)
        schemes: dict[str, list[Allocated]] = {}
        for weight in self.weights:
            schemes.setdefault(weight.scheme, []).append(weight)
        return "\n".join(
            [
                f"{self.bits_per_weight:.4f} bits per weight: {size}",
                f"{self.label}: {self.error:.6g}; at most {self.gap:.2%} from the best choice",
                *(f"{scheme}: {_counted(found)}" for scheme, found in sorted(schemes.items())),
            ]
        )

    def table(self, width: int | None = None) -> str:
        """Return a table with a line for every weight.

        Args:
            width: the most characters in a line; None: no limit.
        """
        whole = [("name", "scheme", "elements", "bytes", "SQNR dB", "error", "share")]
        total = self.error or 1.0
        for one in self.weights:
            sqnr_db = "" if one.sqnr_db is None else f"{one.sqnr_db:.2f}"
            figures = f"{one.elements:,}", f"{one.bytes:,}", sqnr_db, f"{one.error:.3g}", f"{one.error / total:.1%}"
            whole.append((one.name, one.scheme, *figures))
        short = [(row[0], row[1], row[3], row[6]) for row in whole]
        return render_fitting(whole, short, width, right=whole[0][2:])

    def to_dict(self) -> dict[str, Any]:
        """Return the allocation as JSON-compatible values."""
        return {
            "config": self.config.to_dict(),
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "label": self.label,
            "gap": self.gap,
            "weights": [attrs.asdict(weight) for weight in self.weights],
            "curve": self.curve.to_dict(),
            "ledger": self.ledger.to_dict(),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the allocation as a JSON document."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __repr__(self) -> str:
        return f"Allocation({self.bits_per_weight:.4f} bits per weight, {self.label} {self.error:.6g})"


def _counted(weights: list[Allocated]) -> str:
    size, elements = sum(one.bytes for one in weights), sum(one.elements for one in weights)
    return f"{len(weights)} weights, {size:,} bytes, {8 * size / elements:.2f} bits per weight"
