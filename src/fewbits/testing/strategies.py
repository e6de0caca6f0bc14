"""Hypothesis strategies: tensors, specs and layouts, awkward cases included.

Some elements of every kind are edge cases: zeros, subnormal numbers, the largest numbers of a dtype, constants, one
outlier among small numbers. Strides vary too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec

#: Dtypes of weights and scales. Hypothesis reduces failing examples to the first.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: Other dtypes in checkpoints.
OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

#: Levels are multiples of one part in so many.
_LEVEL_GRID = 1 << 12

#: Seeds for a `torch.Generator`.
seeds: st.SearchStrategy[int] = st.integers(0, 2**32 - 1)


def shapes(min_dims: int = 1, max_dims: int = 5, max_elements: int = 120) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes with at least one element, odd sizes and ones included.

    Args:
        min_dims: The least number of axes.
        max_dims: The largest number of axes.
        max_elements: The largest number of elements.
    """
    sides = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 33]), min_size=min_dims, max_size=max_dims)
    return sides.filter(lambda sizes: math.prod(sizes) <= max_elements).map(tuple)


@st.composite
def levels(draw: st.DrawFn, /, bits: int) -> tuple[float, ...]:
    """Draw a codebook for ``QuantSpec(levels=...)``: ``2**bits`` rising numbers with 0 inside and 1 or -1 at an end."""
    count = 2**bits - 1
    below = draw(st.integers(1, count - 1))
    sides = [_rising(draw, number) for number in (below, count - below)]
    return (*(-level for level in reversed(sides[0])), 0.0, *sides[1])


def _rising(draw: st.DrawFn, count: int) -> list[float]:
    """Draw so many rising numbers between 0 and 1; the last is 1."""
    inner = st.lists(st.integers(1, _LEVEL_GRID - 1), min_size=count - 1, max_size=count - 1, unique=True)
    return [step / _LEVEL_GRID for step in (*sorted(draw(inner)), _LEVEL_GRID)]


@st.composite
def specs(draw: st.DrawFn, /, scale_dtypes: Sequence[torch.dtype | None] = (None, *FLOATS), **fixed: Any) -> QuantSpec:
    """Draw a spec of any width, granularity, symmetry, levels, scale dtype, and one or two levels of scales.

    Args:
        draw: Passed by Hypothesis.
        scale_dtypes: The dtypes of scales to choose from; None means the dtype of the weight.
        fixed: Fields of `QuantSpec` with fixed values.
    """
    granularity = fixed.get("granularity") or draw(st.sampled_from(["tensor", "channel", "group"]))
    fields: dict[str, Any] = {
        "bits": draw(st.integers(2, 8)),
        "granularity": granularity,
        "group_size": draw(st.sampled_from([1, 2, 3, 4, 5, 32, 1000])) if granularity == "group" else None,
        "symmetric": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from(scale_dtypes)),
    }
    fields |= fixed
    two_levels = granularity == "group" and fields["scale_dtype"] != POWERS_OF_TWO
    if "scale_bits" not in fixed and two_levels and draw(st.booleans()):
        fields["scale_bits"] = draw(st.integers(2, 8))
    # Large codebooks take long to draw, and behave like small ones.
    if "levels" not in fixed and fields["symmetric"] and fields["bits"] <= 4 and draw(st.booleans()):
        fields["levels"] = draw(levels(fields["bits"]))
    return QuantSpec(**fields)


def numbers(dtype: torch.dtype, limit: float | None = None) -> st.SearchStrategy[float]:
    """Draw numbers of a floating dtype: near one, of any magnitude, and edge cases.

    Args:
        dtype: A floating dtype.
        limit: The largest magnitude; by default the largest number of the dtype.
    """
    info = torch.finfo(dtype)
    largest = min(info.max, limit or info.max)
    if rounded(largest, dtype) > largest:
        largest = rounded(largest, dtype) * (1 - info.eps)
    edges = [0.0, 1.0, largest, info.tiny, info.tiny * info.eps, info.tiny / 2, info.eps]
    magnitudes = st.one_of(
        st.floats(0, min(8.0, largest)), st.floats(0, largest, allow_subnormal=True), st.sampled_from(edges)
    )
    signed = st.tuples(magnitudes, st.sampled_from([1.0, -1.0])).map(math.prod)
    return signed.map(lambda x: max(-largest, min(largest, rounded(x, dtype))))


