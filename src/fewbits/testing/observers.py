"""`check_observer`: check an observer against the promises of `Observer`."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import NumericsError, RangeError
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.metrics import measure
from fewbits.numerics.params import QuantParams, check_params
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, Contract, check_functions, checks, copy_of, expect, fail, for_all
from fewbits.testing.environment import snapshot
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.observer_inputs import COLUMNS, ObserverSetup, bits, inputs, normal_weight, resolved
from fewbits.testing.strategies import FLOATS, layouts, seeds, weights
from fewbits.testing.strategies import specs as any_spec
from fewbits.validation.report import CRITICAL_DB

_SCALES = Contract("fewbits.extend.Observer.observe_weight", "finite and not zero")
_READ_ONLY = Contract("fewbits.extend.Observer.observe_weight", "Do not write to `weight`")
_RANGE = Contract("fewbits.testing.check_observer", "A scale may be out of range only for numbers larger than")
_ALONE = Contract("fewbits.testing.check_observer", "The scales of a row depend on that row and the inputs alone.")
_USEFUL = Contract("fewbits.testing.check_observer", "at most 10 dB below that of `MinMaxObserver`")


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
        observer: a new observer.
        specs: a Hypothesis strategy for the specs that it supports; by default all, ``fewbits.testing.specs()``.
        max_examples: number of examples that a check draws.

    Raises:
        ArgumentError: if `observer` is not an instance of `Observer`.
    """
    recipe = copy_of(observer, Observer, "check_observer")
    setup = ObserverSetup(recipe, any_spec() if specs is None else specs, max_examples)
    return checks(observer, check_functions(__name__, "fewbits.testing.observer_inputs"), setup)


def scales_fit_the_spec(setup: ObserverSetup) -> None:
    """Scales and zero points of any weight have the shape, dtype and range of the spec."""

    def fit(case: tuple[Tensor, QuantSpec]) -> None:
        rows, spec = case
        try:
            params = setup.ready(rows.shape[1]).observe_weight(rows, spec)
        except RangeError as error:
            largest, limit = float(rows.abs().max()), torch.finfo(spec.scale_dtype or rows.dtype).max / 16
            expect(largest > limit, f"{words(case)} of magnitude {largest:.4g} is refused: {error}", _RANGE)
            return
        try:
            check_params(params, spec, (rows.shape[0], rows.shape[1]))
        except NumericsError as error:
            fail(f"{words(case)}: {error}", _SCALES)

    for_all(setup.examples, fit, cases(setup.specs))


def rows_stand_alone(setup: ObserverSetup) -> None:
    """A row gets the same scales again, and in a block of its own."""

    def alone(case: tuple[Tensor, QuantSpec]) -> None:
        rows, spec = case
        observer = setup.ready(rows.shape[1])
        whole = observer.observe_weight(rows, spec)
        again = observer.observe_weight(rows, spec)
        expect(bits(again) == bits(whole), f"{words(case)}: a second call gives other scales", _ALONE)
        if spec.granularity != "tensor":
            each = [observer.observe_weight(row.unsqueeze(0), spec) for row in rows.unbind()]
            zero_points = [one.zero_point for one in each if one.zero_point is not None]
            scale = torch.cat([one.scale for one in each])
            joined = QuantParams(scale, torch.cat(zero_points) if zero_points else None)
            expect(bits(joined) == bits(whole), f"{words(case)}: row by row it gives other scales", _ALONE)

    for_all(setup.examples, alone, cases(setup.specs, 1 / 16))


def nothing_is_written_to(setup: ObserverSetup) -> None:
    """The observer changes neither a weight nor an input."""

    def unchanged(case: tuple[Tensor, QuantSpec], seed: int) -> None:
        # A copy, because torch itself refuses writes to some views.
        rows, spec = case[0].clone(memory_format=torch.contiguous_format), case[1]
        x = inputs(rows.shape[1], seed)
        before = snapshot({"weight": rows, "input": x})
        setup.shown([x]).observe_weight(rows, spec)
        expect(snapshot({"weight": rows, "input": x}) == before, f"{words(case)} is written to", _READ_ONLY)

    for_all(setup.examples, unchanged, cases(setup.specs, 1 / 16), seeds)


def it_is_of_use(setup: ObserverSetup) -> None:
    """Normally distributed weights have about the SQNR of `MinMaxObserver`."""

    def useful(spec: QuantSpec) -> None:
        spec, weight = resolved(spec), normal_weight()
        found = measure(weight, quantize(weight, spec, setup.ready(COLUMNS).observe_weight)).sqnr_db
        plain = measure(weight, quantize(weight, spec, MinMaxObserver().observe_weight)).sqnr_db
        limit = min(plain - 10, CRITICAL_DB)
        expect(found >= limit, f"normal weights in {spec} have {found:.1f} dB, below {limit:.1f} dB", _USEFUL)

    for_all(setup.examples, useful, setup.specs)


def a_model_can_be_quantized_with_it(setup: ObserverSetup) -> None:
    """A quantizer with this observer reaches a report without failures."""
    types = ["Linear"] if setup.recipe.needs_data else []
    quantizer = Int8PerChannel(observer=setup.recipe, selector=LayerSelector(include_types=types, min_elements=1))
    quantizer.prepare(SmallModel())
    quantizer.observe([ids(seed) for seed in range(2)])
    quantizer.convert()
    report = quantizer.validate(on_failure="ignore", fail_under=-math.inf)
    expect(report.ok, f"validate found: {'; '.join(report.failures)}", _SCALES)


@st.composite
def cases(
    draw: st.DrawFn, specs: st.SearchStrategy[QuantSpec], relative_limit: float = 1.0
) -> tuple[Tensor, QuantSpec]:
    """Draw rows of a weight in the form that an observer sees, and a spec."""
    dtype = draw(st.sampled_from(FLOATS))
    spec = draw(specs).for_dtype(dtype)
    limit = relative_limit * min(torch.finfo(d).max for d in (dtype, spec.scale_dtype or dtype))
    weight = draw(weights((dtype,), min_dims=1, limit=limit))
    rows = WeightMatrix(weight, draw(layouts(tuple(weight.shape)))).whole()
    return rows if spec.granularity == "tensor" else rows.to(compute_dtype(dtype)), spec


def words(case: tuple[Tensor, QuantSpec]) -> str:
    """Describe a case, for messages."""
    rows, spec = case
    return f"{spec}, {rows.shape[0]} rows of {rows.shape[1]} in {dtype_name(rows.dtype)}"
