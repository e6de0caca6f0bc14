"""`LayerErrors`: how far the rounding of each weight moves the output of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewbits.calibration.capture import InputCapture, Watched
from fewbits.checkpoint.codec import Value
from fewbits.nn.walk import find
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger

#: A weight with at most this many elements is decoded whole: many calls may use a few rows of it.
_SMALL = 1 << 20

#: Elements of outputs that are computed at a time.
_OUTPUTS = 1 << 22

#: Rows are read from a multiple of this on, because the packed zero points of 32 rows share words.
_ALIGNED = 32


class LayerErrors:
    """Adds up ``|W x|^2`` and ``|(W - Q) x|^2`` of each quantized weight, over all inputs x that its layer gets.

    The inputs are those of the float model. No input is kept.

    Args:
        model: the float model.
        ledger: the ledger of the result.
        value_of: returns the stored form of a weight, by its name.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, value_of: Callable[[str], Value]) -> None:
        self._watched = {
            row.name: Watched(row.name, find(model, row.name).tensor, row.layout)
            for row in ledger.stored
            if isinstance(row.spec, QuantSpec) and row.layout is not None
        }
        self._value_of = value_of
        self._powers: dict[str, tuple[float, float]] = {}
        self._last: tuple[tuple[str, slice], Tensor, Tensor] | None = None

    def watching(self) -> InputCapture:
        """Return the context in which the float model runs a batch."""
        return InputCapture([*self._watched.values()], self._receive)

    def sqnr_db(self) -> dict[str, float]:
        """Return the SQNR of the output of each layer that has had inputs, in dB, by the name of its weight."""
        figures = {name: sqnr_db(*powers) for name, powers in self._powers.items()}
        return {name: -math.inf if math.isnan(figure) else figure for name, figure in figures.items()}

    def _receive(self, name: str, rows: slice, x: Tensor) -> None:
        weight, error = self._decoded(name, rows)
        x = x.detach().to(weight.dtype)
        signal, noise = self._powers.get(name, (0.0, 0.0))
        step = max(1, _OUTPUTS // max(1, len(x)))
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            signal += _power(x @ weight[part].mT)
            noise += _power(x @ error[part].mT)
        self._powers[name] = signal, noise

    def _decoded(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        """Return some rows of the weight's matrix, and their errors."""
        watched = self._watched[name]
        whole = slice(0, watched.layout.rows)
        held = whole if watched.tensor.numel() <= _SMALL else slice(rows.start // _ALIGNED * _ALIGNED, rows.stop)
        if self._last is None or self._last[0] != (name, held):
            self._last = (name, held), *self._read(watched, held)
        _, weight, error = self._last
        wanted = slice(rows.start - held.start, rows.stop - held.start)
        return weight[wanted], error[wanted]

    def _read(self, watched: Watched, rows: slice) -> tuple[Tensor, Tensor]:
        stored = self._value_of(watched.name)
        matrix = WeightMatrix(watched.tensor.detach(), watched.layout)
        weight = matrix.read(rows.start, rows.stop).to(compute_dtype(matrix.dtype))
        if not isinstance(stored, QuantizedTensor):
            return weight, torch.zeros_like(weight)
        return weight, weight - stored.rows(rows.start, rows.stop).dequantize(weight.dtype).to(weight.device)


def _power(outputs: Tensor) -> float:
    return float(outputs.double().square().sum())
