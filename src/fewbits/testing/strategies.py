"""Hypothesis strategies: tensors, specs and layouts, with everything that is awkward about them.

Some elements of every kind are at the edges: zeros, subnormal numbers, the largest numbers of a dtype, constants, one
outlier among small numbers. Strides are anything that torch can make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec

#: The dtypes of weights and scales; the one that failing examples are reduced to comes first.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: What a checkpoint commonly holds besides weights.
OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

#: Steps between the levels that are drawn: no two of them are nearer to each other than this.
_LEVEL_GRID = 1 << 12

#: Seeds for a `torch.Generator`.
seeds: st.SearchStrategy[int] = st.integers(0, 2**32 - 1)


def shapes(min_dims: int = 1, max_dims: int = 5, max_elements: int = 120) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with at least one element, odd sizes and ones among them.

    Args:
        min_dims: how many axes at least.
        max_dims: how many at most.
        max_elements: how many elements at most.
    """
    sides = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 9, 33]), min_size=min_dims, max_size=max_dims)
    return sides.filter(lambda sizes: math.prod(sizes) <= max_elements).map(tuple)


@st.composite
def levels(draw: st.DrawFn, /, bits: int) -> tuple[float, ...]:
    """A codebook for ``QuantSpec(levels=...)``: ``2**bits`` rising numbers, 0 inside, 1 or -1 the farthest from it."""
    count = 2**bits - 1
    below = draw(st.integers(1, count - 1))
    sides = [_rising(draw, number) for number in (below, count - below)]
    return (*(-level for level in reversed(sides[0])), 0.0, *sides[1])


def _rising(draw: st.DrawFn, count: int) -> list[float]:
    """That many numbers between 0 and 1, the last one 1."""
    inner = st.lists(st.integers(1, _LEVEL_GRID - 1), min_size=count - 1, max_size=count - 1, unique=True)
    return [step / _LEVEL_GRID for step in (*sorted(draw(inner)), _LEVEL_GRID)]


@st.composite
def specs(draw: st.DrawFn, /, scale_dtypes: Sequence[torch.dtype | None] = (None, *FLOATS), **fixed: Any) -> QuantSpec:
    """Any spec for a weight: all widths, granularities, with and without zero points, levels, all scale dtypes.

    Args:
        draw: brought by Hypothesis.
        scale_dtypes: the dtypes of scales; None stands for the weight's own.
        fixed: fields of `QuantSpec` that are not drawn.
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
    # Large codebooks take long to draw and are made like small ones.
    if "levels" not in fixed and fields["symmetric"] and fields["bits"] <= 4 and draw(st.booleans()):
        fields["levels"] = draw(levels(fields["bits"]))
    return QuantSpec(**fields)


def numbers(dtype: torch.dtype, limit: float | None = None) -> st.SearchStrategy[float]:
    """Numbers of a floating dtype: near one, of any magnitude, and at its edges.

    Args:
        dtype: floating.
        limit: the largest magnitude; None stands for the largest number of the dtype.
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
    """A contiguous floating tensor: random or constant, perhaps with one outlier, zero rows, or one sign only."""
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
    draw: st.DrawFn,
    /,
    dtypes: Sequence[torch.dtype] = FLOATS,
    min_dims: int = 2,
    max_dims: int = 5,
    limit: float | None = None,
    max_elements: int = 120,
) -> Tensor:
    """A finite floating tensor with at least one element, of any shape, strides and content.

    Args:
        draw: brought by Hypothesis.
        dtypes: floating dtypes to choose from.
        min_dims: how many axes at least, from 1.
        max_dims: how many at most.
        limit: the largest magnitude; None stands for the largest number of the dtype.
        max_elements: how many elements at most.
    """
    shape = draw(shapes(min_dims, max_dims, max_elements))
    return draw(restrided(draw(contents(shape, draw(st.sampled_from(dtypes)), limit))))


@st.composite
def tensors(draw: st.DrawFn, /, dtypes: Sequence[torch.dtype] = (*FLOATS, *OTHER_DTYPES)) -> Tensor:
    """Any tensor that a checkpoint may hold: of every dtype, also empty, also without axes, also with NaN and Inf."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.one_of(shapes(0, 4), st.sampled_from([(), (0,), (3, 0), (0, 2, 5)])))
    generator = torch.Generator().manual_seed(draw(seeds))
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    # Any bits will do, but for bools, whose byte is 0 or 1.
    tensor = ((raw & 1).bool() if dtype == torch.bool else raw.view(dtype)).reshape(shape)
    return draw(restrided(tensor)) if shape and tensor.numel() and dtype != torch.bool else tensor


@st.composite
def layouts(draw: st.DrawFn, /, shape: tuple[int, ...]) -> Layout:
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
def problems(
    draw: st.DrawFn,
    /,
    dtypes: Sequence[torch.dtype] = FLOATS,
    relative_limit: float = 1.0,
    max_elements: int = 120,
    **fixed: Any,
) -> tuple[Tensor, QuantSpec, Layout]:
    """A weight, a spec, and a layout for it.

    Args:
        draw: brought by Hypothesis.
        dtypes: of the weight.
        relative_limit: the largest magnitude, as a share of what both the weight's dtype and its scales' can hold.
        max_elements: how many elements at most.
        fixed: arguments of `specs`.
    """
    dtype = draw(st.sampled_from(dtypes))
    spec = draw(specs(**fixed))
    limit = relative_limit * min(torch.finfo(d).max for d in (dtype, spec.scale_dtype or dtype))
    weight = draw(weights((dtype,), min_dims=1, limit=limit, max_elements=max_elements))
    return weight, spec, draw(layouts(tuple(weight.shape)))


def rounded(x: float, dtype: torch.dtype) -> float:
    """The number of a dtype that is nearest to `x`."""
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()
