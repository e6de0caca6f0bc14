"""What a stored tensor is worth: SQNR, largest error, cosine, and the proof of its error bound, element by element.

One function measures. It decodes what was stored and compares in float64; sums are taken in a fixed order, pairwise
and elementwise, so that thread count and instruction set change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import clipped, decode, error_bound
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.packing import unpack
from fewbits.numerics.sums import group_sums
from fewbits.numerics.tensor import QuantizedTensor


@attrs.frozen
class Measurement:
    """How one stored tensor compares with the tensor it was made from.

    Attributes:
        elements: how many were compared (all of them).
        signal: sum of the squares of the original.
        noise: sum of the squares of the error.
        dot: sum of the products of original and decoded.
        decoded: sum of the squares of the decoded.
        max_abs_error: the largest error.
        worst_bound_ratio: the largest error divided by its own element's bound; at most 1 if the bound holds.
        broken_at: row and column of the first element whose error is beyond its bound; None if all hold.
        clipped: how many elements an observer left outside the range of the codes, where the bound is wider.
        code_min: the smallest code in use; None for a cast.
        code_max: the largest.
        scale_min: the smallest magnitude of a scale; None for a cast.
        scale_max: the largest.
        unit: what signal, noise, dot and decoded are sums of squares in: a power of two, 1 for all but float64
            tensors, whose squares can leave the range of float64.
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
    unit: float = 1.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, 10 log10(signal / noise); inf where there is no error at all."""
        return sqnr_db(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        """Cosine between original and decoded; 1.0 where both are zero."""
        norm = math.sqrt(self.signal) * math.sqrt(self.decoded)
        if norm == 0:
            return float(self.noise == 0)
        cosine = self.dot / norm
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))


def pooled_sqnr_db(measurements: Iterable[Measurement]) -> float:
    """SQNR over several tensors: their signals and noises added up before the division."""
    measurements = list(measurements)
    unit = max((m.unit for m in measurements), default=1.0)
    weighed = [(m, (m.unit / unit) ** 2) for m in measurements]
    return sqnr_db(
        math.fsum(m.signal * share for m, share in weighed), math.fsum(m.noise * share for m, share in weighed)
    )


@torch.no_grad()
def measure(original: Tensor, stored: QuantizedTensor | Tensor) -> Measurement:
    """Compare every element of what was stored with what it was made from.

    Args:
        original: floating, the tensor before.
        stored: its codes, or its cast to another floating dtype.

    Raises:
        ArgumentError: if the shapes differ, or there is no element to compare.
    """
    if tuple(original.shape) != tuple(stored.shape) or not original.numel():
        raise ArgumentError(f"a tensor of shape {tuple(original.shape)} cannot be compared with {tuple(stored.shape)}")
    unit = _unit(original)
    if not isinstance(stored, QuantizedTensor):
        return _compare(_cast_blocks(original, stored), unit)
    scale = stored.scale.abs()
    measured = _compare(_quantized_blocks(original, stored), unit)
    return attrs.evolve(measured, scale_min=float(scale.min()), scale_max=float(scale.max()))


@attrs.frozen(eq=False)
class _Block:
    """Some rows of the matrix: before, after, and how far apart they may be, all in float64."""

    start: int
    original: Tensor
    decoded: Tensor
    bound: Tensor
    codes: Tensor | None = None
    clipped: int = 0


def _quantized_blocks(original: Tensor, stored: QuantizedTensor) -> Iterator[_Block]:
    zero_points, spec = stored.zero_points(), stored.spec
    for start, stop, rows in WeightMatrix(original, stored.layout).blocks():
        where = slice(None) if spec.granularity == "tensor" else slice(start, stop)
        scale, zero_point = stored.scale[where], None if zero_points is None else zero_points[where]
        codes = unpack(stored.packed[start:stop], spec.bits, stored.layout.columns)
        x = rows.double()
        decoded = _as_read(decode(codes, scale, zero_point, spec, torch.float64), compute_dtype(scale.dtype))
        signed = codes.to(torch.int16) + spec.code_min
        outside = int(clipped(x, scale, zero_point, spec).sum())
        yield _Block(start, x, decoded, error_bound(x, scale, zero_point, spec), signed, outside)


def _as_read(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """The real numbers that codes stand for; Inf where decoding in `dtype` gives Inf."""
    return torch.where(torch.isinf(decoded.to(dtype)), torch.inf, decoded)


def _cast_blocks(original: Tensor, stored: Tensor) -> Iterator[_Block]:
    layout, limits = Layout.of(original.shape), torch.finfo(stored.dtype)
    decoded = WeightMatrix(stored, layout)
    for start, stop, rows in WeightMatrix(original, layout).blocks():
        x = rows.double()
        # Half a unit in the last place, of a normal and of a subnormal number.
        bound = x.abs() * (limits.eps / 2) + limits.tiny * limits.eps / 2
        yield _Block(start, x, decoded.read(start, stop).double(), bound)


def _unit(original: Tensor) -> float:
    """A power of two near the largest magnitude of a float64 tensor; 1 for the other dtypes."""
    if original.dtype != torch.float64:
        return 1.0
    blocks = WeightMatrix(original, Layout.of(original.shape)).blocks()
    largest = max(_largest(rows.abs()) for _, _, rows in blocks)
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000) if math.isfinite(largest) else 1.0


def _compare(blocks: Iterable[_Block], unit: float) -> Measurement:
    sums: list[list[float]] = []
    codes: list[int] = []
    elements, outside, worst_error, worst_ratio, broken = 0, 0, 0.0, 0.0, None
    for block in blocks:
        x, decoded = block.original, block.decoded
        error = (x - decoded).abs_()
        # NaN and Inf out of a damaged scale must count as broken, not vanish in a comparison.
        held = (error <= block.bound) & torch.isfinite(error)
        if broken is None and not held.all():
            row, column = (~held).nonzero()[0].tolist()
            broken = (block.start + row, column)
        if block.codes is not None:
            codes += map(int, torch.aminmax(block.codes))
        elements += x.numel()
        outside += block.clipped
        worst_error = max(worst_error, _largest(error))
        worst_ratio = max(worst_ratio, _largest(torch.where(error == 0, 0.0, error / block.bound)))
        x, decoded, error = x / unit, decoded / unit, error / unit
        sums.append([_sum(t) for t in (x * x, error.square_(), x * decoded, decoded.square_())])
    signal, noise, dot, power = (_fsum(terms) for terms in zip(*sums, strict=True))
    return Measurement(
        elements=elements,
        signal=signal,
        noise=noise,
        dot=dot,
        decoded=power,
        max_abs_error=worst_error,
        worst_bound_ratio=worst_ratio,
        broken_at=broken,
        clipped=outside,
        code_min=min(codes, default=None),
        code_max=max(codes, default=None),
        unit=unit,
    )


def _largest(values: Tensor) -> float:
    """The largest element, NaN counting as inf."""
    return float(values.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _sum(values: Tensor) -> float:
    """The sum of all elements (which are overwritten): of each row in a fixed order, of the rows rounded once."""
    return _fsum(group_sums(values).tolist())


def _fsum(terms: Sequence[float]) -> float:
    """The sum, rounded once; what is not finite stays that way."""
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
