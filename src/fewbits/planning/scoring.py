"""Score every candidate for every tensor: the error of the outputs that its rounding causes, and its SQNR."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from fewbits.calibration.curvature import Curvature
from fewbits.checkpoint.chunks import CHUNK_ELEMENTS, Chunk, chunks
from fewbits.conversion.encoder import TensorEncoder, naming
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.noise import group_sums
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.quantizers.base import Quantizer
from fewbits.rounding.nearest import RoundToNearest
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source


@attrs.frozen
class Score:
    """What a candidate does to a tensor.

    Attributes:
        error: the divergence of the outputs that it causes; without data, the squared error as a share of the squared
            weights, times the tensor's share of all elements.
        sqnr_db: SQNR of the weights in dB; inf if they stay as they are.
    """

    error: float
    sqnr_db: float


@attrs.define(eq=False)
class _Noise:
    """The errors of one tensor with one spec, so far."""

    noise: float = 0.0
    error: float = 0.0


@attrs.frozen(eq=False)
class Scorer:
    """Rounds tensors as a quantizer would, and compares them with the source.

    In place of a rounding strategy that needs data, weights are rounded to the nearest code.

    Args:
        source: where the tensors come from.
        quantizer: the strategies.
        curvatures: of the weights, by name; None without data.
        elements: the number of elements of all weights.
    """

    source: Source
    quantizer: Quantizer
    curvatures: Mapping[str, Curvature] | None
    elements: int

    @torch.no_grad()
    def scores(self, rows: Sequence[LedgerRow]) -> list[Score]:
        """Score the rows that one tensor has with all candidates."""
        whole = next((row for row in rows if row.layout is not None), rows[0])
        signal, found = 0.0, {row.spec: _Noise() for row in rows}
        curvature = None if self.curvatures is None else self.curvatures.get(whole.name)
        for chunk in self._chunks(whole, found):
            tensor = self.source.read_chunk(whole.name, chunk)
            matrix = _matrix(tensor, chunk).to(torch.float32)
            signal += _sum(matrix.double().square_())
            for row in {row.spec: row for row in rows if row.spec is not None}.values():
                with naming(row):
                    difference = _matrix(self._rounded(row, chunk, tensor), chunk).to(torch.float32).sub_(matrix)
                noise = found[row.spec]
                noise.noise += _sum(difference.double().square_())
                noise.error += 0.0 if curvature is None else curvature.error(difference, chunk.rows[0])
        share = math.prod(whole.shape) / self.elements
        return [self._score(signal, found[row.spec], share if curvature is None else None) for row in rows]

    def _chunks(self, row: LedgerRow, specs: Iterable[Spec | None]) -> Iterable[Chunk]:
        """Cut a tensor into chunks of rows, unless a spec has one scale for all rows."""
        shared = any(isinstance(spec, QuantSpec) and spec.granularity == "tensor" for spec in specs)
        return [Chunk.whole(row)] if shared or row.layout is None else chunks(row, CHUNK_ELEMENTS)

    def _rounded(self, row: LedgerRow, chunk: Chunk, tensor: Tensor) -> Tensor:
        """Return a chunk as the result would have it, in the shape of the chunk."""
        if isinstance(row.spec, CastSpec):
            return tensor.to(row.spec.dtype)
        rounding = self.quantizer.rounding if self.quantizer.rounding.needs == "nothing" else RoundToNearest()
        encoder = TensorEncoder(type(self.quantizer).__name__, None, rounding)
        described = attrs.evolve(chunk, row=row).described()
        value = encoder.encode(described, tensor, self.quantizer.observer.fresh())
        return value.dequantize(torch.float32) if isinstance(value, QuantizedTensor) else value

    @staticmethod
    def _score(signal: float, noise: _Noise, share: float | None) -> Score:
        """Score one candidate; without curvature, by the tensor's share of all elements."""
        error = noise.error if share is None else share * noise.noise / signal if signal else 0.0
        return Score(error, math.inf if not noise.noise else sqnr_db(signal, noise.noise))


def _matrix(tensor: Tensor, chunk: Chunk) -> Tensor:
    """Return a chunk as the rows of its matrix."""
    row = chunk.described()
    return WeightMatrix(tensor, row.layout or Layout.of(row.shape)).whole()


def _sum(values: Tensor) -> float:
    return math.fsum(group_sums(values).tolist())
