"""The observer under test, and the checks of what it learns from inputs."""

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

from fewbits.errors import CalibrationError, NumericsError
from fewbits.numerics.affine import check_params
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.testing.check import Contract, expect, fail, for_all
from fewbits.testing.environment import snapshot
from fewbits.testing.strategies import weights

_FRESH = Contract("fewbits.extend.Observer.fresh", "A copy of this recipe that has seen nothing.")
_NEEDS = Contract(
    "fewbits.extend.Observer", "whether `observe_input` must have seen a layer's inputs before its weight is"
)
_INPUTS = Contract(
    "fewbits.extend.Observer.input_params", "positive; and zero point, int32, (1,), or None if the spec is"
)
_NOTHING = Contract(
    "fewbits.extend.Observer.input_params", "if nothing was seen, or this observer does not look at inputs"
)
_MERGED = Contract("fewbits.extend.Observer.merge", "as if this one had seen it too")
_SMALL = Contract("fewbits.testing.check_observer", "What it keeps of the inputs does not grow with their number.")

#: Batches of which the state may be kept, and batches after which it must not have grown.
_FEW, _MANY = 5, 200

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


def resolved(spec: QuantSpec) -> QuantSpec:
    """The spec with scales in float32."""
    return attrs.evolve(spec, scale_dtype=torch.float32)


def fresh_forgets(setup: ObserverSetup) -> None:
    """`fresh` gives a copy that has seen nothing, and leaves the one it is called on as it is."""

    def forgets(spec: QuantSpec, ones: list[Tensor], others: list[Tensor]) -> None:
        used = setup.shown(ones)
        before = asked(used, spec)
        copy = used.fresh()
        expect(copy is not used, "fresh() returns the observer itself, not a copy", _FRESH)
        for batch in others:
            copy.observe_input(batch)
        expect(asked(copy, spec) == asked(setup.shown(others), spec), "a fresh copy remembers inputs", _FRESH)
        expect(asked(used, spec) == before, "what a fresh copy has seen changes the one it was made from", _FRESH)

    small, large = [inputs(COLUMNS, 1)], [inputs(COLUMNS, 2) * 3]
    # What is forgotten hardly depends on the spec.
    for ones, others in ((small, large), (large, small)):
        for_all(1 + setup.examples // 10, forgets, setup.specs, st.just(ones), st.just(others))


def needs_data_is_true(setup: ObserverSetup) -> None:
    """With `needs_data` the inputs make a difference to the scales of weights; without it they make none."""
    # Inputs that differ in everything: size, balance of the columns, number.
    shown = [inputs(COLUMNS, 1)], [inputs(COLUMNS, seed) * torch.logspace(-2, 2, COLUMNS) for seed in range(3)]
    differences = 0

    def count(spec: QuantSpec) -> None:
        nonlocal differences
        one, other = (bits(setup.shown(batches).observe_weight(normal_weight(), resolved(spec))) for batches in shown)
        differences += one != other

    for_all(setup.examples, count, setup.specs)
    if setup.recipe.needs_data:
        expect(differences > 0, "it says that it needs data, and inputs make no difference to any scale", _NEEDS)
    else:
        expect(differences == 0, "inputs change its scales of weights; set needs_data = True", _NEEDS)


def inputs_get_one_positive_scale(setup: ObserverSetup) -> None:
    """`input_params` gives a positive scale for any inputs, or `CalibrationError` for all."""
    if not picks_for_inputs(setup):
        return
    for spec in (input_spec(symmetric=True), input_spec(symmetric=False)):
        try:
            setup.recipe.fresh().input_params(spec)
        except CalibrationError:
            continue
        fail("it picks a scale for inputs before it has seen any", _NOTHING)

    def positive(x: Tensor, symmetric: bool) -> None:
        spec = input_spec(symmetric)
        scale, zero_point = setup.shown([x]).input_params(spec)
        try:
            check_params(scale, zero_point, spec.for_dtype(torch.float32), (1, 1))
        except NumericsError as error:
            fail(f"inputs of shape {tuple(x.shape)} in {dtype_name(x.dtype)}: {error}", _INPUTS)
        expect(bool(scale > 0), f"the scale of inputs is {float(scale)}", _INPUTS)

    limit = torch.finfo(torch.float32).max / 16
    for_all(setup.examples, positive, weights(min_dims=1, max_dims=4, limit=limit), st.booleans())


def merging_equals_seeing_all(setup: ObserverSetup) -> None:
    """A copy that takes in what another has seen ends up as if it had seen it; or merging is refused."""
    small, large = [inputs(COLUMNS, 1), inputs(COLUMNS, 2)], [inputs(COLUMNS, 3) * 2, inputs(COLUMNS, 4)]
    for first, second in ((small, large), (large, small)):
        _check_merged(setup, first, second)


def it_keeps_little(setup: ObserverSetup) -> None:
    """What it holds after many inputs is no larger than after a few."""
    few, many = (size(setup.shown([inputs(COLUMNS, seed) for seed in range(count)])) for count in (_FEW, _MANY))
    limit = few * 1.5 + 1024
    expect(many <= limit, f"it holds {few:,} bytes after {_FEW} inputs, {many:,} bytes after {_MANY}", _SMALL)


def _check_merged(setup: ObserverSetup, first: list[Tensor], second: list[Tensor]) -> None:
    merged, other, both = setup.shown(first), setup.shown(second), setup.shown(first + second)
    spec = QuantSpec(bits=8, granularity="channel")
    before = asked(other, spec)
    try:
        merged.merge(other)
    except CalibrationError:
        return
    expect(asked(other, spec) == before, "merge() changes what it takes in", _MERGED)
    for found, expected in zip(answers(merged, spec), answers(both, spec), strict=True):
        near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
        expect(near, f"merged it gives scales up to {float(found.max()):.6g}, not {float(expected.max()):.6g}", _MERGED)


INPUT_CHECKS = (
    fresh_forgets,
    needs_data_is_true,
    inputs_get_one_positive_scale,
    merging_equals_seeing_all,
    it_keeps_little,
)
