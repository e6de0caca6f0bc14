"""The scales that observers choose for weights."""

import math
from fractions import Fraction

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fewbits import MinMaxObserver, QuantSpec
from fewbits.errors import RangeError
from fewbits.extend import WeightMatrix
from fewbits.numerics.affine import decode, encode
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import block_rows
from fewbits.numerics.metrics import measure, pooled_sqnr_db
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import quantize
from fewbits.numerics.scales import choose_params, extremes
from fewbits.numerics.search import shares
from fewbits.observers import OBSERVERS
from fewbits.observers.histogram import HistogramObserver
from fewbits.observers.moving_average import MovingAverageMinMaxObserver
from fewbits.observers.mse import MSEObserver
from fewbits.observers.percentile import PercentileObserver
from support.lifecycle_helpers import FEWER_EXAMPLES
from support.strategies import problems

# Levels that are multiples of a quarter, more of them above zero than below, with gaps of different widths.
LEVELS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0)

RECIPES = [
    MinMaxObserver(),
    MovingAverageMinMaxObserver(),
    HistogramObserver(),
    PercentileObserver(80),
    MSEObserver(steps=8),
]
every = pytest.mark.parametrize("recipe", RECIPES, ids=repr)


@st.composite
def cases(draw, relative_limit=1.0, **fixed):
    """Draw (rows as an observer gets them, spec with its scale dtype set), some with levels."""
    weight, spec, layout = draw(problems(relative_limit=relative_limit, **fixed))
    spec = spec.for_dtype(weight.dtype)
    if spec.symmetric and draw(st.booleans()):
        spec = attrs.evolve(spec, bits=3, levels=LEVELS)
    rows = WeightMatrix(weight, layout).whole()
    return rows if spec.granularity == "tensor" else rows.to(compute_dtype(weight.dtype)), spec


def errors(rows, params, spec):
    """The errors of all elements, (rows, columns), in float64."""
    return decode(encode(rows, params, spec), params, spec, torch.float64) - rows.double()


def totals(values, spec):
    """Return the sum over each group."""
    if spec.granularity == "tensor":
        return values.sum().reshape(1)
    width = spec.width(values.shape[1])
    return torch.stack([part.sum(1) for part in values.split(width, 1)], 1)


def slack(rows, spec, *candidates):
    """Bound the rounding error of the search's arithmetic for each group.

    A quotient ``t`` of element and scale is rounded once. So the square of an error ``e`` (in units of the scale) is
    off by at most ``2 |e t| u + (t u)**2`` with ``u = 2**-24``, half a unit in the last place of float32. The sum of a
    group adds a relative error of ``u`` for each of its fewer than 8 halvings, and the square adds another.
    """
    x, unit = rows.double().abs(), 2.0**-24
    each = [2 * e.abs() * x * unit + (x * unit) ** 2 + 9 * unit * e.square() for e in candidates]
    return totals(2 * sum(each), spec)


@every
@given(cases())
def test_scales_are_valid_for_any_weight(recipe, case):
    rows, spec = case
    stored = quantize(rows, spec, recipe.observe_weight)
    assert torch.isfinite(stored.dequantize(torch.float64)).all()


@every
@given(cases(relative_limit=1 / 16))
def test_a_row_gets_the_same_scales_alone_and_among_others(recipe, case):
    rows, spec = case
    params = recipe.observe_weight(rows, spec)
    again = recipe.observe_weight(rows, spec)
    assert torch.equal(again.scale, params.scale)
    if spec.granularity != "tensor":
        each = [recipe.observe_weight(row, spec) for row in rows.split(1)]
        assert torch.equal(torch.cat([one.scale for one in each]), params.scale)
        zero_point = params.zero_point
        assert zero_point is None or torch.equal(torch.cat([one.zero_point for one in each]), zero_point)


@every
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_threads_make_no_difference(recipe, granularity):
    rows = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=4, granularity=granularity, scale_dtype=torch.float32)
    before, scales = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scales.append(recipe.observe_weight(rows, spec).scale)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*scales)


