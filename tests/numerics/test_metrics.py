"""Measurements of stored tensors against their originals."""

import json
import math

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewbits import Measurement, QuantSpec, measure
from fewbits.errors import ArgumentError
from fewbits.extend import Layout
from fewbits.numerics.layout import block_rows
from fewbits.numerics.metrics import Tally, pooled_sqnr_db, sqnr_db
from fewbits.numerics.quantize import cast, quantize
from support.strategies import as_matrix, fractions, numbers, per_element, problems, restrided, weights

CHANNEL = QuantSpec(bits=8, granularity="channel")
NARROW = (torch.float32, torch.float16, torch.bfloat16)  # differences of these are exact in float64


def decoded(q) -> list:
    """Decode each code to a fraction."""
    steps = q.codes().to(torch.int64)
    if not q.spec.symmetric:
        steps = steps - per_element(q.zero_points(), q.spec, *steps.shape)
    scales = fractions(per_element(q.params().scale, q.spec, *steps.shape))
    return [step * scale for step, scale in zip(fractions(steps), scales, strict=True)]


def damaged(weight, spec=CHANNEL, **scales):
    """Quantize, and replace the scale of row `r0`, `r1` ..."""
    q = quantize(weight, spec)
    scale = q.scale.clone()
    for row, value in scales.items():
        scale[int(row[1:])] = value
    return attrs.evolve(q, scale=scale)


