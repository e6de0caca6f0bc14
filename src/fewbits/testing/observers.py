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
from fewbits.numerics.params import check_params
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, checks_of, copy_of, expect, fail, for_all
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.observer_inputs import COLUMNS, ObserverSetup, normal_weight, numbers
from fewbits.testing.strategies import FLOATS, layouts, weights
from fewbits.testing.strategies import specs as any_spec
from fewbits.validation.report import CRITICAL_DB


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
    return checks_of(setup, __name__, "fewbits.testing.observer_inputs")


def scales_fit_the_spec(setup: ObserverSetup) -> None:
    """`Observer.observe_weight` gives scales and zero points with the shape, dtype and range of the spec.

    A `RangeError` is right only for numbers larger than a sixteenth of the largest number in the dtype of the scales.
    """

    def fit(case: tuple[Tensor, QuantSpec]) -> None:
        rows, spec = case
        try:
            check_params(setup.ready(rows.shape[1]).observe_weight(rows, spec), spec, (rows.shape[0], rows.shape[1]))
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

    def alone(case: tuple[Tensor, QuantSpec]) -> None:
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