@st.composite
def contents(draw: st.DrawFn, /, shape: tuple[int, ...], dtype: torch.dtype, limit: float | None = None) -> Tensor:
    """Draw a contiguous floating tensor: random or constant, perhaps with an outlier, zero rows, or one sign."""
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
def restrided(draw: st.DrawFn, /, tensor: Tensor) -> Tensor:
    """Change the strides; an expanded axis repeats its first slice."""
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
    draw: st.DrawFn,
    /,
    dtypes: Sequence[torch.dtype] = FLOATS,
    min_dims: int = 2,
    max_dims: int = 5,
    limit: float | None = None,
    max_elements: int = 120,
) -> Tensor:
    """Draw a finite floating tensor with at least one element, of any shape, strides and content.

    Args:
        draw: Passed by Hypothesis.
        dtypes: Floating dtypes to choose from.
        min_dims: The least number of axes, from 1.
        max_dims: The largest number of axes.
        limit: The largest magnitude; by default the largest number of the dtype.
        max_elements: The largest number of elements.
    """
    shape = draw(shapes(min_dims, max_dims, max_elements))
    return draw(restrided(draw(contents(shape, draw(st.sampled_from(dtypes)), limit))))


@st.composite
def tensors(draw: st.DrawFn, /, dtypes: Sequence[torch.dtype] = (*FLOATS, *OTHER_DTYPES)) -> Tensor:
    """Draw any tensor of a checkpoint: every dtype, perhaps empty, without axes, or with NaN and Inf."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.one_of(shapes(0, 4), st.sampled_from([(), (0,), (3, 0), (0, 2, 5)])))
    generator = torch.Generator().manual_seed(draw(seeds))
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    # Any bits are valid, except for bools, whose byte is 0 or 1.
    tensor = ((raw & 1).bool() if dtype == torch.bool else raw.view(dtype)).reshape(shape)
    return draw(restrided(tensor)) if shape and tensor.numel() and dtype != torch.bool else tensor


@st.composite
def layouts(draw: st.DrawFn, /, shape: tuple[int, ...]) -> Layout:
    """Draw any cut of a shape, sometimes with a split axis as in grouped convolutions."""
    view = list(shape)
    axis = draw(st.integers(0, len(shape) - 1))
    divisors = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]
    if draw(st.booleans()):
        parts = draw(st.sampled_from(divisors))
        view[axis : axis + 1] = [parts, shape[axis] // parts]
    order = draw(st.permutations(range(len(view))))
    return Layout(shape, view, order, draw(st.integers(0, len(view))))


@st.composite
def problems(
    draw: st.DrawFn,
    /,
    dtypes: Sequence[torch.dtype] = FLOATS,
    relative_limit: float = 1.0,
    max_elements: int = 120,
    spec: st.SearchStrategy[QuantSpec] | None = None,
    **fixed: Any,
) -> tuple[Tensor, QuantSpec, Layout]:
    """Draw a weight, a spec, and a layout for the weight.

    Args:
        draw: Passed by Hypothesis.
        dtypes: The dtypes of the weight to choose from.
        relative_limit: The largest magnitude, as a share of the largest number in the dtypes of weight and scales.
        max_elements: The largest number of elements.
        spec: A strategy for the spec; by default `specs` with the arguments `fixed`.
        fixed: Arguments of `specs`.
    """
    dtype, drawn = draw(st.sampled_from(dtypes)), draw(specs(**fixed) if spec is None else spec)
    limit = relative_limit * min(torch.finfo(d).max for d in (dtype, drawn.scale_dtype or dtype))
    weight = draw(weights((dtype,), min_dims=1, limit=limit, max_elements=max_elements))
    return weight, drawn, draw(layouts(tuple(weight.shape)))


def rounded(x: float, dtype: torch.dtype) -> float:
    """Round `x` to the nearest number of a dtype."""
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()
