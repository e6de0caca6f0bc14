"""Measure how well a stored tensor matches its original: SQNR, largest error, cosine, and the error bound.

The stored tensor is decoded and every element is compared in float64. Sums are taken in a fixed order, pairwise and
elementwise, so that thread count and instruction set do not change the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import bound_and_clipped, decode
from fewbits.numerics.constant import SameRows, constant_rows
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.noise import group_sums
from fewbits.numerics.packing import unpack
from fewbits.numerics.tensor import QuantizedTensor

_Number = TypeVar("_Number", int, float)


@attrs.frozen
class Measurement:
    """How one stored tensor compares with the tensor it was made from.

    Attributes:
        elements: the number of elements; all are compared.
        signal: sum of the squares of the original.
        noise: sum of the squares of the error.
        dot: sum of the products of original and decoded.
        decoded: sum of the squares of the decoded tensor.
        max_abs_error: the largest error.
        worst_bound_ratio: the largest ratio of an element's error to its bound; at most 1 if all bounds hold.
        broken_at: row and column of the first element whose error exceeds its bound; None if all bounds hold.
        clipped: how many elements an observer left outside the range of the codes; their bound is wider.
        code_min: the smallest code in use; None for a cast.
        code_max: the largest code in use; None for a cast.
        scale_min: the smallest magnitude of a scale; None for a cast.
        scale_max: the largest magnitude of a scale; None for a cast.
        constant_rows: how many rows have equal codes that rounding cannot explain, and an SQNR below 10 dB.
        same_rows: whether there are at least two rows and all have the same codes.
        unit: elements are divided by this power of two before they are squared for signal, noise, dot and decoded. It
            is 1 except for float64 tensors, whose squares could leave the range of float64.
    """

    elements: int
    signal: float
    noise: float
    dot: float
    decoded: float
    max_abs_error: float
    worst_bound_ratio: float
    broken_at: tuple[int, int] | None = None
    clipped: int = 0
    code_min: int | None = None
    code_max: int | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    constant_rows: int = 0
    same_rows: bool = False
    unit: float = 1.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 10 log10(signal / noise); inf if there is no error."""
        return sqnr_db(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        """Cosine between original and decoded; 1.0 if both are zero."""
        norm = math.sqrt(self.signal) * math.sqrt(self.decoded)
        if norm == 0:
            return float(self.noise == 0)
        cosine = self.dot / norm
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); inf without noise, -inf without signal.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def pooled_sqnr_db(measurements: Iterable[Measurement]) -> float:
    """Return the SQNR of several tensors together: the sum of their signals over the sum of their noises."""
    measurements = list(measurements)
    unit = max((m.unit for m in measurements), default=1.0)
    weighed = [(m, (m.unit / unit) ** 2) for m in measurements]
    return sqnr_db(
        math.fsum(m.signal * share for m, share in weighed), math.fsum(m.noise * share for m, share in weighed)
    )


@torch.no_grad()
def measure(original: Tensor, stored: QuantizedTensor | Tensor) -> Measurement:
    """Compare every element of a stored tensor with its original.

    Args:
        original: the floating tensor before quantization.
        stored: its codes, or its cast to another floating dtype.

    Raises:
        ArgumentError: if the shapes differ, or there is no element to compare.
    """
    tally = Tally(unit_of([original]))
    tally.add(original, stored)
    columns = stored.layout.columns if isinstance(stored, QuantizedTensor) else Layout.of(stored.shape).columns
    return tally.measurement(columns)


def unit_of(chunks: Iterable[Tensor]) -> float:
    """Return the unit for sums of squares: a power of two near the largest magnitude of a float64 tensor, else 1."""
    largest = 0.0
    for chunk in chunks:
        if chunk.dtype != torch.float64:
            return 1.0
        blocks = WeightMatrix(chunk, Layout.of(chunk.shape)).blocks()
        largest = max([largest, *(_largest(rows.abs()) for _, _, rows in blocks)])
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000) if math.isfinite(largest) else 1.0


