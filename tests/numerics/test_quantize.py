"""Quantizing and casting tensors: properties of every tensor, spec and layout."""

import math
from fractions import Fraction
from itertools import chain

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from fewbits import MinMaxObserver, QuantSpec, measure
from fewbits.errors import NonFiniteError, NumericsError, RangeError
from fewbits.extend import Layout, WeightMatrix
from fewbits.numerics.dtypes import POWERS_OF_TWO, compute_dtype
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import cast, quantize
from support.strategies import (
    FLOATS,
    as_matrix,
    fractions,
    layouts,
    numbers,
    per_element,
    problems,
    quantize_group,
    restrided,
    rounded,
    seeds,
    specs,
    ulp,
    weights,
)

WIDE = (torch.float32, torch.float64)
CHANNEL = QuantSpec(bits=8, granularity="channel")

# With a scale rounded to the nearest bfloat16, the lowest number would be more than half a step from every code.
COARSE = QuantSpec(bits=8, granularity="tensor", symmetric=False, scale_dtype=torch.bfloat16)
BELOW = torch.tensor([-2.9802]), COARSE, Layout(shape=(1,), view=(1,), permutation=(0,), row_axes=0)


def fixed(*parts):
    """Make a `ChooseParams` that returns fixed values."""
    return lambda rows, spec: QuantParams(*parts)


def parameters(q):
    params = q.params()
    return params.scale, params.zero_point, params.row_scale


def same(one, other) -> bool:
    """Tell whether codes and parameters are equal; shapes and dtypes of the sources may differ."""
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip((one.codes(), *parameters(one)), (other.codes(), *parameters(other)), strict=True)
    )


def elements(weight, q):
    """Yield (weight, code less zero point, scale) of each element, as fractions."""
    scales = q.params().scale
    zeros = torch.zeros_like(scales) if q.spec.symmetric else q.zero_points()
    scale, zero = (per_element(p, q.spec, *q.layout.matrix_shape) for p in (scales, zeros))
    steps = q.codes().to(torch.int64) - zero.to(torch.int64)
    return zip(fractions(as_matrix(weight, q.layout)), fractions(steps), fractions(scale), strict=True)


