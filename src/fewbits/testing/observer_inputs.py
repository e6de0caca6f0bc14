"""The observer under test, and the checks of its behaviour on inputs."""

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
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.params import QuantParams, check_params
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.testing.check import Contract, expect, fail, for_all
from fewbits.testing.environment import snapshot
from fewbits.testing.strategies import weights

_FRESH = Contract("fewbits.extend.Observer.fresh", "Return a copy of this recipe that has seen no input.")
_NEEDS = Contract(
    "fewbits.extend.Observer", "whether `observe_input` must have seen a layer's inputs before its weight is"
)
_INPUTS = Contract(
    "fewbits.extend.Observer.input_params", "positive; and zero point, int32, (1,), or None if the spec is"
)
_NOTHING = Contract(
    "fewbits.extend.Observer.input_params", "if no input was seen, or this observer does not observe inputs"
)
_MERGED = Contract("fewbits.extend.Observer.merge", "as if this observer had seen the inputs of both")
_SMALL = Contract("fewbits.testing.check_observer", "Its state does not grow with the number of inputs.")

#: The state after many batches must not be larger than after few.
_FEW, _MANY = 5, 200

#: Inputs of the layers whose inputs are shown.
COLUMNS = 32


@attrs.frozen
class ObserverSetup:
    """An observer to check.

    Attributes:
        recipe: the original observer; checks use copies.
        specs: the specs that it supports.
        examples: number of examples that a check draws.
    """

    recipe: Observer
    specs: st.SearchStrategy[QuantSpec]
    examples: int

    def shown(self, batches: list[Tensor]) -> Observer:
        """Copy the observer, and show it these inputs."""
        observer = copy.deepcopy(self.recipe).fresh()
        for batch in batches:
            observer.observe_input(batch)
        return observer

    def ready(self, columns: int) -> Observer:
        """Copy the observer, ready for weights with this many columns."""
        return self.shown([inputs(columns, seed) for seed in range(2)] if self.recipe.needs_data else [])

    def picks_for_inputs(self) -> bool:
        """Whether the observer chooses scales for inputs."""
        try:
            self.shown([inputs(COLUMNS, 1)]).input_params(input_spec(symmetric=True))
        except CalibrationError:
            return False
        return True


def inputs(columns: int, seed: int) -> Tensor:
    """Draw an input of a Linear layer: (8, columns)."""
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(seed))


def normal_weight() -> Tensor:
    """Draw a weight of shape (8, 32) from a normal distribution."""
    return torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(3))


def input_spec(symmetric: bool) -> QuantSpec:
    """Make a spec for inputs."""
    return QuantSpec(bits=8, granularity="tensor", symmetric=symmetric)


def answers(observer: Observer, spec: QuantSpec) -> list[Tensor]:
    """Return the scales of a weight, and of inputs if the observer chooses them."""
    scales = [observer.observe_weight(normal_weight(), resolved(spec)).scale]
    try:
        return [*scales, observer.input_params(input_spec(symmetric=True)).scale]
    except CalibrationError:
        return scales


def asked(observer: Observer, spec: QuantSpec) -> list[Any]:
    """Return these scales bit for bit."""
    return [bits(QuantParams(scale)) for scale in answers(observer, spec)]


def bits(params: QuantParams) -> object:
    """Make scale and zero point comparable."""
    scale, zero_point = params.scale, params.zero_point
    return snapshot({"scale": scale} | ({} if zero_point is None else {"zero_point": zero_point.to(torch.int64)}))


class _Pickler(pickle.Pickler):
    """Pickles the state of an object; code is named, so that classes need not be importable."""

    def persistent_id(self, value: object) -> str | None:
        """Name code instead of pickling it."""
        return repr(value) if isinstance(value, (type, types.FunctionType, types.ModuleType)) else None


def size(observer: Observer) -> int:
    """Count the bytes of the state of an observer."""
    stream = io.BytesIO()
    _Pickler(stream).dump(observer)
    return stream.tell()