class Tally:
    """Collects the measurement of one stored tensor chunk by chunk.

    A chunk is some whole rows of the tensor's matrix, or, of a cast tensor, some elements in memory order. If all
    chunks but the last are multiples of a block, the result has the same bits as one for the whole tensor at once.

    Args:
        unit: see `unit_of`.
    """

    def __init__(self, unit: float = 1.0) -> None:
        self._unit = unit
        self._elements = self._clipped = self._constant_rows = 0
        self._largest_error = self._worst_ratio = 0.0
        self._broken: int | None = None
        self._codes: list[int] = []
        self._scales: list[float] = []
        self._sums: list[list[float]] = []
        self._same_rows = SameRows()

    @torch.no_grad()
    def add(self, original: Tensor, stored: QuantizedTensor | Tensor) -> None:
        """Compare the next chunk.

        Raises:
            ArgumentError: if the shapes differ, or there is no element to compare.
        """
        if tuple(original.shape) != tuple(stored.shape) or not original.numel():
            raise ArgumentError(
                f"a tensor of shape {tuple(original.shape)} cannot be compared with {tuple(stored.shape)}"
            )
        if isinstance(stored, QuantizedTensor):
            self._scales += map(float, torch.aminmax(stored.scale.abs()))
            blocks = _quantized_blocks(original, stored)
        else:
            blocks = _cast_blocks(original, stored)
        for block in blocks:
            self._add_block(block)

    def join(self, later: Tally) -> None:
        """Add the results for the chunks that follow these."""
        if later._broken is not None and self._broken is None:
            self._broken = self._elements + later._broken
        self._elements += later._elements
        self._clipped += later._clipped
        self._largest_error = max(self._largest_error, later._largest_error)
        self._worst_ratio = max(self._worst_ratio, later._worst_ratio)
        self._codes += later._codes
        self._scales += later._scales
        self._sums += later._sums
        self._constant_rows += later._constant_rows
        self._same_rows.join(later._same_rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the state for JSON, exact to the last bit."""
        return {
            "unit": self._unit,
            "elements": self._elements,
            "clipped": self._clipped,
            "largest_error": self._largest_error,
            "worst_ratio": self._worst_ratio,
            "broken": self._broken,
            "codes": _extremes(self._codes),
            "scales": _extremes(self._scales),
            "sums": self._sums,
            "constant_rows": self._constant_rows,
            "same_rows": self._same_rows.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tally:
        """Restore the state that `to_dict` returned."""
        tally = cls(state["unit"])
        tally._elements, tally._clipped = state["elements"], state["clipped"]
        tally._largest_error, tally._worst_ratio = state["largest_error"], state["worst_ratio"]
        tally._broken, tally._codes, tally._scales = state["broken"], [*state["codes"]], [*state["scales"]]
        tally._sums = [[*sums] for sums in state["sums"]]
        tally._constant_rows, tally._same_rows = state["constant_rows"], SameRows(**state["same_rows"])
        return tally

    def measurement(self, columns: int) -> Measurement:
        """Return the measurement of the whole tensor, whose matrix has this many columns."""
        signal, noise, dot, power = (_fsum(terms) for terms in zip(*self._sums, strict=True))
        return Measurement(
            elements=self._elements,
            signal=signal,
            noise=noise,
            dot=dot,
            decoded=power,
            max_abs_error=self._largest_error,
            worst_bound_ratio=self._worst_ratio,
            broken_at=None if self._broken is None else divmod(self._broken, columns),
            clipped=self._clipped,
            code_min=min(self._codes, default=None),
            code_max=max(self._codes, default=None),
            scale_min=min(self._scales, default=None),
            scale_max=max(self._scales, default=None),
            constant_rows=self._constant_rows,
            same_rows=bool(self._same_rows),
            unit=self._unit,
        )

    def _add_block(self, block: _Block) -> None:
        x, decoded = block.original, block.decoded
        error = (x - decoded).abs_()
        ratio = _worst_ratio(error, block.bound)
        if self._broken is None and not ratio < 1:
            # NaN and Inf, which a damaged scale gives, must count as broken: comparisons with NaN are false.
            held = (error <= block.bound) & torch.isfinite(error)
            if not held.all():
                self._broken = self._elements + int((~held).reshape(-1).to(torch.int8).argmax())
        if block.codes is not None:
            self._codes += map(int, torch.aminmax(block.codes))
            self._same_rows.add(block.codes)
        self._elements += x.numel()
        self._clipped += block.clipped
        self._constant_rows += block.constant_rows
        self._largest_error = max(self._largest_error, _largest(error))
        self._worst_ratio = max(self._worst_ratio, ratio)
        if self._unit != 1:
            x, decoded, error = x / self._unit, decoded / self._unit, error / self._unit
        self._sums.append(_sums_of_products((x, x), (error, error), (x, decoded), (decoded, decoded)))


@attrs.frozen(eq=False)
class _Block:
    """Some rows before and after quantization, with their error bound, all in float64."""

    original: Tensor
    decoded: Tensor
    bound: Tensor
    codes: Tensor | None = None
    clipped: int = 0
    constant_rows: int = 0


def _quantized_blocks(original: Tensor, stored: QuantizedTensor) -> Iterator[_Block]:
    whole, spec = stored.params(), stored.spec
    for start, stop, rows in WeightMatrix(original, stored.layout).blocks():
        params = whole.rows(slice(start, stop))
        codes = unpack(stored.packed[start:stop], spec.bits, stored.layout.columns)
        x = rows.double()
        decoded = _as_read(decode(codes, params, spec, torch.float64), compute_dtype(params.scale.dtype))
        signed = codes.to(torch.int16) + spec.code_min
        constant = constant_rows(x, decoded, codes, params, spec)
        bound, outside = bound_and_clipped(x, params, spec)
        yield _Block(x, decoded, bound, signed, int(outside.sum()), constant)


def _as_read(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace numbers by Inf where decoding in `dtype` gives Inf."""
    infinite = torch.isinf(decoded.to(dtype))
    return torch.where(infinite, torch.inf, decoded) if infinite.any() else decoded


def _cast_blocks(original: Tensor, stored: Tensor) -> Iterator[_Block]:
    limits = torch.finfo(stored.dtype)
    # One element per row, so that a chunk is cut into the same blocks as the whole tensor.
    layout = Layout.of(original.shape, inputs=())
    decoded = WeightMatrix(stored, layout)
    for start, stop, elements in WeightMatrix(original, layout).blocks():
        x = elements.reshape(1, -1).double()
        # Half a unit in the last place of a normal number, plus half of one of a subnormal number.
        bound = x.abs() * (limits.eps / 2) + limits.tiny * limits.eps / 2
        yield _Block(x, decoded.read(start, stop).reshape(1, -1).double(), bound)


def _extremes(values: Sequence[_Number]) -> list[_Number]:
    """Return the smallest and the largest value; an empty list if there are no values."""
    return [min(values), max(values)] if values else []


def _largest(values: Tensor) -> float:
    """Return the largest element, with NaN counted as inf."""
    largest = float(values.max())  # NaN if one element is NaN
    return math.inf if math.isnan(largest) else largest


def _worst_ratio(error: Tensor, bound: Tensor) -> float:
    """Return the largest ratio of an error to its bound; the ratio is 0 without error, even if the bound is 0."""
    ratio = error / bound
    worst = float(ratio.max())
    return _largest(torch.where(error == 0, 0.0, ratio)) if math.isnan(worst) else worst


def _sums_of_products(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """Return the sum of products of each pair: rows are summed in a fixed order, then added exactly and rounded."""
    products = torch.empty(len(pairs), *pairs[0][0].shape, dtype=torch.float64, device=pairs[0][0].device)
    for product, (a, b) in zip(products, pairs, strict=True):
        torch.mul(a, b, out=product)
    return [_fsum(sums) for sums in group_sums(products).tolist()]


def _fsum(terms: Sequence[float]) -> float:
    """Return the sum, rounded once; Inf and NaN give Inf or NaN."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
