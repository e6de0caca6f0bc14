"""The observer under test, and the checks of its behaviour on inputs."""

from __future__ import annotations

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
from fewbits.testing.check import Setup, expect, expect_error, fail, for_all
from fewbits.testing.strategies import weights

#: The state after many batches must not be larger than after few.
_FEW, _MANY = 5, 200

#: Number of columns of the weights and inputs that are not drawn.
COLUMNS = 32


@attrs.frozen
class ObserverSetup(Setup[Observer]):
    """An observer to check.

    Attributes:
        specs: The specs that the observer supports.
    """

    specs: st.SearchStrategy[QuantSpec]

    def shown(self, batches: list[Tensor]) -> Observer:
        """Copy the observer, and show it these inputs, which it must not change."""
        observer = self.make().fresh()
        for batch in batches:
            before = batch.clone()
            observer.observe_input(batch)
            expect(torch.equal(batch, before), f"an input of shape {tuple(batch.shape)} is written to")
        return observer

    def ready(self, columns: int) -> Observer:
        """Copy the observer, ready for weights with this many columns."""
        return self.shown([inputs(columns, seed) for seed in range(2)] if self.recipe.needs_data else [])


def inputs(columns: int, seed: int) -> Tensor:
    """Draw an input of a Linear layer: (8, columns)."""
    return torch.randn(8, columns, generator=torch.Generator().manual_seed(seed))


def normal_weight() -> Tensor:
    """Draw a weight of shape (8, 32) from a normal distribution."""
    return inputs(COLUMNS, 3)


def input_spec(symmetric: bool) -> QuantSpec:
    """Make a spec for inputs."""
    return QuantSpec(bits=8, granularity="tensor", symmetric=symmetric)


def answers(observer: Observer, spec: QuantSpec) -> list[Tensor]:
    """Return the scales of a weight, and of inputs if the observer chooses them."""
    scales = [observer.observe_weight(normal_weight(), spec.for_dtype(torch.float32)).scale]
    try:
        return [*scales, observer.input_params(input_spec(symmetric=True)).scale]
    except CalibrationError:
        return scales


def numbers(params: QuantParams) -> list[Any]:
    """Make scale and zero point comparable."""
    return [part.tolist() for part in (params.scale, params.zero_point) if part is not None]


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


def fresh_forgets(setup: ObserverSetup) -> None:
    """`Observer.fresh` returns a copy that has seen no input, and does not change the observer."""

    def asked(observer: Observer, spec: QuantSpec) -> list[Any]:
        return [scale.tolist() for scale in answers(observer, spec)]

    def forgets(spec: QuantSpec, ones: list[Tensor], others: list[Tensor]) -> None:
        used = setup.shown(ones)
        before = asked(used, spec)
        copy = used.fresh()
        expect(copy is not used, "fresh() returns the observer itself, not a copy")
        for batch in others:
            copy.observe_input(batch)
        expect(asked(copy, spec) == asked(setup.shown(others), spec), "a fresh copy remembers inputs")
        expect(asked(used, spec) == before, "inputs of a fresh copy change the original")

    small, large = [inputs(COLUMNS, 1)], [inputs(COLUMNS, 2) * 3]
    # Forgetting hardly depends on the spec, so few examples are enough.
    for ones, others in ((small, large), (large, small)):
        for_all(1 + setup.examples // 10, forgets, setup.specs, st.just(ones), st.just(others))


def needs_data_is_true(setup: ObserverSetup) -> None:
    """Inputs change the scales of weights if, and only if, `Observer.needs_data` is set."""
    # Inputs that differ in everything: size, balance of the columns, number.
    shown = [inputs(COLUMNS, 1)], [inputs(COLUMNS, seed) * torch.logspace(-2, 2, COLUMNS) for seed in range(3)]
    differences = 0

    def count(spec: QuantSpec) -> None:
        nonlocal differences
        spec = spec.for_dtype(torch.float32)
        one, other = (numbers(setup.shown(batches).observe_weight(normal_weight(), spec)) for batches in shown)
        differences += one != other

    for_all(setup.examples, count, setup.specs)
    if setup.recipe.needs_data:
        expect(differences > 0, "needs_data is set, but inputs change no scale")
    else:
        expect(differences == 0, "inputs change its scales of weights; set needs_data = True")


def inputs_get_one_positive_scale(setup: ObserverSetup) -> None:
    """`Observer.input_params` gives a positive scale for any inputs, or `CalibrationError` for all.

    It raises `CalibrationError` before any input was seen.
    """
    try:
        setup.shown([inputs(COLUMNS, 1)]).input_params(input_spec(symmetric=True))
    except CalibrationError:
        return  # The observer does not choose scales for inputs.

    def positive(x: Tensor, symmetric: bool) -> None:
        spec = input_spec(symmetric)
        expect_error(
            CalibrationError, "input_params() before it has seen any", lambda: setup.make().fresh().input_params(spec)
        )
        params = setup.shown([x]).input_params(spec)
        try:
            check_params(params, spec.for_dtype(torch.float32), (1, 1))
        except NumericsError as error:
            fail(f"inputs of shape {tuple(x.shape)} in {dtype_name(x.dtype)}: {error}")
        expect(bool(params.scale > 0), f"the scale of inputs is {float(params.scale)}")

    limit = torch.finfo(torch.float32).max / 16
    for_all(setup.examples, positive, weights(min_dims=1, max_dims=4, limit=limit), st.booleans())


def merging_equals_seeing_all(setup: ObserverSetup) -> None:
    """`Observer.merge` equals seeing the inputs of both observers, or is refused with `CalibrationError`.

    It does not change the other observer.
    """
    small, large = [inputs(COLUMNS, 1), inputs(COLUMNS, 2)], [inputs(COLUMNS, 3) * 2, inputs(COLUMNS, 4)]
    spec = QuantSpec(bits=8, granularity="channel")
    for first, second in ((small, large), (large, small)):
        merged, other = setup.shown(first), setup.shown(second)
        before = answers(other, spec)
        try:
            merged.merge(other)
        except CalibrationError:
            return
        unchanged = all(map(torch.equal, answers(other, spec), before))
        expect(unchanged, "merge() changes its argument")
        for found, expected in zip(answers(merged, spec), answers(setup.shown(first + second), spec), strict=True):
            near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
            expect(near, f"merged it gives scales up to {float(found.max()):.6g}, not {float(expected.max()):.6g}")


def it_keeps_little(setup: ObserverSetup) -> None:
    """The state of an observer after many inputs is no larger than after a few."""
    few, many = (size(setup.shown([inputs(COLUMNS, seed) for seed in range(count)])) for count in (_FEW, _MANY))
    limit = few * 1.5 + 1024
    expect(many <= limit, f"it holds {few:,} bytes after {_FEW} inputs, {many:,} bytes after {_MANY}")
