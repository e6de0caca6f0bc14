"""`check_rounding`: check a rounding strategy against the promises of `Rounding`."""

from __future__ import annotations

import math

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import NumericsError
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import measure
from fewbits.numerics.params import check_params
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.min_max import MinMaxObserver
from fewbits.quantizers.schemes import Int4Grouped
from fewbits.rounding.base import Rounding, RowInputs
from fewbits.rounding.statistics import InputStatistics
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, Setup, checks_of, copy_of, expect, fail, for_all
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.strategies import specs as any_spec

#: Rows and columns of the weights that are drawn.
ROWS, COLUMNS = 6, 24

#: Examples of a check that needs only one example to pass.
_MANY = 40

#: Share of the error of a row by which it may exceed that of plain rounding: errors may be compared in float32.
_TIE = 1e-4


@attrs.frozen
class RoundingSetup(Setup[Rounding]):
    """A rounding strategy to check.

    Attributes:
        specs: The specs that the strategy supports.
    """

    specs: st.SearchStrategy[QuantSpec]

    def inputs(self, seed: int, count: int = 200) -> InputStatistics | None:
        """Make the statistics that the strategy needs, of correlated inputs of different size."""
        if self.recipe.needs == "nothing":
            return None
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(-2, 1, COLUMNS).roll(seed)
        x = torch.randn(count, COLUMNS, generator=generator) @ mix
        statistics = InputStatistics(COLUMNS, self.recipe.needs)
        statistics.add(x, x + 0.1 * torch.randn(x.shape, generator=generator))
        return statistics

    def decoded(self, weight: Tensor, spec: QuantSpec, inputs: InputStatistics | None) -> Tensor:
        """Quantize and dequantize some rows."""
        known = [] if inputs is None else [RowInputs(slice(0, len(weight)), inputs)]
        matrix = WeightMatrix(weight, Layout.of(weight.shape))
        value = self.make().quantize(matrix, self.recipe.spec_for(spec), MinMaxObserver(), known)
        return value.dequantize(torch.float64)


def check_rounding(
    rounding: Rounding, *, specs: st.SearchStrategy[QuantSpec] | None = None, max_examples: int = EXAMPLES
) -> list[Check]:
    """Make the checks of a rounding strategy.

    Args:
        rounding: A new strategy.
        specs: A Hypothesis strategy for the specs that it supports; by default all specs, ``fewbits.testing.specs()``.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `rounding` is not an instance of `Rounding`.
    """
    recipe = copy_of(rounding, Rounding, "check_rounding")
    return checks_of(RoundingSetup(recipe, max_examples, any_spec() if specs is None else specs), __name__)


def parameters_and_codes_fit_the_spec(setup: RoundingSetup) -> None:
    """`Rounding.choose` gives parameters and codes that fit the spec, with data and without, and keeps the weight.

    If one scale serves the whole tensor, the scale stays.
    """

    def fit(weight: Tensor, spec: QuantSpec) -> None:
        spec = setup.recipe.spec_for(spec.for_dtype(torch.float32))
        for inputs in (setup.inputs(1), None):
            before, start = weight.clone(), MinMaxObserver().observe_weight(weight, spec)
            params, codes = setup.make().choose(weight, spec, start, inputs)
            expect(torch.equal(weight, before), f"a weight in {spec} is written to")
            try:
                check_params(params, spec, (ROWS, COLUMNS))
            except NumericsError as error:
                fail(f"in {spec}: {error}")
            kind = (codes.dtype, tuple(codes.shape))
            expect(kind == (torch.uint8, (ROWS, COLUMNS)), f"codes are {kind}, not uint8 of {(ROWS, COLUMNS)}")
            expect(int(codes.max()) < 2**spec.bits, f"a code of {spec} is {int(codes.max())}, not below {2**spec.bits}")
            if spec.granularity == "tensor":
                expect(torch.equal(params.scale, start.scale), "the scale of a whole tensor changes")

    for_all(setup.examples, fit, rows(), setup.specs)


