"""The promises of all rounding strategies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_cases import NEEDING_DATA, SPECS, STRATEGIES, problems, rounded, statistics

from fewbits import QuantSpec
from fewbits.errors import ArgumentError, CalibrationError, NonFiniteError
from fewbits.extend import Layout, WeightMatrix
from fewbits.numerics.metrics import measure
from fewbits.observers.min_max import MinMaxObserver
from fewbits.rounding import GPTQ, ImportanceSearch, Qronos, RoundToNearest, ScaleSearch
from fewbits.rounding.base import RowInputs
from fewbits.rounding.statistics import InputStatistics

by_strategy = pytest.mark.parametrize("rounding", STRATEGIES, ids=lambda rounding: type(rounding).__name__)
by_needing = pytest.mark.parametrize("rounding", NEEDING_DATA, ids=lambda rounding: type(rounding).__name__)
specs = st.sampled_from(list(SPECS.values()))
#: Solving takes long; a few dozen of these problems hold every kind of input.
fewer_examples = settings(max_examples=min(40, settings.default.max_examples))


@by_strategy
@fewer_examples
@given(problem=problems(), spec=specs)
def test_no_row_is_worse_than_rounding_to_nearest_on_the_stated_objective(rounding, problem, spec):
    weight, x, y = problem
    inputs = statistics(rounding, x, y)
    known = inputs[0].statistics if inputs else None
    mine = rounding.error(weight, rounded(rounding, weight, spec, inputs), known)
    plain = rounding.error(weight, rounded(RoundToNearest(), weight, spec, []), known)
    # Candidates are compared in float32, so a tie may go either way.
    scale = rounding.error(weight, torch.zeros_like(weight), known)
    assert (mine <= plain * (1 + 1e-4) + scale * 1e-5).all()


@by_strategy
@fewer_examples
@given(problem=problems(), spec=specs)
def test_every_element_stays_within_the_bound_of_the_spec(rounding, problem, spec):
    weight, x, y = problem
    matrix = WeightMatrix(weight, Layout.of(weight.shape))
    value = rounding.quantize(matrix, rounding.spec_for(spec), MinMaxObserver(), statistics(rounding, x, y))
    assert measure(weight, value).worst_bound_ratio <= 1


@by_needing
def test_a_strategy_that_needs_data_depends_on_it(rounding):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    wide = torch.randn(500, 32, generator=generator) * torch.linspace(0.01, 3, 32)
    spec = SPECS["int4 groups"]
    one, other = (rounded(rounding, weight, spec, statistics(rounding, x)) for x in (wide, wide.flip(1)))
    assert not torch.equal(one, other)


@by_needing
@fewer_examples
@given(problem=problems(), cuts=st.lists(st.integers(0, 400), max_size=5), spec=specs)
def test_codes_do_not_depend_on_batches_or_threads(rounding, problem, cuts, spec):
    weight, x, y = problem
    whole = rounded(rounding, weight, spec, statistics(rounding, x, y))
    known = InputStatistics(x.shape[1], rounding.needs)
    bounds = sorted({0, len(x), *(cut for cut in cuts if cut < len(x))})
    for start, stop in pairwise(bounds):
        known.add(x[start:stop], y[start:stop])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(rounded(rounding, weight, spec, [RowInputs(slice(0, len(weight)), known)]), whole)
    finally:
        torch.set_num_threads(threads)


@by_strategy
@given(rows=st.integers(1, 50), first=st.integers(0, 49), columns=st.sampled_from([5, 130]))
def test_a_row_gets_the_same_codes_in_any_block(rounding, rows, first, columns):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(100, columns, generator=generator)
    inputs, spec = statistics(rounding, x, x * 1.1), QuantSpec(bits=2, granularity="channel", scale_dtype=torch.float64)
    some = slice(first % rows, None)
    assert torch.equal(rounded(rounding, weight, spec, inputs)[some], rounded(rounding, weight[some], spec, inputs))


@by_needing
def test_the_sums_of_a_wide_layer_do_not_depend_on_threads(rounding):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(700, 600, generator=generator), torch.randn(9, 600, generator=generator)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(rounded(rounding, weight, SPECS["int4 groups"], statistics(rounding, x, x * 1.1)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@by_needing
def test_rows_with_too_few_inputs_are_rounded_as_without_data(rounding):
    generator = torch.Generator().manual_seed(1)
    weight, spec = torch.randn(6, 24, generator=generator), SPECS["int4 groups"]
    few, many = InputStatistics(24, rounding.needs), InputStatistics(24, rounding.needs)
    few.add(torch.randn(rounding.min_inputs - 1, 24, generator=generator))
    many.add(torch.randn(rounding.min_inputs, 24, generator=generator))
    inputs = [RowInputs(slice(4, 6), few), RowInputs(slice(1, 4), many)]
    result = rounded(rounding, weight, spec, inputs)
    without = rounded(ScaleSearch(steps=rounding.steps), weight, spec, [])
    assert torch.equal(result[[0, 4, 5]], without[[0, 4, 5]])
    assert not torch.equal(result[1:4], without[1:4])
    assert rounding.remark(6, inputs) == "3 of its 6 rows saw fewer than 64 inputs, and were rounded without data"
    assert rounding.remark(6, []) == "its rows saw fewer than 64 inputs, and were rounded without data"


@pytest.mark.parametrize("rounding", [GPTQ(), Qronos()], ids=["GPTQ", "Qronos"])
def test_columns_whose_input_is_always_zero_get_the_nearest_code(rounding):
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(5, 16, generator=generator), torch.randn(300, 16, generator=generator)
    x[:, 3] = x[:, 11] = 0
    spec = SPECS["channel"]
    matrix = WeightMatrix(weight, Layout.of(weight.shape))
    value = rounding.quantize(matrix, rounding.spec_for(spec), MinMaxObserver(), statistics(rounding, x))
    steps = weight[:, [3, 11]] / value.scale
    assert torch.equal(value.codes()[:, [3, 11]], steps.round().clamp(-8, 7).to(torch.int8))


def test_feedback_lowers_the_error_of_the_output():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    y = x + 0.5 * torch.randn(x.shape, generator=generator)
    weight, spec = torch.randn(32, 48, generator=generator), SPECS["int3 ragged groups"]

    def error(rounding, target):
        codes = rounded(rounding, weight, spec, statistics(rounding, x, y)).float()
        return float((target @ weight.mT - x @ codes.mT).square().mean())

    assert error(GPTQ(), x) < 0.5 * error(ImportanceSearch(), x) < 0.5 * error(RoundToNearest(), x)
    assert error(Qronos(), y) < error(GPTQ(), y)


@by_strategy
def test_a_weight_with_nan_is_refused(rounding):
    weight = torch.ones(4, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"index \(1, 2\)"):
        rounded(rounding, weight, SPECS["channel"], [])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GPTQ(damping=0), "damping"),
        (lambda: GPTQ(damping=True), "damping"),
        (lambda: Qronos(refits=-1), "refits"),
        (lambda: GPTQ(steps=1), "steps"),
        (lambda: ScaleSearch(norm=0.5), "norm"),
        (lambda: ScaleSearch(norm="2"), "norm"),
        (lambda: ImportanceSearch(steps=2.0), "steps"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make, named):
    with pytest.raises(ArgumentError, match=named):
        make()


def test_statistics_refuse_inputs_of_another_size_and_nan():
    known = InputStatistics(4, "second_moment")
    with pytest.raises(ArgumentError, match=r"\(inputs, 4\), not \(2, 5\)"):
        known.add(torch.ones(2, 5))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        known.add(torch.full((2, 4), torch.inf))
    with pytest.raises(CalibrationError, match="no input"):
        _ = known.second_moment
    known.add(torch.eye(4))
    with pytest.raises(ArgumentError, match="float model"):
        _ = known.cross_moment
    assert torch.equal(known.second_moment, torch.eye(4).double() / 4)
    assert torch.equal(known.mean_square, torch.full((4,), 0.25).double())
