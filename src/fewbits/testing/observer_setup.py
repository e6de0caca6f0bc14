"""What the checks of observers work with: copies, inputs, weights, and what is seen of an answer."""

from __future__ import annotations

import copy
import io
import pickle
import types
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import CalibrationError
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.testing.environment import snapshot
from fewbits.testing.strategies import FLOATS, layouts, weights

#: Inputs of the layers whose inputs are shown.
COLUMNS = 32

Params = tuple[Tensor, Tensor | None]


@attrs.frozen
class ObserverSetup:
    """An observer to check.

    Attributes:
        recipe: the one that was given; never used itself.
        specs: for which it is made.
        examples: how many a check that draws them looks at.
    """

    recipe: Observer
    specs: st.SearchStrategy[QuantSpec]
    examples: int

    def shown(self, batches: list[Tensor]) -> Observer:
        """A copy that has seen these inputs."""
        observer = copy.deepcopy(self.recipe).fresh()
        for batch in batches:
            observer.observe_input(batch)
        return observer

    def ready(self, columns: int) -> Observer:
        """A copy that can be asked about weights with this many columns."""
        return self.shown([inputs(columns, seed) for seed in range(2)] if self.recipe.needs_data else [])


def inputs(columns: int, seed: int) -> Tensor:
    """An input of a Linear layer: (8, columns)."""
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(seed))


def normal_weight() -> Tensor:
    """(8, 32), from a normal distribution."""
    return torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(3))


@st.composite
def cases(
    draw: st.DrawFn, specs: st.SearchStrategy[QuantSpec], relative_limit: float = 1.0
) -> tuple[Tensor, QuantSpec]:
    """Rows of a weight as an observer is shown them, and a spec."""
    dtype = draw(st.sampled_from(FLOATS))
    spec = draw(specs).for_dtype(dtype)
    limit = relative_limit * min(torch.finfo(d).max for d in (dtype, spec.scale_dtype or dtype))
    weight = draw(weights((dtype,), min_dims=1, limit=limit))
    rows = WeightMatrix(weight, draw(layouts(tuple(weight.shape)))).whole()
    return rows if spec.granularity == "tensor" else rows.to(compute_dtype(dtype)), spec


def resolved(spec: QuantSpec) -> QuantSpec:
    """The spec with scales in float32."""
    return attrs.evolve(spec, scale_dtype=torch.float32)


def words(case: tuple[Tensor, QuantSpec]) -> str:
    """What a case is, for a message."""
    rows, spec = case
    return f"{spec}, {rows.shape[0]} rows of {rows.shape[1]} in {dtype_name(rows.dtype)}"


def input_spec(symmetric: bool) -> QuantSpec:
    """How inputs are to be rounded."""
    return QuantSpec(bits=8, granularity="tensor", symmetric=symmetric)


def picks_for_inputs(setup: ObserverSetup) -> bool:
    """Whether it picks scales for inputs that it has seen."""
    try:
        setup.shown([inputs(COLUMNS, 1)]).input_params(input_spec(symmetric=True))
    except CalibrationError:
        return False
    return True


def answers(observer: Observer, spec: QuantSpec) -> list[Tensor]:
    """The scales that an observer picks for a weight, and for inputs if it does."""
    scales = [observer.observe_weight(normal_weight(), resolved(spec))[0]]
    try:
        return [*scales, observer.input_params(input_spec(symmetric=True))[0]]
    except CalibrationError:
        return scales


def asked(observer: Observer, spec: QuantSpec) -> list[Any]:
    """The same, bit for bit."""
    return [bits((scale, None)) for scale in answers(observer, spec)]


def bits(params: Params) -> object:
    """Scale and zero point as something to compare."""
    scale, zero_point = params
    return snapshot({"scale": scale} | ({} if zero_point is None else {"zero_point": zero_point.to(torch.int64)}))


class _Pickler(pickle.Pickler):
    """Pickles what an object holds; code is named, so that classes need not be importable."""

    def persistent_id(self, value: object) -> str | None:
        """A name in the place of code."""
        return repr(value) if isinstance(value, (type, types.FunctionType, types.ModuleType)) else None


def size(observer: Observer) -> int:
    """The bytes that an observer holds."""
    stream = io.BytesIO()
    _Pickler(stream).dump(observer)
    return stream.tell()
