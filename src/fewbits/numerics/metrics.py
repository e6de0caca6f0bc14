"""Measure how well a stored tensor matches its original: SQNR, largest error, cosine, and the error bound.

The stored tensor is decoded and every element is compared in float64. Sums are taken in a fixed order, pairwise and
elementwise, so that thread count and instruction set do not change the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import bound_and_clipped, decode
from fewbits.numerics.constant import constant_rows
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.noise import group_sums
from fewbits.numerics.packing import unpack
from fewbits.numerics.params import magnitudes
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
        clipped: the number of elements that an observer left outside the range of the codes; their bound is wider.
        code_min: the smallest code in use; None for a cast.
        code_max: the largest code in use; None for a cast.
        scale_min: the smallest magnitude of a scale; None for a cast.
        scale_max: the largest magnitude of a scale; None for a cast.
        constant_rows: the number of rows with equal codes that rounding cannot explain, and an SQNR below 10 dB.
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
    _, signal, noise = _added([(1.0, 0.0, 0.0), *((m.unit, m.signal, m.noise) for m in measurements)])
    return sqnr_db(signal, noise)


@torch.no_grad()
def measure(original: Tensor, stored: QuantizedTensor | Tensor) -> Measurement:
    """Compare every element of a stored tensor with its original.

    Args:
        original: the floating tensor before quantization.
        stored: the codes of `original`, or a cast of `original` to another floating dtype.

    Raises:
        ArgumentError: if the shapes differ, or there is no element to compare.
    """
    tally = Tally()
    tally.add(original, stored)
    columns = stored.layout.columns if isinstance(stored, QuantizedTensor) else Layout.of(stored.shape).columns
    return tally.measurement(columns)


@attrs.define(on_setattr=attrs.setters.NO_OP)  # a converter would copy the lists at every change
class Tally:
    """Collects the measurement of one stored tensor chunk by chunk.

    A chunk is some whole rows of the tensor's matrix, or, of a cast tensor, some elements in memory order. If all
    chunks but the last are multiples of a block, the result has the same bits as one for the whole tensor at once.

    Attributes:
        elements, clipped, constant_rows, max_abs_error, worst_bound_ratio: as in `Measurement`, so far.
        broken: the position of the first element whose error exceeds its bound; None if all bounds hold.
        codes: the smallest and the largest code; empty for a cast.
        scales: the smallest and the largest magnitude of a scale; empty for a cast.
        sums: unit, signal, noise, dot and decoded of each block.
    """

    elements: int = 0
    clipped: int = 0
    constant_rows: int = 0
    max_abs_error: float = 0.0
    worst_bound_ratio: float = 0.0
    broken: int | None = None
    codes: list[int] = attrs.field(factory=list, converter=list)
    scales: list[float] = attrs.field(factory=list, converter=list)
    sums: list[list[float]] = attrs.field(factory=list, converter=list)

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
            self._add_codes(original, stored)
        else:
            self._add_cast(original, stored)

    def join(self, later: Tally) -> None:
        """Add the results for the chunks that follow these."""
        if later.broken is not None and self.broken is None:
            self.broken = self.elements + later.broken
        self.elements += later.elements
        self.clipped += later.clipped
        self.constant_rows += later.constant_rows
        self.max_abs_error = max(self.max_abs_error, later.max_abs_error)
        self.worst_bound_ratio = max(self.worst_bound_ratio, later.worst_bound_ratio)
        self.codes = _extremes(self.codes + later.codes)
        self.scales = _extremes(self.scales + later.scales)
        self.sums += later.sums

    def to_dict(self) -> dict[str, Any]:
        """Return the state for JSON, exact to the last bit."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tally:
        """Restore the state that `to_dict` returned."""
        return cls(**{field.name: state[field.name] for field in attrs.fields(cls)})

    def measurement(self, columns: int) -> Measurement:
        """Return the measurement of the whole tensor, whose matrix has this many columns."""
        unit, signal, noise, dot, power = _added(self.sums)
        return Measurement(
            elements=self.elements,
            signal=signal,
            noise=noise,
            dot=dot,
            decoded=power,
            max_abs_error=self.max_abs_error,
            worst_bound_ratio=self.worst_bound_ratio,
            broken_at=None if self.broken is None else divmod(self.broken, columns),
            clipped=self.clipped,
            code_min=min(self.codes, default=None),
            code_max=max(self.codes, default=None),
            scale_min=min(self.scales, default=None),
            scale_max=max(self.scales, default=None),
            constant_rows=self.constant_rows,
            unit=unit,
        )

    def _add_codes(self, original: Tensor, stored: QuantizedTensor) -> None:
        whole, spec = stored.params(), stored.spec
        self.scales = _extremes([*self.scales, *map(float, torch.aminmax(magnitudes(whole.scale)))])
        for start, stop, rows in WeightMatrix(original, stored.layout).blocks():
            params = whole.rows(slice(start, stop))
            codes = unpack(stored.packed[start:stop], spec.bits, stored.layout.columns)
            x = rows.double()
            decoded = _as_read(decode(codes, params, spec, torch.float64), compute_dtype(params.scale.dtype))
            bound, clipped = bound_and_clipped(x, params, spec)
            self.codes = _extremes([*self.codes, *(int(end) + spec.code_min for end in torch.aminmax(codes))])
            self.clipped += int(clipped.sum())
            self.constant_rows += constant_rows(x, decoded, codes, params, spec)
            self._compare(x, decoded, bound, original.dtype)

    def _add_cast(self, original: Tensor, stored: Tensor) -> None:
        limits = torch.finfo(stored.dtype)
        # One element per row, so that a chunk is cut into the same blocks as the whole tensor.
        layout = Layout.of(original.shape, inputs=())
        decoded = WeightMatrix(stored, layout)
        for start, stop, elements in WeightMatrix(original, layout).blocks():
            x = elements.reshape(1, -1).double()
            # Half a unit in the last place of a normal number, plus half of one of a subnormal number.
            bound = x.abs() * (limits.eps / 2) + limits.tiny * limits.eps / 2
            self._compare(x, decoded.read(start, stop).reshape(1, -1).double(), bound, original.dtype)

    def _compare(self, x: Tensor, decoded: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
        """Add the figures of the next block: float64 tensors, and the dtype of the original."""
        error = (x - decoded).abs_()
        ratio = _worst_ratio(error, bound)
        if self.broken is None and not ratio < 1:
            # NaN and Inf, which a damaged scale gives, must count as broken: comparisons with NaN are false.
            held = (error <= bound) & torch.isfinite(error)
            if not held.all():
                self.broken = self.elements + int((~held).reshape(-1).to(torch.int8).argmax())
        self.elements += x.numel()
        self.max_abs_error = max(self.max_abs_error, _largest(error))
        self.worst_bound_ratio = max(self.worst_bound_ratio, ratio)
        unit = 1.0
        # Only squares of float64 numbers can leave the range of float64.
        if dtype == torch.float64 and (unit := _unit(x)) != 1:
            x, decoded, error = x / unit, decoded / unit, error / unit
        self.sums.append([unit, *_sums_of_products((x, x), (error, error), (x, decoded), (decoded, decoded))])


def _unit(x: Tensor) -> float:
    """Return a power of two near the largest magnitude; 1 if that is zero, NaN or Inf."""
    largest = float(x.abs().max())
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000) if math.isfinite(largest) else 1.0


def _as_read(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace numbers by Inf where decoding in `dtype` gives Inf."""
    infinite = torch.isinf(decoded.to(dtype))
    return torch.where(infinite, torch.inf, decoded) if infinite.any() else decoded


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


def _added(sums: Sequence[Sequence[float]]) -> list[float]:
    """Add entries of a unit, a signal, and other sums of products in this unit.

    Return the largest unit of a signal that is not zero (1 if all are zero), and the sums in that unit.
    """
    unit = max((own for own, signal, *_ in sums if signal), default=1.0)
    # Divide twice: the square of the ratio may overflow.
    scaled = ([term / (unit / own) / (unit / own) for term in terms] for own, *terms in sums)
    return [unit, *map(_fsum, zip(*scaled, strict=True))]


def _fsum(terms: Sequence[float]) -> float:
    """Return the sum, rounded once; Inf and NaN give Inf or NaN."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