@given(problems(dtypes=NARROW, scale_dtypes=(None, *NARROW)))
def test_the_figures_are_those_of_exact_arithmetic(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    before, after = fractions(as_matrix(weight, layout)), decoded(q)
    errors = [abs(x - y) for x, y in zip(before, after, strict=True)]
    measured = measure(weight, q)
    assert measured.elements == weight.numel()
    assert measured.max_abs_error == pytest.approx(float(max(errors)), rel=1e-12)
    for figure, exact in [
        (measured.signal, sum(x * x for x in before)),
        (measured.decoded, sum(y * y for y in after)),
        (measured.dot, sum(x * y for x, y in zip(before, after, strict=True))),
    ]:
        assert figure == pytest.approx(float(exact), rel=1e-12, abs=1e-300)
    assert measured.noise == pytest.approx(float(sum(e * e for e in errors)), rel=1e-9, abs=1e-300)


@given(problems(dtypes=NARROW))
def test_codes_and_scales_in_use_are_reported(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    measured = measure(weight, q)
    assert (measured.code_min, measured.code_max) == (q.codes().min(), q.codes().max())
    scales = q.params().scale.flatten().tolist()
    assert (measured.scale_min, measured.scale_max) == (min(scales), max(scales))


# At the edge of float64 a code may decode to a number beyond it, whose error cannot be computed.
@given(problems(relative_limit=0.25))
def test_the_bound_holds_for_rounding_to_nearest(problem):
    weight, spec, layout = problem
    measured = measure(weight, quantize(weight, spec, layout=layout))
    assert measured.broken_at is None
    assert measured.worst_bound_ratio <= 1


@given(weights(min_dims=1), st.sampled_from([torch.float64, *NARROW]))
def test_the_bound_holds_for_a_cast(weight, dtype):
    assume(weight.double().abs().max() <= torch.finfo(dtype).max)
    measured = measure(weight, cast(weight, dtype))
    assert measured.broken_at is None
    assert measured.worst_bound_ratio <= 1
    assert measured.code_min is measured.code_max is measured.scale_min is measured.scale_max is None


@given(weights(dtypes=(torch.float32,), min_dims=2, max_dims=2), st.data())
def test_a_code_off_by_one_is_reported_with_its_place(weight, data):
    spec = QuantSpec(bits=4, granularity="channel")
    q = quantize(weight, spec)
    row, column = (data.draw(st.integers(0, size - 1)) for size in weight.shape)
    # Move the code away from the weight, so that an error of exactly half a step grows.
    codes = q.codes()
    codes[row, column] += 1 if q.dequantize(torch.float64)[row, column] >= weight[row, column] else -1
    assume(spec.code_min <= codes[row, column] <= spec.code_max)
    moved = type(q).from_codes(codes, q.params(), spec=q.spec, layout=q.layout, dtype=q.dtype)
    measured = measure(weight, moved)
    assert measured.broken_at == (row, column)
    assert measured.worst_bound_ratio > 1


@pytest.mark.parametrize(
    "spec", [CHANNEL, QuantSpec(bits=4, granularity="group", group_size=5, symmetric=False)], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_damaged_scale_is_a_broken_bound(spec, value):
    weight = torch.linspace(-1, 2, 80).reshape(4, 20)
    measured = measure(weight, damaged(weight, spec, r2=value))
    assert measured.broken_at == (2, 0)
    assert measured.worst_bound_ratio == math.inf
    assert measured.max_abs_error == math.inf
    assert not measured.sqnr_db > 0
    assert not measured.cosine > 0.5


def test_scales_damaged_to_opposite_infinities_are_a_broken_bound():
    weight = torch.ones(3, 8)
    assert measure(weight, damaged(weight, r0=math.inf, r1=-math.inf)).broken_at == (0, 0)


def test_a_scale_damaged_to_zero_leaves_no_signal():
    weight = torch.ones(2, 8)
    measured = measure(weight, damaged(weight, r0=0.0, r1=0.0))
    assert (measured.sqnr_db, measured.cosine, measured.scale_max) == (0.0, 0.0, 0.0)


def test_a_scale_of_another_size_is_a_broken_bound():
    weight = torch.linspace(-1, 2, 80).reshape(4, 20)
    assert measure(weight, damaged(weight, r3=3.0)).broken_at == (3, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_source_that_is_not_finite_is_a_broken_bound(value):
    weight = torch.ones(3, 8)
    stored = quantize(weight, CHANNEL)
    weight[1, 5] = value
    assert measure(weight, stored).broken_at == (1, 5)
    assert measure(weight, torch.ones(3, 8)).broken_at == (1, 5)


def test_a_cast_that_overflowed_is_a_broken_bound():
    weight = torch.tensor([[1.0, 2.0], [1e6, 3.0]])
    measured = measure(weight, weight.half())
    assert measured.broken_at == (1, 0)
    assert measured.max_abs_error == math.inf


def test_a_cast_off_by_one_unit_is_a_broken_bound():
    weight = torch.tensor([[1.0, 2.0]])
    assert measure(weight, torch.tensor([[1.0, 2.002]], dtype=torch.float16)).broken_at == (0, 1)


@given(problems(), st.data())
def test_the_strides_of_the_source_change_no_figure(problem, data):
    weight, spec, layout = problem
    strided = data.draw(restrided(weight))
    q = quantize(strided, spec, layout=layout)
    assert measure(strided, q) == measure(strided.clone().contiguous(), q)


@given(weights(dtypes=NARROW, min_dims=1))
def test_equal_tensors_have_no_error(weight):
    measured = measure(weight, weight)
    assert (measured.noise, measured.max_abs_error, measured.worst_bound_ratio) == (0.0, 0.0, 0.0)
    assert measured.sqnr_db == math.inf
    assert measured.cosine == pytest.approx(1.0)


@given(problems(dtypes=NARROW))
def test_a_cosine_lies_between_minus_one_and_one(problem):
    weight, spec, layout = problem
    assert -1 <= measure(weight, quantize(weight, spec, layout=layout)).cosine <= 1
    assert -1 <= measure(weight, weight).cosine <= 1


def test_sqnr_and_cosine_of_known_numbers():
    measured = measure(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]]))
    assert measured.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert measured.cosine == pytest.approx(23 / (5 * math.hypot(3, 3.5)))
    assert measured.max_abs_error == 0.5


def test_sums_include_every_element_of_odd_widths():
    for columns in range(1, 40):
        weight = torch.arange(1.0, 3 * columns + 1).reshape(3, columns)
        n = 3 * columns
        assert measure(weight, weight).signal == n * (n + 1) * (2 * n + 1) / 6


def test_zeros_stored_as_zeros_are_without_error():
    measured = measure(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16))
    assert (measured.sqnr_db, measured.cosine, measured.worst_bound_ratio) == (math.inf, 1.0, 0.0)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 100.0, -20.0),
        (1.0, 0.0, math.inf),
        (0.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (1e-320, 1e10, -3300.0),
        (1e308, 1e-10, 3180.0),
        (1.0, math.inf, -math.inf),
    ],
)
def test_sqnr_at_its_edges(signal, noise, expected):
    assert sqnr_db(signal, noise) == pytest.approx(expected, rel=1e-4)


def figures(signal: float, noise: float) -> Measurement:
    return Measurement(1, signal, noise, signal, signal, 0.0, 0.0)