@given(problems())
def test_every_element_is_within_half_a_step(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    assert all(abs(w - steps * s) <= s / 2 + abs(w) / 2**23 for w, steps, s in elements(weight, q))


@given(problems())
def test_zero_stays_exactly_zero(problem):
    weight, spec, layout = problem
    weight = torch.where(torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0, -0.0, weight)
    q = quantize(weight, spec, layout=layout)
    assert all(steps == 0 for w, steps, _ in elements(weight, q) if w == 0)


# Skip scales wider than their weight: the dtype of their division is not specified.
@given(problems(scale_dtypes=(None, torch.float16, torch.bfloat16, torch.float32), scale_bits=None))
@example(BELOW)
def test_codes_and_scales_agree_with_ten_lines_of_python(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    # At the end of the dtype's range the scale is larger, so that no code decodes to Inf; tested below.
    assume(weight.abs().max().double() < torch.finfo(compute_dtype(q.scale.dtype)).max / 2)
    matrix = as_matrix(weight, layout)
    width = {"tensor": matrix.numel(), "channel": layout.columns, "group": spec.group_size}[spec.granularity]
    rows = [matrix.flatten()] if spec.granularity == "tensor" else matrix
    groups = [quantize_group(group.tolist(), spec, weight.dtype) for row in rows for group in row.split(width)]
    codes, scales, zeros = zip(*groups, strict=True)
    assert q.codes().flatten().tolist() == list(chain.from_iterable(codes))
    assert q.scale.flatten().tolist() == list(scales)
    assert spec.symmetric or q.zero_points().flatten().tolist() == list(zeros)


@given(problems())
def test_the_default_is_the_min_max_observer(problem):
    weight, spec, layout = problem
    chosen = quantize(weight, spec, MinMaxObserver().observe_weight, layout=layout)
    assert chosen.equal(quantize(weight, spec, layout=layout))


@given(problems(symmetric=True))
def test_symmetric_codes_never_use_the_lowest_one(problem):
    weight, spec, layout = problem
    assume(spec.scale_dtype != POWERS_OF_TWO)  # the smallest with which nothing clips may need the lowest code
    assert quantize(weight, spec, layout=layout).codes().min() >= -spec.code_max


@given(problems(relative_limit=0.25))
def test_quantizing_decoded_codes_gives_the_same_codes(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    decoded = q.dequantize(torch.float64 if q.scale.dtype == torch.float64 else torch.float32)
    again = quantize(decoded, q.spec, fixed(*parameters(q)), layout=layout)
    assert same(q, again)


# The 8 bits of a bfloat16 cannot represent 255 steps.
@given(problems(relative_limit=0.25, scale_dtypes=(None,)))
def test_quantizing_codes_decoded_to_the_source_s_dtype_gives_the_same_codes(problem):
    weight, spec, layout = problem
    assume(spec.symmetric or spec.bits < 8 or weight.dtype != torch.bfloat16)
    q = quantize(weight, spec, layout=layout)
    assert q.equal(quantize(q.dequantize(), spec, fixed(*parameters(q)), layout=layout))


@given(problems(relative_limit=0.25, symmetric=True, scale_bits=None))
def test_symmetric_min_max_finds_its_own_scale_again(problem):
    weight, spec, layout = problem
    assume(spec.scale_dtype != POWERS_OF_TWO)  # the lowest code may become one of half its size, with a smaller scale
    q = quantize(weight, spec, layout=layout)
    decoded = q.dequantize(torch.float64 if q.scale.dtype == torch.float64 else torch.float32)
    again = quantize(decoded, q.spec, layout=layout)
    assert torch.equal(q.codes(), again.codes())
    for old, new in zip(q.scale.flatten().tolist(), again.scale.flatten().tolist(), strict=True):
        assert abs(old - new) <= ulp(old, q.scale.dtype)


@given(problems(relative_limit=2.0**-13), st.integers(-12, 12))
def test_a_power_of_two_moves_into_the_scale(problem, exponent):
    weight, spec, layout = problem
    scaled = weight * 2.0**exponent
    one, other = quantize(weight, spec, layout=layout), quantize(scaled, spec, layout=layout)
    smallest = torch.finfo(one.scale.dtype).tiny * spec.scale_parts
    scales = one.params().scale.double(), other.params().scale.double()
    stored = one.scale.double(), other.scale.double()
    assume(torch.equal(scaled / 2.0**exponent, weight) and min(scale.min() for scale in stored) > smallest)
    assert torch.equal(one.codes(), other.codes())
    assert torch.equal(scales[0] * 2.0**exponent, scales[1])
    assert spec.symmetric or torch.equal(one.zero_points(), other.zero_points())


@given(weights(min_dims=2, max_dims=2), specs(scale_dtypes=(None,)), seeds)
def test_permuting_rows_permutes_codes_and_scales(weight, spec, seed):
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    q, permuted = quantize(weight, spec), quantize(weight[order], spec)
    assert torch.equal(permuted.codes(), q.codes()[order])
    for before, after in zip(parameters(q), parameters(permuted), strict=True):
        if before is not None:
            assert torch.equal(after, before if spec.granularity == "tensor" else before[order])


@given(weights(min_dims=2, max_dims=2), specs(scale_dtypes=(None,), granularity="group", scale_bits=None), st.data())
def test_a_group_depends_on_itself_alone(weight, spec, data):
    row = data.draw(st.integers(0, len(weight) - 1))
    group = data.draw(st.integers(0, spec.groups(weight.shape[1]) - 1))
    columns = slice(group * spec.group_size, (group + 1) * spec.group_size)
    other = torch.full(weight.shape, data.draw(numbers(weight.dtype)), dtype=weight.dtype)
    other[row, columns] = weight[row, columns]
    one, two = quantize(weight, spec), quantize(other, spec)
    alone = quantize(weight[row : row + 1, columns], spec)
    assert torch.equal(one.codes()[row, columns], two.codes()[row, columns])
    assert torch.equal(one.codes()[row, columns], alone.codes()[0])
    assert one.scale[row, group] == two.scale[row, group] == alone.scale[0, 0]


@given(problems(max_elements=400), st.integers(1, 100))
def test_the_size_of_a_block_changes_nothing(problem, block):
    weight, spec, layout = problem
    whole = quantize(weight, spec, layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        assert quantize(weight, spec, layout=layout).equal(whole)


@given(problems(), st.data())
def test_strides_change_nothing(problem, data):
    weight, spec, layout = problem
    strided = data.draw(restrided(weight))
    assert quantize(strided, spec, layout=layout).equal(quantize(strided.clone().contiguous(), spec, layout=layout))


@given(problems())
def test_the_weight_is_only_read(problem):
    weight, spec, layout = problem
    before = weight.clone()
    quantize(weight, spec, layout=layout)
    assert torch.equal(weight, before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_the_number_of_threads_changes_no_bit(threads, granularity, symmetric):
    group_size = 96 if granularity == "group" else None
    spec = QuantSpec(bits=4, granularity=granularity, group_size=group_size, symmetric=symmetric)
    weight = torch.randn(1031, 1000, generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2):
        threads(count)
        q = quantize(weight, spec)
        results.append((q, measure(weight, q)))
    (one, measured_by_one), (two, measured_by_two) = results
    assert one.equal(two)
    assert measured_by_one == measured_by_two


EXACT = {
    "all zeros": [0.0, -0.0, 0.0],
    "one constant": [0.75, 0.75, 0.75],
    "a negative constant": [-3.0, -3.0, -3.0],
    "a single element": [1.7],
    "a single negative element": [-1e-3],
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("row", EXACT.values(), ids=EXACT)
def test_a_constant_is_exact_except_for_the_rounding_of_its_scale(row, bits, symmetric):
    weight = torch.tensor([row], dtype=torch.float64)
    decoded = quantize(weight, QuantSpec(bits=bits, granularity="channel", symmetric=symmetric)).dequantize()
    assert torch.allclose(decoded, weight, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_takes_the_range_and_the_rest_goes_to_zero(symmetric, dtype):
    weight = torch.full((2, 40), 0.01, dtype=dtype)
    weight[0, 7] = 1000.0
    q = quantize(weight, QuantSpec(bits=4, granularity="channel", symmetric=symmetric))
    assert (q.dequantize(torch.float64)[0] != 0).nonzero().flatten().tolist() == [7]
    assert q.dequantize(torch.float64)[0, 7].item() == pytest.approx(1000.0, rel=2**-8)
    assert (q.dequantize(torch.float64)[1] - 0.01).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_below_half_the_smallest_scale_become_zero(dtype):
    tiny = torch.finfo(dtype).tiny
    weight = torch.tensor([[tiny * torch.finfo(dtype).eps, -tiny / 4, 0.0]], dtype=dtype)
    q = quantize(weight, CHANNEL)
    assert q.scale.item() == tiny
    assert torch.equal(q.codes(), torch.zeros(1, 3, dtype=torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scale_wider_than_its_weight_resolves_subnormals(dtype, symmetric):
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    weight = torch.tensor([[smallest, 0.0, -2 * smallest]], dtype=dtype)
    q = quantize(weight, QuantSpec(bits=8, granularity="channel", symmetric=symmetric, scale_dtype=torch.float64))
    assert q.dequantize(torch.float64)[0, 1] == 0
    assert torch.allclose(q.dequantize(torch.float64), weight.double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 63, 65])
def test_a_ragged_last_group_is_a_shorter_group(columns):
    spec = QuantSpec(bits=4, granularity="group", group_size=32)
    weight = torch.linspace(1, 2, 3 * columns).reshape(3, columns)
    q = quantize(weight, spec)
    last = columns - (columns - 1) // 32 * 32
    assert q.scale.shape == (3, -(-columns // 32))
    assert torch.equal(q.scale[:, -1:], quantize(weight[:, -last:], spec).scale)


def test_groups_of_one_element_have_a_scale_each():
    weight = torch.tensor([[1.0, -2.0, 0.0]])
    q = quantize(weight, QuantSpec(bits=4, granularity="group", group_size=1))
    assert q.codes().tolist() == [[7, -7, 0]]
    assert torch.allclose(q.dequantize(), weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_numbers_of_a_dtype_decode_to_finite_numbers(dtype, bits, symmetric):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, 0.0], [-largest, 0.0], [largest, -largest]], dtype=dtype)
    decoded = quantize(weight, QuantSpec(bits=bits, granularity="channel", symmetric=symmetric)).dequantize()
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_of_a_dtype_have_a_scale(dtype):
    weight = torch.full((1, 3), torch.finfo(dtype).max, dtype=dtype)
    q = quantize(weight, QuantSpec(bits=2, granularity="tensor"))
    assert q.scale.item() == torch.finfo(dtype).max


def test_a_scale_beyond_its_dtype_is_refused():
    weight = torch.tensor([[1.0, 2.0], [3.0, 1e9]])
    with pytest.raises(RangeError, match=r"magnitudes up to 1e\+09.*largest float16 \(65504\)"):
        quantize(weight, QuantSpec(bits=8, granularity="channel", scale_dtype=torch.float16))


@st.composite
def damaged(draw):
    """Draw (weight, layout, the first bad index in row-major order, the bad value)."""
    weight = draw(weights(min_dims=1)).clone(memory_format=torch.preserve_format)
    assume(0 not in [s for s, n in zip(weight.stride(), weight.shape, strict=True) if n > 1])
    places = sorted(draw(st.sets(st.integers(0, weight.numel() - 1), min_size=1, max_size=3)))
    bad = [draw(st.sampled_from([math.nan, math.inf, -math.inf])) for _ in places]
    indices = [tuple(int(i) for i in torch.unravel_index(torch.tensor(place), weight.shape)) for place in places]
    for index, value in zip(indices, bad, strict=True):
        weight[index] = value
    return weight, draw(layouts(tuple(weight.shape))), indices[0], bad[0]


@given(damaged(), specs(scale_dtypes=(None,)), st.sampled_from([1, 5, 10**6]))
def test_the_first_bad_index_is_named_in_the_tensor_s_own_shape(case, spec, block):
    weight, layout, index, value = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        with pytest.raises(NonFiniteError) as caught:
            quantize(weight, spec, layout=layout)
        with pytest.raises(NonFiniteError) as caught_by_cast:
            cast(weight, torch.float16)
    for error in (caught, caught_by_cast):
        assert f"the element at index {index} is {value};" in str(error.value)


def observers():
    ones, whole = torch.ones, {"dtype": torch.int32}
    return {
        "scales of another shape": (fixed(ones(1), None), True),
        "one scale for each column": (fixed(ones(1, 4), None), True),
        "scales of another dtype": (fixed(ones(3, 1).double(), None), True),
        "a scale of zero": (fixed(torch.tensor([[1.0], [0.0], [1.0]]), None), True),
        "a scale of NaN": (fixed(ones(3, 1) * math.nan, None), True),
        "a scale of Inf": (fixed(ones(3, 1) * math.inf, None), True),
        "a zero point where none belongs": (fixed(ones(3, 1), torch.zeros(3, 1, **whole)), True),
        "no zero point": (fixed(ones(3, 1), None), False),
        "a zero point above the codes": (fixed(ones(3, 1), torch.full((3, 1), 128, **whole)), False),
        "a zero point below the codes": (fixed(ones(3, 1), torch.full((3, 1), -129, **whole)), False),
        "a zero point that is not an integer": (fixed(ones(3, 1), ones(3, 1) / 2), False),
        "zero points of another shape": (fixed(ones(3, 1), torch.zeros(3, **whole)), False),
    }


@pytest.mark.parametrize(("choose", "symmetric"), observers().values(), ids=observers())
def test_an_observer_that_chooses_nonsense_is_refused(choose, symmetric):
    with pytest.raises(NumericsError, match="an observer"):
        quantize(torch.ones(3, 4), QuantSpec(bits=8, granularity="channel", symmetric=symmetric), choose)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_a_zero_point_may_be_of_any_integer_dtype(dtype):
    spec = QuantSpec(bits=8, granularity="channel", symmetric=False)
    zero_point = torch.tensor([[100], [3], [0]]).to(dtype)
    q = quantize(torch.ones(3, 4), spec, fixed(torch.ones(3, 1), zero_point))
    assert q.zero_points().flatten().tolist() == [100, 3, 0]
    assert q.dequantize().eq(1).all()


def test_an_observer_gets_the_rows_in_order_and_a_spec_with_its_scale_dtype():
    seen = []

    def choose(rows, spec):
        seen.append((rows.dtype, rows.clone(), spec.scale_dtype))
        return QuantParams(torch.ones(len(rows), 1, dtype=spec.scale_dtype))

    weight = torch.arange(12.0).reshape(4, 3).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 6)
        quantize(weight, CHANNEL, choose)
    dtypes, rows, scale_dtypes = zip(*seen, strict=True)
    assert (set(dtypes), set(scale_dtypes)) == ({torch.float32}, {torch.float16})
    assert torch.equal(torch.cat(rows), weight.float())


def test_an_observer_gets_the_whole_weight_for_a_scale_per_tensor():
    shapes = []

    def choose(rows, spec):
        shapes.append((tuple(rows.shape), rows.dtype))
        return QuantParams(torch.ones(1, dtype=spec.scale_dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 6)
        quantize(torch.ones(4, 3, dtype=torch.float16), QuantSpec(bits=8, granularity="tensor"), choose)
    assert shapes == [((4, 3), torch.float16)]


def test_a_matrix_is_quantized_like_a_tensor_with_a_layout():
    weight, layout = torch.randn(6, 4, 3), Layout.of((6, 4, 3), inputs=(0, 2))
    assert quantize(WeightMatrix(weight, layout), CHANNEL).equal(quantize(weight, CHANNEL, layout=layout))


def test_a_parameter_leaves_no_gradient_behind():
    parameter = nn.Parameter(torch.randn(3, 4))
    assert not any(part.requires_grad for part in quantize(parameter, CHANNEL).parts().values())


def test_a_view_with_a_pending_negation_is_negated_on_reading():
    negated = torch.complex(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)).conj().imag
    assert negated.is_neg()
    assert quantize(negated, CHANNEL).equal(quantize(negated.clone(), CHANNEL))


@pytest.mark.parametrize("function", [lambda x: quantize(x, CHANNEL).dequantize(), lambda x: cast(x, torch.float32)])
def test_a_scalar_is_a_tensor_of_one_element(function):
    assert torch.equal(function(torch.tensor(2.0)), torch.tensor(2.0))


# Casts.


@given(weights(min_dims=1), st.sampled_from(FLOATS))
def test_a_cast_is_within_half_a_unit_in_the_last_place(weight, dtype):
    info = torch.finfo(dtype)
    assume(weight.double().abs().max() <= info.max)
    result = cast(weight, dtype)
    assert (result.dtype, result.shape, result.is_contiguous()) == (dtype, weight.shape, True)
    for before, after in zip(fractions(weight), fractions(result), strict=True):
        assert (
            abs(before - after) <= abs(before) * Fraction(info.eps) / 2 + Fraction(info.tiny) * Fraction(info.eps) / 2
        )


@given(weights(min_dims=1), st.sampled_from(FLOATS), st.sampled_from([1, 5, 10**6]))
def test_a_cast_out_of_range_names_the_first_index(weight, dtype, block):
    beyond = [i for i, w in enumerate(weight.flatten().tolist()) if math.isinf(rounded(w, dtype))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        if not beyond:
            assert torch.isfinite(cast(weight, dtype)).all()
            return
        with pytest.raises(RangeError) as caught:
            cast(weight, dtype)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(beyond[0]), weight.shape))
    assert f"the element at index {index} is " in str(caught.value)


def test_a_cast_reports_nan_before_numbers_out_of_range():
    with pytest.raises(NonFiniteError, match=r"index \(1, 1\) is nan"):
        cast(torch.tensor([[1e30, 0.0], [1.0, math.nan]]), torch.float16)


@given(weights(min_dims=1))
def test_a_cast_to_its_own_dtype_is_a_copy(weight):
    copy = cast(weight, weight.dtype)
    assert torch.equal(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()