@given(cases(relative_limit=1 / 16))
def test_the_least_error_is_never_above_that_of_the_extremes(case):
    rows, spec = case
    plain = errors(rows, MinMaxObserver().observe_weight(rows, spec), spec)
    found = errors(rows, MSEObserver(steps=8).observe_weight(rows, spec), spec)
    assert (totals(found.square(), spec) <= totals(plain.square(), spec) + slack(rows, spec, plain, found)).all()


@given(cases(relative_limit=1 / 16, scale_bits=None))  # two levels of scales couple the groups of a row
def test_the_least_error_is_never_above_that_of_a_range_that_was_tried(case):
    rows, spec = case
    found = errors(rows, MSEObserver(steps=8).observe_weight(rows, spec), spec)
    low, high = extremes(rows, spec)
    for share in shares(8):
        params = choose_params(low.double() * share, high.double() * share, spec)
        tried = errors(rows, params, spec)
        assert (totals(found.square(), spec) <= totals(tried.square(), spec) + slack(rows, spec, tried, found)).all()


@FEWER_EXAMPLES
@given(
    cases(relative_limit=1 / 16, max_elements=40, dtypes=(torch.float64,), granularity="channel", scale_dtype=None),
)
def test_the_expected_noise_is_never_above_that_of_a_range_that_was_tried(case):
    rows, spec = case
    low, high = extremes(rows, spec)
    wide = choose_params(low, high, spec).scale
    found = expected(rows, HistogramObserver().observe_weight(rows, spec), wide, spec)
    for share in shares(20):
        tried = expected(rows, choose_params(low * share, high * share, spec), wide, spec)
        assert all(f <= t * (1 + 1e-12) for f, t in zip(found, tried, strict=True))


def expected(rows, params, unit, spec):
    """Compute the expected noise of each row by its definition, in units of ``unit**2``, in plain Python."""
    levels = spec.levels or [float(code) for code in range(spec.code_min, spec.code_max + 1)]
    zero_points = [0] * len(rows) if params.zero_point is None else params.zero_point.flatten().tolist()
    noise = []
    for row, scale, zero, one in zip(rows.tolist(), params.scale.tolist(), zero_points, unit.tolist(), strict=True):
        reached = [level - zero for level in levels]
        share = scale[0] / one[0]
        noise.append(math.fsum(expected_of(x / scale[0], reached) for x in row) * share * share)
    return noise


def expected_of(x, reached):
    """Compute the expected noise of a number, in units of the squared scale; codes decode to `reached` times it."""
    zero = reached.index(0)
    below = reached[zero - 1] / 2 if zero else -0.5
    above = reached[zero + 1] / 2 if zero + 1 < len(reached) else 0.5
    if below < x < above:
        return x * x
    if not reached[0] <= x <= reached[-1]:
        beyond = min(abs(x - reached[0]), abs(x - reached[-1]))
        return beyond * beyond
    end = next(index for index, level in enumerate(reached) if level >= x and index)
    return (reached[end] - reached[end - 1]) ** 2 / 12


@given(cases(relative_limit=1 / 16), st.sampled_from([30, 75, 80, 99.9, 100]))
def test_a_percentile_leaves_out_as_many_elements_as_allowed(case, percentile):
    rows, spec = case
    groups = [rows.flatten()] if spec.granularity == "tensor" else rows.split(spec.width(rows.shape[1]), 1)
    if spec.granularity != "tensor":
        groups = [row for part in zip(*groups, strict=True) for row in part]
    ends = [inner(group.tolist(), spec.symmetric, Fraction(str(percentile)) / 100) for group in groups]
    shape = spec.scale_shape(*rows.shape)
    low, high = (torch.tensor(side, dtype=torch.float64).reshape(shape) for side in zip(*ends, strict=True))
    params, wanted = PercentileObserver(percentile).observe_weight(rows, spec), choose_params(low, high, spec)
    assert torch.equal(params.scale, wanted.scale)
    assert params.zero_point is None or torch.equal(params.zero_point, wanted.zero_point)