def no_row_is_worse_than_plain_rounding(setup: RoundingSetup) -> None:
    """The `objective` of no row exceeds that of rounding to nearest with the observer's scales.

    `Rounding.error` computes the objective: it is finite, and not negative.
    """

    def compare(weight: Tensor, spec: QuantSpec) -> None:
        inputs, strategy = setup.inputs(1), setup.make()
        plain = quantize(weight, spec, MinMaxObserver().observe_weight).dequantize(torch.float64)
        found, limit = (
            strategy.error(weight, decoded, inputs) for decoded in (setup.decoded(weight, spec, inputs), plain)
        )
        expect(bool((found >= 0).all()) and bool(found.isfinite().all()), f"the error of a row in {spec} is {found}")
        slack = _TIE * limit + 1e-6 * strategy.error(weight, torch.zeros_like(weight), inputs)
        worse = (found > limit + slack).nonzero().flatten().tolist()
        expect(not worse, f"rows {worse} in {spec} have a larger error than with plain rounding")

    for_all(setup.examples, compare, rows(), setup.specs)


def elements_keep_the_bound_of_the_spec(setup: RoundingSetup) -> None:
    """Every element is within the error bound of `Rounding.spec_for`: half a step if `nearest` is set."""

    def bounded(weight: Tensor, spec: QuantSpec) -> None:
        inputs = setup.inputs(1)
        known = [] if inputs is None else [RowInputs(slice(0, ROWS), inputs)]
        matrix = WeightMatrix(weight, Layout.of(weight.shape))
        value = setup.make().quantize(matrix, setup.recipe.spec_for(spec), MinMaxObserver(), known)
        ratio = measure(weight, value).worst_bound_ratio
        expect(ratio <= 1, f"an element in {spec} is {ratio:.3g} times its bound away; is `nearest` right?")

    for_all(setup.examples, bounded, rows(), setup.specs)


def rows_stand_alone(setup: RoundingSetup) -> None:
    """A row gets the same codes again, and in a block of its own."""

    def alone(weight: Tensor, spec: QuantSpec) -> None:
        inputs = setup.inputs(1)
        whole = setup.decoded(weight, spec, inputs)
        expect(torch.equal(setup.decoded(weight, spec, inputs), whole), f"in {spec}, a second call gives other codes")
        if spec.granularity != "tensor":
            apart = torch.cat([setup.decoded(row.unsqueeze(0), spec, inputs) for row in weight.unbind()])
            expect(torch.equal(apart, whole), f"in {spec}, rows get other codes one by one")

    for_all(setup.examples, alone, rows(), setup.specs)


def needed_data_has_an_effect(setup: RoundingSetup) -> None:
    """If `Rounding.needs` names statistics, other inputs give other codes."""
    if setup.recipe.needs == "nothing":
        return
    differences = 0

    def count(weight: Tensor, spec: QuantSpec) -> None:
        nonlocal differences
        one, other = (setup.decoded(weight, spec, setup.inputs(seed)) for seed in (1, 9))
        differences += not torch.equal(one, other)

    # Some specs leave nothing to choose, such as one scale for the whole tensor.
    for_all(max(setup.examples, _MANY), count, rows(), setup.specs)
    expect(differences > 0, f"it needs {setup.recipe.needs!r}, but other inputs give the same codes")


def a_model_can_be_quantized_with_it(setup: RoundingSetup) -> None:
    """A quantizer with this strategy reaches a report without failures, and the ledger names the strategy."""
    selector = LayerSelector(include_types=["Linear"], min_elements=1)
    quantizer = Int4Grouped(8, rounding=setup.make(), selector=selector)
    quantizer.prepare(SmallModel())
    if setup.recipe.needs != "nothing":
        quantizer.observe([ids(seed) for seed in range(2)])
    quantizer.convert()
    report = quantizer.validate(on_failure="ignore", fail_under=-math.inf)
    expect(report.ok, f"validate found: {'; '.join(report.failures)}")
    named = type(setup.recipe).__name__
    reasons = [row.reason for row in quantizer.ledger if row.fate == "quantized"]
    expect(named == "RoundToNearest" or all(named in reason for reason in reasons), f"no row names {named}")


def rows() -> st.SearchStrategy[Tensor]:
    """Draw some rows of a weight, float32."""

    def drawn(seed: int, size: float) -> Tensor:
        return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * size

    return st.builds(drawn, st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 100.0]))
