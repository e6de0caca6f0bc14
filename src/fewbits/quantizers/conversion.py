"""The work of `convert`: every row of the ledger from source to target, measured while the source is there."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from fewbits.checkpoint.saving import Value
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import NumericsError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import Measurement, measure
from fewbits.selection.ledger import Ledger, LedgerRow, Progress
from fewbits.sources.base import Source, Target

#: Makes the stored form of one tensor.
Convert = Callable[[LedgerRow, Tensor], Value]


class Conversion:
    """One run through the ledger.

    Attributes:
        target: where the stored forms go.
        measured: what was measured on the way, by name.
    """

    def __init__(
        self, source: Source, ledger: Ledger, serializer: Serializer, output: str | os.PathLike[str] | None
    ) -> None:
        self._source = source
        self._rows = [row for row in ledger if row.fate != "alias"]
        self._done: set[str] = set()
        self.target: Target = source.target(ledger, serializer, output)
        self.measured: dict[str, Measurement] = {}

    def run(self, convert: Convert, *, measuring: bool, progress: Progress) -> object:
        """Convert every row that is not done yet.

        Returns:
            the result, of the kind that the source is.

        Raises:
            NumericsError: naming the tensor that cannot be converted. A file that was begun is gone then.
        """
        try:
            for row in progress("convert", self._rows):
                if row.name not in self._done:
                    self._convert(row, convert, measuring)
            return self.target.finish()
        except BaseException:
            self.target.abort()
            raise

    def _convert(self, row: LedgerRow, convert: Convert, measuring: bool) -> None:
        tensor = self._source.read(row.name)
        value: Value = tensor if row.spec is None else _named(row, convert, tensor)
        if measuring and row.spec is not None:
            self.measured[row.name] = measure(tensor, value)
        self.target.put(row, value, self.measured.get(row.name))
        self._done.add(row.name)


def _named(row: LedgerRow, convert: Convert, tensor: Tensor) -> Value:
    """Convert; an error of the numbers gets the tensor's name."""
    try:
        return convert(row, tensor)
    except NumericsError as error:
        raise type(error)(
            f"{row.name}, shape {row.shape}, {dtype_name(row.dtype)}, to {row.scheme}: {error}"
        ) from error