@given(st.lists(st.tuples(numbers(torch.float32).map(abs), numbers(torch.float32).map(abs)), max_size=5))
def test_pooling_adds_signals_and_noises(pairs):
    signal, noise = (math.fsum(terms) for terms in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    pooled = pooled_sqnr_db(figures(*pair) for pair in pairs)
    if noise == 0 or signal == 0:
        assert pooled == (math.inf if noise == 0 else -math.inf)
    else:
        assert pooled == pytest.approx(10 * (math.log10(signal) - math.log10(noise)), abs=1e-9)


def ramp(magnitude: float) -> torch.Tensor:
    return magnitude * torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(4, 15)


@pytest.mark.parametrize("magnitude", [1e140, 1e-140])
def test_sqnr_and_cosine_do_not_depend_on_magnitude(magnitude):
    one, other = (measure(x, quantize(x, CHANNEL)) for x in (ramp(1.0), ramp(magnitude)))
    assert other.sqnr_db == pytest.approx(one.sqnr_db, abs=0.1)
    assert other.cosine == pytest.approx(one.cosine)


@pytest.mark.parametrize("magnitude", [1e154, 1e300, 1e-170, 1e-300])
def test_the_bound_is_proved_also_where_squares_leave_the_range_of_float64(magnitude):
    measured = measure(ramp(magnitude), quantize(ramp(magnitude), CHANNEL))
    assert measured.broken_at is None
    assert measured.worst_bound_ratio <= 1
    assert not measured.sqnr_db < 0


@pytest.mark.parametrize(
    ("original", "stored"),
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2, 3), torch.ones(2, 3, 1)),
        (torch.ones(2, 3), quantize(torch.ones(3, 2), CHANNEL)),
        (torch.ones(0, 3), torch.ones(0, 3)),
        (torch.ones(3, 0), torch.ones(3, 0)),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(original, stored):
    with pytest.raises(ArgumentError, match="cannot be compared"):
        measure(original, stored)


def test_the_place_of_a_broken_bound_is_row_and_column_of_the_matrix():
    layout = Layout.of((2, 3, 4), inputs=(1,))
    weight = torch.ones(2, 3, 4)
    q = quantize(weight, CHANNEL, layout=layout)
    weight[1, 2, 3] = 0.0
    assert measure(weight, q).broken_at == (7, 2)


def test_the_first_broken_bound_is_found_in_a_later_block():
    weight = torch.ones(9, 4)
    q = quantize(weight, CHANNEL)
    weight[6, 1] = weight[7, 0] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 8)
        assert measure(weight, q).broken_at == (6, 1)


@given(problems(), st.data())
def test_parts_give_the_figures_of_the_whole_to_the_last_bit(problem, data):
    weight, spec, layout = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", data.draw(st.integers(1, 40)))
        stored = quantize(weight, spec, layout=layout)
        step = data.draw(st.integers(1, 2)) * math.lcm(block_rows(layout.columns), 32)
        matrix, whole = as_matrix(weight, layout), Tally()
        for start in range(0, layout.rows, step):
            part = Tally()
            part.add(matrix[start : start + step], stored.rows(start, min(start + step, layout.rows)))
            # As when it is read back from a journal.
            whole.join(Tally.from_dict(json.loads(json.dumps(part.to_dict()))))
        assert whole.measurement(layout.columns) == measure(weight, stored)


@pytest.mark.parametrize("lost", [slice(0, 40), slice(64, 70), slice(0, 0)])
def test_lost_rows_are_counted_through_a_journal_too(lost):
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(8, "channel", rounding="free")
    damaged = weight.clone()
    damaged[lost] = 1.0
    stored, whole = quantize(damaged, spec), Tally()
    for start in range(0, 128, 32):
        part = Tally()
        part.add(weight[start : start + 32], stored.rows(start, start + 32))
        whole.join(Tally.from_dict(json.loads(json.dumps(part.to_dict()))))
    expected = measure(weight, stored)
    assert whole.measurement(64).constant_rows == expected.constant_rows
    assert expected.constant_rows == lost.stop - lost.start


@given(weights(dtypes=(torch.float32, torch.float64), min_dims=1), st.integers(1, 10), st.integers(1, 40))
def test_parts_of_a_cast_give_the_figures_of_the_whole(weight, blocks, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        stored = weight.to(torch.bfloat16)
        whole, step = Tally(), blocks * block
        for start in range(0, weight.numel(), step):
            part = Tally()
            part.add(weight.reshape(-1)[start : start + step], stored.reshape(-1)[start : start + step])
            whole.join(part)
        assert whole.measurement(weight.shape[-1]) == measure(weight, stored)


@given(problems(), st.data())
def test_some_rows_of_a_quantized_tensor_decode_like_the_whole(problem, data):
    weight, spec, layout = problem
    stored = quantize(weight, spec, layout=layout)
    start = 32 * data.draw(st.integers(0, (layout.rows - 1) // 32))
    stop = data.draw(st.integers(start + 1, layout.rows))
    part = stored.rows(start, stop)
    assert torch.equal(part.codes(), stored.codes()[start:stop])
    assert torch.equal(part.dequantize(torch.float64), as_matrix(stored.dequantize(torch.float64), layout)[start:stop])
