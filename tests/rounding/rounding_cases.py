"""Weights, inputs and specs for the tests of rounding strategies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits import QuantSpec
from fewbits.extend import Layout, WeightMatrix
from fewbits.observers.min_max import MinMaxObserver
from fewbits.rounding import ROUNDINGS, Rounding
from fewbits.rounding.base import RowInputs
from fewbits.rounding.statistics import InputStatistics

LEVELS = (-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.0)

SPECS = {
    "int4 groups": QuantSpec(bits=4, granularity="group", group_size=8, scale_dtype=torch.float16),
    "int3 ragged groups": QuantSpec(bits=3, granularity="group", group_size=10),
    "asymmetric": QuantSpec(bits=4, granularity="group", group_size=16, symmetric=False),
    "two levels of scales": QuantSpec(bits=4, granularity="group", group_size=8, scale_bits=4),
    "channel": QuantSpec(bits=4, granularity="channel"),
    "tensor": QuantSpec(bits=6, granularity="tensor"),
    "levels": QuantSpec(bits=3, granularity="group", group_size=8, levels=LEVELS, scale_dtype=torch.bfloat16),
}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs of the quantized model, inputs of the float model); inputs are correlated, some always zero."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, columns))
    mix = torch.randn(rank, columns, generator=generator) * torch.rand(columns, generator=generator) ** 4
    x = torch.randn(draw(st.integers(64, 400)), rank, generator=generator) @ mix
    y = x + draw(st.sampled_from([0.0, 0.3])) * torch.randn(x.shape, generator=generator)
    if draw(st.booleans()):
        x[:, torch.rand(columns, generator=generator) < 0.3] = 0
    weight = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e4]))
    return weight, x, y


def statistics(rounding: Rounding, x: Tensor, y: Tensor | None = None) -> list[RowInputs]:
    """The statistics that a strategy needs, for all rows."""
    if rounding.needs == "nothing":
        return []
    known = InputStatistics(x.shape[1], rounding.needs)
    known.add(x, y)
    return [RowInputs(slice(0, 1 << 30), known)]


def rounded(rounding: Rounding, weight: Tensor, spec: QuantSpec, inputs: list[RowInputs]) -> Tensor:
    """The numbers that the codes of a strategy decode to."""
    matrix = WeightMatrix(weight, Layout.of(weight.shape))
    return rounding.quantize(matrix, rounding.spec_for(spec), MinMaxObserver(), inputs).dequantize(torch.float64)


STRATEGIES = [cls() for cls in ROUNDINGS.values()]
NEEDING_DATA = [rounding for rounding in STRATEGIES if rounding.needs != "nothing"]