def inner(values, symmetric, share):
    """Find the narrowest range around zero that holds a share of the values."""
    spare = math.floor(len(values) * (1 - share))
    if symmetric:
        high = sorted(map(abs, values), reverse=True)[spare]
        low = -high
    else:
        low, high = min(0.0, sorted(values)[spare // 2]), max(0.0, sorted(values, reverse=True)[spare // 2])
    return (low, high) if low or high else (min(0.0, *values, 0.0), max(0.0, *values, 0.0))


@every
def test_a_scale_beyond_its_dtype_is_an_error(recipe):
    spec = QuantSpec(bits=8, granularity="channel", scale_dtype=torch.float16)
    with pytest.raises(RangeError, match="wider scale_dtype"):
        recipe.observe_weight(torch.full((2, 4), 1e30), spec)


@every
@pytest.mark.parametrize("spec", [
    QuantSpec(bits=4, granularity="group", group_size=3, scale_dtype=torch.float16),
    QuantSpec(bits=8, granularity="tensor", symmetric=False, scale_dtype=torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-40])
def test_constants(recipe, spec, value):
    rows = torch.full((2, 7), value)
    params = recipe.observe_weight(rows, spec)
    assert (errors(rows, params, spec).abs() <= params.scale.double().abs().max() / 2).all()


def test_a_negative_scale_gives_the_positive_side_the_lowest_code():
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype=torch.float32)
    rows = torch.tensor([[8.0, 3.0, -7.0, 1.0, -2.0]])
    params = MSEObserver().observe_weight(rows, spec)
    assert params.scale.item() == -1.0
    assert not errors(rows, params, spec).any()
    assert errors(rows, MinMaxObserver().observe_weight(rows, spec), spec).abs().max() > 0.4


def test_a_scale_is_fitted_to_its_codes():
    """All elements are near the codes 1 and 7: no share of the range gives the least-squares scale."""
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype=torch.float64)
    rows = torch.tensor([[7.1, 6.9, 6.95, 7.05, 1.02]], dtype=torch.float64)
    codes = torch.tensor([7.0, 7.0, 7.0, 7.0, 1.0], dtype=torch.float64)
    refitted = (rows @ codes / codes.square().sum()).item()
    assert MSEObserver(steps=2).observe_weight(rows, spec).scale.item() == pytest.approx(refitted, rel=1e-12)


def test_blocks_of_a_whole_tensor_are_added_up():
    """The scale for a float16 weight of several blocks is as good as the scale for the same numbers in one row."""
    columns = 128
    rows = torch.randn(3 * block_rows(columns) + 1, columns, generator=torch.Generator().manual_seed(0)).half()
    spec = QuantSpec(bits=4, granularity="tensor", scale_dtype=torch.float32)
    params = MSEObserver().observe_weight(rows, spec)
    row = rows.reshape(1, -1).float()
    other = MSEObserver().observe_weight(row, attrs.evolve(spec, granularity="channel"))
    noise = [errors(rows, QuantParams(p.scale.reshape(1)), spec).square().sum().item() for p in (params, other)]
    assert noise[0] == pytest.approx(noise[1], rel=1e-5)


@pytest.mark.parametrize(("bits", "gain"), [(2, 4.0), (3, 2.5), (4, 1.4), (8, 0.03)])
def test_the_search_improves_the_sqnr_of_normal_weights(bits, gain):
    weight = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits=bits, granularity="group", group_size=128, scale_dtype=torch.float16)
    plain, found = (
        measure(weight, quantize(weight, spec, o.observe_weight)).sqnr_db for o in (RECIPES[0], MSEObserver())
    )
    assert found >= plain + gain


def test_the_search_improves_the_sqnr_of_a_real_model(minilm_path):
    spec = QuantSpec(bits=4, granularity="group", group_size=128)
    pooled = {}
    with safe_open(minilm_path, "pt") as file:
        names = [name for name in file.keys() if "layer.0." in name and name.endswith("weight")]  # noqa: SIM118
        weights = [tensor for tensor in map(file.get_tensor, names) if tensor.dim() == 2]
    for name, cls in OBSERVERS.items():
        stored = [quantize(weight, spec, cls().observe_weight) for weight in weights]
        pooled[name] = pooled_sqnr_db(map(measure, weights, stored))
    assert len(weights) == 6
    assert pooled["minmax"] == pooled["moving-average"] == pooled["percentile"]
    assert pooled["histogram"] >= pooled["minmax"] + 0.8
    assert pooled["mse"] >= pooled["minmax"] + 1.5
