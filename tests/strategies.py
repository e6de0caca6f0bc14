"""Hypothesis strategies for tensors, layouts and specs, and the same maths written another way."""

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits import Layout, QuantSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

seeds = st.integers(0, 2**32 - 1)


def shapes(min_dims: int = 1, max_dims: int = 5, max_elements: int = 120) -> st.SearchStrategy[tuple[int, ...]]:
    sides = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 33]), min_size=min_dims, max_size=max_dims)
    return sides.filter(lambda sizes: math.prod(sizes) <= max_elements).map(tuple)


@st.composite
def specs(draw, scale_dtypes=(None, *FLOATS), **fixed) -> QuantSpec:
    granularity = fixed.get("granularity") or draw(st.sampled_from(["tensor", "channel", "group"]))
    fields = {
        "bits": draw(st.integers(2, 8)),
        "granularity": granularity,
        "group_size": draw(st.sampled_from([1, 2, 3, 4, 5, 32, 1000])) if granularity == "group" else None,
        "symmetric": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from(scale_dtypes)),
    }
    return QuantSpec(**(fields | fixed))


def numbers(dtype: torch.dtype, limit: float | None = None) -> st.SearchStrategy[float]:
    """Numbers of a dtype up to `limit`: near one, of any magnitude, and at its edges."""
    info = torch.finfo(dtype)
    largest = min(info.max, limit or info.max)
    if rounded(largest, dtype) > largest:
        largest = rounded(largest, dtype) * (1 - info.eps)
    edges = [0.0, 1.0, largest, info.tiny, info.tiny * info.eps, info.tiny / 2, info.eps]
    magnitudes = st.one_of(
        st.floats(0, min(8.0, largest)), st.floats(0, largest, allow_subnormal=True), st.sampled_from(edges)
    )
    signed = st.tuples(magnitudes, st.sampled_from([1.0, -1.0])).map(math.prod)
    return signed.map(lambda x: max(-largest, min(largest, torch.tensor(x, dtype=dtype).item())))


@st.composite
def contents(draw, shape: tuple[int, ...], dtype: torch.dtype, limit: float | None = None) -> Tensor:
    """A contiguous tensor: random or constant, perhaps with one outlier, zero rows, or one sign only."""
    palette = torch.tensor(draw(st.lists(numbers(dtype, limit), min_size=1, max_size=6)), dtype=dtype)
    generator = torch.Generator().manual_seed(draw(seeds))
    tensor = palette[torch.randint(len(palette), shape, generator=generator)]
    if draw(st.booleans()):
        tensor = tensor * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    if draw(st.booleans()):
        tensor = torch.where(torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator) < 0.3, 0.0, tensor)
    if draw(st.booleans()):
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(numbers(dtype, limit))
    return tensor.abs() if draw(st.booleans()) else tensor


@st.composite
def restrided(draw, tensor: Tensor) -> Tensor:
    """The same shape in other strides; an expanded axis repeats its first slice."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "offset"]))
    axis = draw(st.integers(0, tensor.dim() - 1))
    if kind == "transposed":
        axes = draw(st.permutations(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(sorted(range(len(axes)), key=axes.__getitem__))
    if kind == "sliced":
        every = [slice(None)] * axis + [slice(1, None, 2)]
        large = tensor.repeat_interleave(2, axis).neg()
        large[tuple(every)] = tensor
        return large[tuple(every)]
    if kind == "expanded":
        return tensor.narrow(axis, 0, 1).expand_as(tensor)
    if kind == "offset":
        return torch.cat([tensor.new_ones(3), tensor.flatten()])[3:].view(tensor.shape)
    return tensor


@st.composite
def weights(
    draw, dtypes=FLOATS, min_dims: int = 2, max_dims: int = 5, limit: float | None = None, max_elements: int = 120
) -> Tensor:
    """A finite tensor of any dtype, shape, strides and content."""
    shape = draw(shapes(min_dims, max_dims, max_elements))
    return draw(restrided(draw(contents(shape, draw(st.sampled_from(dtypes)), limit))))


@st.composite
def layouts(draw, shape: tuple[int, ...]) -> Layout:
    """Any cut of a shape, now and then through a view that splits an axis as grouped convolutions do."""
    view = list(shape)
    axis = draw(st.integers(0, len(shape) - 1))
    divisors = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]
    if draw(st.booleans()):
        parts = draw(st.sampled_from(divisors))
        view[axis : axis + 1] = [parts, shape[axis] // parts]
    order = draw(st.permutations(range(len(view))))
    return Layout(shape, view, order, draw(st.integers(0, len(view))))


@st.composite
def problems(draw, dtypes=FLOATS, relative_limit: float = 1.0, max_elements: int = 120, **fixed):
    """(weight, spec, layout) with magnitudes up to `relative_limit` of what both dtypes can hold."""
    dtype = draw(st.sampled_from(dtypes))
    spec = draw(specs(**fixed))
    limit = relative_limit * min(torch.finfo(d).max for d in (dtype, spec.scale_dtype or dtype))
    weight = draw(weights((dtype,), min_dims=1, limit=limit, max_elements=max_elements))
    return weight, spec, draw(layouts(tuple(weight.shape)))


def as_matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """The matrix that a layout cuts, in one expression."""
    return tensor.reshape(layout.view).permute(layout.permutation).reshape(layout.rows, layout.columns)


def per_element(params: Tensor, spec: QuantSpec, rows: int, columns: int) -> Tensor:
    """Scales or zero points, one for each element of a (rows, columns) matrix."""
    if spec.granularity == "tensor":
        return params.expand(rows, columns)
    return params[:, torch.arange(columns) // (spec.group_size or columns)]


def fractions(tensor: Tensor) -> list[Fraction]:
    """The elements as they are, without rounding."""
    return [Fraction(value) for value in tensor.flatten().tolist()]


def ulp(x: float, dtype: torch.dtype) -> float:
    """The distance from a normal number to the next larger one of a dtype."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(x)[1] - 1)


def rounded(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()


def quantize_group(values: list[float], spec: QuantSpec, dtype: torch.dtype) -> tuple[list[int], float, int]:
    """(codes, scale, zero point) of one group of a weight of `dtype`, with the min-max rule, in plain Python."""
    real = np.float64 if dtype == torch.float64 else np.float32
    steps, low, high = 2**spec.bits - 1, min(0.0, *values), max(0.0, *values)
    exact = max(-low, high) / (steps // 2) if spec.symmetric else high / steps - low / steps
    scale_dtype = spec.scale_dtype or dtype
    nearest = max(rounded(exact, scale_dtype), torch.finfo(scale_dtype).tiny)
    for scale in (nearest, nearest + ulp(nearest, scale_dtype)):
        zero = 0 if spec.symmetric else min(max(round(spec.code_min - low / scale), spec.code_min), spec.code_max)
        reach = Fraction(scale) * (spec.code_max - zero + Fraction(1, 2))
        if Fraction(high) <= reach:
            break
    codes = [round(float(real(value) / real(scale))) + zero for value in values]
    return [min(max(code, spec.code_min), spec.code_max) for code in codes], scale, zero