def resolved(spec: QuantSpec) -> QuantSpec:
    """Resolve the spec with scales in float32."""
    return attrs.evolve(spec, scale_dtype=torch.float32)


def fresh_forgets(setup: ObserverSetup) -> None:
    """`fresh` returns a copy without inputs, and does not change the observer."""

    def forgets(spec: QuantSpec, ones: list[Tensor], others: list[Tensor]) -> None:
        used = setup.shown(ones)
        before = asked(used, spec)
        copy = used.fresh()
        expect(copy is not used, "fresh() returns the observer itself, not a copy", _FRESH)
        for batch in others:
            copy.observe_input(batch)
        expect(asked(copy, spec) == asked(setup.shown(others), spec), "a fresh copy remembers inputs", _FRESH)
        expect(asked(used, spec) == before, "inputs of a fresh copy change the original", _FRESH)

    small, large = [inputs(COLUMNS, 1)], [inputs(COLUMNS, 2) * 3]
    # Forgetting hardly depends on the spec, so few examples are enough.
    for ones, others in ((small, large), (large, small)):
        for_all(1 + setup.examples // 10, forgets, setup.specs, st.just(ones), st.just(others))


def needs_data_is_true(setup: ObserverSetup) -> None:
    """Inputs change the scales of weights if, and only if, `needs_data` is set."""
    # Inputs that differ in everything: size, balance of the columns, number.
    shown = [inputs(COLUMNS, 1)], [inputs(COLUMNS, seed) * torch.logspace(-2, 2, COLUMNS) for seed in range(3)]
    differences = 0

    def count(spec: QuantSpec) -> None:
        nonlocal differences
        one, other = (bits(setup.shown(batches).observe_weight(normal_weight(), resolved(spec))) for batches in shown)
        differences += one != other

    for_all(setup.examples, count, setup.specs)
    if setup.recipe.needs_data:
        expect(differences > 0, "needs_data is set, but inputs change no scale", _NEEDS)
    else:
        expect(differences == 0, "inputs change its scales of weights; set needs_data = True", _NEEDS)


def inputs_get_one_positive_scale(setup: ObserverSetup) -> None:
    """`input_params` gives a positive scale for any inputs, or `CalibrationError` for all."""
    if not setup.picks_for_inputs():
        return
    for spec in (input_spec(symmetric=True), input_spec(symmetric=False)):
        try:
            setup.recipe.fresh().input_params(spec)
        except CalibrationError:
            continue
        fail("it chooses a scale for inputs before it has seen any", _NOTHING)

    def positive(x: Tensor, symmetric: bool) -> None:
        spec = input_spec(symmetric)
        params = setup.shown([x]).input_params(spec)
        try:
            check_params(params, spec.for_dtype(torch.float32), (1, 1))
        except NumericsError as error:
            fail(f"inputs of shape {tuple(x.shape)} in {dtype_name(x.dtype)}: {error}", _INPUTS)
        expect(bool(params.scale > 0), f"the scale of inputs is {float(params.scale)}", _INPUTS)

    limit = torch.finfo(torch.float32).max / 16
    for_all(setup.examples, positive, weights(min_dims=1, max_dims=4, limit=limit), st.booleans())


def merging_equals_seeing_all(setup: ObserverSetup) -> None:
    """`merge` equals seeing the inputs of both observers, or is refused."""
    small, large = [inputs(COLUMNS, 1), inputs(COLUMNS, 2)], [inputs(COLUMNS, 3) * 2, inputs(COLUMNS, 4)]
    for first, second in ((small, large), (large, small)):
        _check_merged(setup, first, second)


def it_keeps_little(setup: ObserverSetup) -> None:
    """The state after many inputs is no larger than after a few."""
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
    expect(asked(other, spec) == before, "merge() changes its argument", _MERGED)
    for found, expected in zip(answers(merged, spec), answers(both, spec), strict=True):
        near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
        expect(near, f"merged it gives scales up to {float(found.max()):.6g}, not {float(expected.max()):.6g}", _MERGED)
