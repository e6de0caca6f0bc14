"""`check_observer`: check an observer against the promises of `Observer`."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import CalibrationError, NumericsError, RangeError
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import measure
from fewbits.numerics.params import QuantParams, check_params
from fewbits.numerics.quantize import check_chosen, quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, Setup, checks_of, copy_of, expect, expect_error, fail, for_all
from fewbits.testing.environment import state_bytes
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.strategies import problems, weights
from fewbits.testing.strategies import specs as any_spec
from fewbits.validation.tensors import CRITICAL_DB

#: The state after many batches must not be larger than after few.
_FEW, _MANY = 5, 200

#: Number of columns of the weights and inputs that are not drawn.
COLUMNS = 32

#: Rows of a weight in the form that an observer sees, and a spec.
Case = tuple[Tensor, QuantSpec]


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


def check_observer(
    observer: Observer, *, specs: st.SearchStrategy[QuantSpec] | None = None, max_examples: int = EXAMPLES
) -> list[Check]:
    """Make the checks of an observer.

    The observer sees inputs of Linear layers: floating, (samples, columns).

    Beyond the docstrings of `Observer`, the checks require:

    - The scales of a row depend on that row and the inputs alone. A weight comes in blocks of any number of rows.
    - A scale may be out of range only for numbers larger than a sixteenth of the largest number of its dtype.
    - Its state does not grow with the number of inputs.
    - On weights from a normal distribution, the SQNR is at most 10 dB below that of `MinMaxObserver`, or above the
      10 dB below which a tensor fails.
    - Scales after a merge agree to five digits with those of one observer that has seen all inputs.

    Args:
        observer: A new observer.
        specs: A Hypothesis strategy for the specs that the observer supports; by default all specs,
            ``fewbits.testing.specs()``.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `observer` is not an instance of `Observer`.
    """
    recipe = copy_of(observer, Observer, "check_observer")
    setup = ObserverSetup(recipe, max_examples, any_spec() if specs is None else specs)
    return checks_of(setup, __name__)


def scales_fit_the_spec(setup: ObserverSetup) -> None:
    """`Observer.observe_weight` gives scales and zero points with the shape, dtype and range of the spec.

    A `RangeError` is right only for numbers larger than a sixteenth of the largest number in the dtype of the scales.
    """

    def fit(case: Case) -> None:
        rows, spec = case
        try:
            check_chosen(setup.ready(rows.shape[1]).observe_weight(rows, spec), spec, (rows.shape[0], rows.shape[1]))
        except RangeError as error:
            largest, limit = float(rows.abs().max()), torch.finfo(spec.scale_dtype or rows.dtype).max / 16
            expect(largest > limit, f"{words(case)} of magnitude {largest:.4g} is refused: {error}")
        except NumericsError as error:
            fail(f"{words(case)}: {error}")

    for_all(setup.examples, fit, cases(setup.specs))


def rows_stand_alone(setup: ObserverSetup) -> None:
    """`Observer.observe_weight` gives a row the same scales again, and in a block of its own.

    It does not write to the weight.
    """

    def alone(case: Case) -> None:
        # A copy, because torch itself refuses writes to some views.
        rows, spec = case[0].clone(memory_format=torch.contiguous_format), case[1]
        observer = setup.ready(rows.shape[1])
        whole = observer.observe_weight(rows, spec)
        expect(torch.equal(rows, case[0]), f"{words(case)} is written to")
        again = observer.observe_weight(rows, spec)
        expect(numbers(again) == numbers(whole), f"{words(case)}: a second call gives other scales")
        if spec.granularity != "tensor":
            each = [numbers(observer.observe_weight(row.unsqueeze(0), spec)) for row in rows.unbind()]
            joined = [[row for part in parts for row in part] for parts in zip(*each, strict=True)]
            expect(joined == numbers(whole), f"{words(case)}: row by row it gives other scales")

    for_all(setup.examples, alone, cases(setup.specs, 1 / 16))


def it_is_of_use(setup: ObserverSetup) -> None:
    """Normally distributed weights have an SQNR at most 10 dB below that of `MinMaxObserver`, or above 10 dB."""

    def useful(spec: QuantSpec) -> None:
        spec, weight = spec.for_dtype(torch.float32), normal_weight()
        found = measure(weight, quantize(weight, spec, setup.ready(COLUMNS).observe_weight)).sqnr_db
        plain = measure(weight, quantize(weight, spec, MinMaxObserver().observe_weight)).sqnr_db
        limit = min(plain - 10, CRITICAL_DB)
        expect(found >= limit, f"normal weights in {spec} have {found:.1f} dB, below {limit:.1f} dB")

    for_all(setup.examples, useful, setup.specs)


def a_model_can_be_quantized_with_it(setup: ObserverSetup) -> None:
    """A quantizer with this observer reaches a report without failures."""
    types = ["Linear"] if setup.recipe.needs_data else []
    quantizer = Int8PerChannel(observer=setup.make(), selector=LayerSelector(include_types=types, min_elements=1))
    quantizer.prepare(SmallModel())
    quantizer.observe([ids(seed) for seed in range(2)])
    quantizer.convert()
    report = quantizer.validate(on_failure="ignore", fail_under=-math.inf)
    expect(report.ok, f"validate found: {'; '.join(report.failures)}")


def fresh_forgets(setup: ObserverSetup) -> None:
    """`Observer.fresh` returns a copy that has seen no input, and does not change the observer."""
    small, large = [inputs(COLUMNS, 1)], [inputs(COLUMNS, 2) * 3]

    def forgets(spec: QuantSpec) -> None:
        for ones, others in ((small, large), (large, small)):
            used = setup.shown(ones)
            before = answers(used, spec)
            copy = used.fresh()
            expect(copy is not used, "fresh() returns the observer itself, not a copy")
            for batch in others:
                copy.observe_input(batch)
            forgotten = all(map(torch.equal, answers(copy, spec), answers(setup.shown(others), spec)))
            expect(forgotten, "a fresh copy remembers inputs")
            expect(all(map(torch.equal, answers(used, spec), before)), "inputs of a fresh copy change the original")

    # Forgetting hardly depends on the spec, so few examples are enough.
    for_all(1 + setup.examples // 10, forgets, setup.specs)


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
        expect(all(map(torch.equal, answers(other, spec), before)), "merge() changes its argument")
        for found, expected in zip(answers(merged, spec), answers(setup.shown(first + second), spec), strict=True):
            near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
            expect(near, f"merged it gives scales up to {float(found.max()):.6g}, not {float(expected.max()):.6g}")


def it_keeps_little(setup: ObserverSetup) -> None:
    """The state of an observer after many inputs is no larger than after a few."""
    few, many = (state_bytes(setup.shown([inputs(COLUMNS, seed) for seed in range(count)])) for count in (_FEW, _MANY))
    limit = few * 1.5 + 1024
    expect(many <= limit, f"it holds {few:,} bytes after {_FEW} inputs, {many:,} bytes after {_MANY}")


def cases(specs: st.SearchStrategy[QuantSpec], relative_limit: float = 1.0) -> st.SearchStrategy[Case]:
    """Draw rows of a weight in the form that an observer sees, and a spec."""

    def seen(problem: tuple[Tensor, QuantSpec, Layout]) -> Case:
        weight, spec, layout = problem
        rows = WeightMatrix(weight, layout).whole()
        dtype = weight.dtype if spec.granularity == "tensor" else compute_dtype(weight.dtype)
        return rows.to(dtype), spec.for_dtype(weight.dtype)

    return problems(relative_limit=relative_limit, spec=specs).map(seen)


def words(case: Case) -> str:
    """Describe a case, for messages."""
    return f"{case[1]}, {case[0].shape[0]} rows of {case[0].shape[1]} in {dtype_name(case[0].dtype)}"
