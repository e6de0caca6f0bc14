"""The choice of scale and zero point, encoding, decoding, and the bound on the error."""

import math
from fractions import Fraction

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewbits import QuantSpec
from fewbits.errors import NumericsError, RangeError
from fewbits.extend import QuantParams
from fewbits.numerics.affine import bound_and_clipped, decode, encode
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.params import check_params
from fewbits.numerics.scales import choose_params, extremes, is_finite_throughout, rescaled
from support.strategies import FLOATS, fractions, numbers, per_element, problems, rounded, specs, ulp

HALF = Fraction(1, 2)


def channel(bits=8, symmetric=False, scale_dtype=torch.float32) -> QuantSpec:
    return QuantSpec(bits=bits, granularity="channel", symmetric=symmetric, scale_dtype=scale_dtype)


def choose(low: float, high: float, spec: QuantSpec) -> tuple[float, int]:
    """Choose scale and zero point of a single range."""
    bounds = [torch.tensor([[bound]], dtype=torch.float64) for bound in (low, high)]
    params = choose_params(*bounds, spec)
    return params.scale.item(), 0 if params.zero_point is None else int(params.zero_point)


@st.composite
def ranges(draw):
    spec = draw(specs(scale_dtypes=FLOATS, granularity="channel"))
    number = numbers(torch.float64, torch.finfo(spec.scale_dtype).max)
    return -abs(draw(number)), abs(draw(number)), spec


@given(problems())
def test_extremes_are_of_each_group_with_zero_included(problem):
    weight, spec, _ = problem
    x = weight.reshape(-1, weight.shape[-1])
    low, high = extremes(x, spec)
    width = {"tensor": x.numel(), "channel": x.shape[1], "group": spec.group_size}[spec.granularity]
    rows = [x.flatten()] if spec.granularity == "tensor" else x
    groups = [[group.tolist() for group in row.split(width)] for row in rows]
    assert low.dtype == high.dtype == x.dtype
    assert low.reshape(len(groups), -1).tolist() == [[min(0, *group) for group in row] for row in groups]
    assert high.reshape(len(groups), -1).tolist() == [[max(0, *group) for group in row] for row in groups]


@given(ranges())
def test_nothing_in_the_range_clips(case):
    low, high, spec = case
    scale, zero = choose(low, high, spec)
    slack = Fraction(max(-low, high)) / 2**52
    assert Fraction(high) <= (spec.code_max - zero + HALF) * Fraction(scale) + slack
    assert Fraction(low) >= (spec.code_min - zero - HALF) * Fraction(scale) - slack


@given(ranges())
def test_the_scale_is_rounded_to_nearest_or_up_if_the_nearest_would_clip(case):
    low, high, spec = case
    # For larger numbers a larger scale may be needed, so that no code decodes to Inf (see test_quantize.py).
    assume(max(-low, high) < torch.finfo(compute_dtype(spec.scale_dtype)).max / 2)
    scale, zero = choose(low, high, spec)
    steps = spec.code_max if spec.symmetric else spec.code_max - spec.code_min
    exact = max(-low, high) / steps if spec.symmetric else high / steps - low / steps
    nearest = max(rounded(exact, spec.scale_dtype), torch.finfo(spec.scale_dtype).tiny)
    assert scale in (nearest, nearest + ulp(nearest, spec.scale_dtype))
    if spec.symmetric:
        assert scale == nearest
    if scale > nearest:
        zero = min(max(round(spec.code_min - low / nearest), spec.code_min), spec.code_max)
        clips_high = high > nearest * (spec.code_max - zero + 0.5)
        # The zero point is a code, so it cannot follow a range that ends at zero.
        assert clips_high or low < nearest * (spec.code_min - zero - 0.5)


@given(ranges())
def test_the_zero_point_is_a_code_and_follows_from_the_stored_scale(case):
    low, high, spec = case
    scale, zero = choose(low, high, spec)
    assert spec.code_min <= zero <= spec.code_max
    if not spec.symmetric:
        assert abs(Fraction(spec.code_min) - Fraction(low) / Fraction(scale) - zero) <= HALF + Fraction(1, 2**40)


@pytest.mark.parametrize(
    ("bits", "dtype", "low", "high", "nearest"),
    [
        (8, torch.bfloat16, -0.671875, 6.28125, 0.0272216796875),
        (8, torch.bfloat16, -4.53125, 2.015625, 0.025634765625),
        (4, torch.bfloat16, -3.703125, 2.84375, 0.435546875),
        (2, torch.bfloat16, -5.0625, 5.078125, 3.375),
        (8, torch.float16, -2.1875, 6.453125, 0.03387451171875),
        (5, torch.float16, -7.109375, 3.140625, 0.33056640625),
    ],
)
def test_a_scale_whose_rounding_would_clip_is_rounded_up(bits, dtype, low, high, nearest):
    scale, _ = choose(low, high, channel(bits, scale_dtype=dtype))
    assert rounded((high - low) / (2**bits - 1), dtype) == nearest
    assert scale == nearest + ulp(nearest, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_scale_is_never_below_the_smallest_normal_number(dtype, symmetric):
    spec = channel(symmetric=symmetric, scale_dtype=dtype)
    assert choose(0.0, 0.0, spec)[0] == torch.finfo(dtype).tiny
    assert choose(-torch.finfo(dtype).tiny / 2, 0.0, spec)[0] == torch.finfo(dtype).tiny


@pytest.mark.parametrize(
    ("dtype", "largest"),
    # A number half a unit above the largest one rounds to infinity.
    [(torch.float16, 65519.99), (torch.bfloat16, 3.3961e38), (torch.float32, 3.40282356e38)],
)
def test_a_scale_beyond_its_dtype_is_refused(dtype, largest):
    spec = channel(bits=2, symmetric=True, scale_dtype=dtype)
    assert choose(-largest, 0.0, spec)[0] == torch.finfo(dtype).max
    with pytest.raises(RangeError, match=rf"beyond the largest {str(dtype)[6:]} \("):
        choose(-1.001 * largest, 0.0, spec)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_range_of_float64_has_a_scale(symmetric):
    largest = torch.finfo(torch.float64).max
    scale, zero = choose(-largest, largest, channel(symmetric=symmetric, scale_dtype=torch.float64))
    assert math.isfinite(scale)
    assert abs(zero) <= 1


@st.composite
def encodings(draw):
    """Draw a matrix with any scales and zero points that an observer may choose: wide, clipping, negative."""
    weight, spec, _ = draw(problems(scale_dtypes=(None, torch.float32)))
    x = weight.reshape(-1, weight.shape[-1])
    spec = spec.for_dtype(x.dtype)
    shape = spec.scale_shape(*x.shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    reach = x.double().abs().max().clamp(min=torch.finfo(spec.scale_dtype).tiny * 4)
    factor = draw(st.sampled_from([-0.3, 0.001, 0.01, 0.25, 1.0]))
    scale = (reach * factor * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))).to(spec.scale_dtype)
    tiny = torch.finfo(spec.scale_dtype).tiny
    scale = torch.where(scale.abs() < tiny, tiny, scale).clamp(max=torch.finfo(spec.scale_dtype).max)
    zero_point = torch.randint(spec.code_min, spec.code_max + 1, shape, generator=generator, dtype=torch.int32)
    params = QuantParams(scale, None if spec.symmetric else zero_point)
    if spec.scale_bits is not None:
        row_scale = scale.abs().amax(1, keepdim=True).clamp(min=tiny * spec.scale_parts)
        params = attrs.evolve(params, row_scale=row_scale).with_scale(scale, spec)
    return x, params, spec


def exact_terms(x, params, spec):
    """(w, s, z) of each element, as fractions."""
    zeros = torch.zeros_like(params.scale) if params.zero_point is None else params.zero_point
    return zip(
        *(fractions(t) for t in (x, *(per_element(p, spec, *x.shape) for p in (params.scale, zeros)))), strict=True
    )


@given(encodings())
def test_the_code_is_the_nearest_one_for_any_scale_and_zero_point(case):
    x, params, spec = case
    codes = encode(x, params, spec)
    assert codes.dtype == torch.uint8
    for code, (w, s, z) in zip(codes.flatten().tolist(), exact_terms(*case), strict=True):
        q = code + spec.code_min
        nearest = min(abs(w - (c - z) * s) for c in range(spec.code_min, spec.code_max + 1))
        assert spec.code_min <= q <= spec.code_max
        assert abs(w - (q - z) * s) <= nearest + abs(w) / 2**23


@given(encodings())
def test_decoding_is_the_formula_rounded_once(case):
    x, params, spec = case
    codes = encode(x, params, spec)
    decoded = decode(codes, params, spec, torch.float64)
    expected = [
        (code + spec.code_min - z) * s for code, (_, s, z) in zip(fractions(codes), exact_terms(*case), strict=True)
    ]
    assume(all(abs(value) <= torch.finfo(torch.float64).max for value in expected))
    assert decoded.dtype == torch.float64
    assert decoded.flatten().tolist() == [float(value) for value in expected]


@given(encodings())
def test_the_bound_is_half_a_step_or_the_distance_to_the_representable_range(case):
    x, params, spec = case
    bounds = bound_and_clipped(x.double(), params, spec)[0].flatten().tolist()
    for bound, (w, s, z) in zip(bounds, exact_terms(*case), strict=True):
        ends = sorted([(spec.code_min - z) * s, (spec.code_max - z) * s])
        beyond = max(ends[0] - w, w - ends[1], Fraction(0))
        assert bound == pytest.approx(float(max(beyond, abs(s) / 2) + abs(w) / 2**23), rel=1e-6)


@given(encodings())
def test_zero_is_exactly_zero_whatever_the_zero_point(case):
    x, params, spec = case
    for zeros in (torch.zeros_like(x), -torch.zeros_like(x)):
        decoded = decode(encode(zeros, params, spec), params, spec, torch.float64)
        assert torch.equal(decoded, torch.zeros_like(decoded))


@given(encodings())
def test_what_was_chosen_well_is_taken_as_it_is(case):
    x, params, spec = case
    taken, zero_point = check_params(params, spec, tuple(x.shape)), params.zero_point
    assert torch.equal(taken.scale, params.scale)
    assert taken.zero_point is zero_point is None or torch.equal(taken.zero_point.int(), zero_point)


GOOD_SCALE, GOOD_ZERO = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (torch.ones(3, 1), GOOD_ZERO, r"shape \(3, 1\).*needs shape \(3, 2\)"),
        (torch.ones(2, 3), GOOD_ZERO, r"shape \(2, 3\)"),
        (torch.ones(6), GOOD_ZERO, r"shape \(6,\)"),
        (torch.tensor(1.0), GOOD_ZERO, r"shape \(\)"),
        (torch.ones(3, 2, dtype=torch.float64), GOOD_ZERO, "float64"),
        (torch.ones(3, 2, dtype=torch.int32), GOOD_ZERO, "int32"),
        (GOOD_SCALE * torch.tensor([1.0, 0.0]), GOOD_ZERO, "zero, NaN or Inf"),
        (GOOD_SCALE * math.nan, GOOD_ZERO, "zero, NaN or Inf"),
        (GOOD_SCALE * -math.inf, GOOD_ZERO, "zero, NaN or Inf"),
        (GOOD_SCALE, None, "symmetric specs must have none"),
        (GOOD_SCALE, GOOD_ZERO + 8, "between -8 and 7"),
        (GOOD_SCALE, GOOD_ZERO - 9, "between -8 and 7"),
        (GOOD_SCALE, GOOD_ZERO[:1], "integers of shape"),
        (GOOD_SCALE, GOOD_ZERO.float(), "not integers"),
        (GOOD_SCALE, GOOD_ZERO.bool(), "not integers"),
        (1.0, GOOD_ZERO, "scale"),
        (GOOD_SCALE, 0, "zero point"),
    ],
)
def test_invalid_scales_and_zero_points_are_refused(scale, zero_point, message):
    spec = QuantSpec(bits=4, granularity="group", group_size=4, symmetric=False, scale_dtype=torch.float32)
    with pytest.raises(NumericsError, match=message):
        check_params(QuantParams(scale, zero_point), spec, (3, 5))


def test_a_symmetric_spec_has_no_zero_point():
    spec = QuantSpec(bits=4, granularity="group", group_size=4, scale_dtype=torch.float32)
    with pytest.raises(NumericsError, match="symmetric specs must have none"):
        check_params(QuantParams(GOOD_SCALE, GOOD_ZERO), spec, (3, 5))


@given(st.sampled_from(FLOATS), st.floats(-100, 100), st.sampled_from([-1.0, 1.0]), st.floats(1e-6, 6e4))
def test_a_rescaled_scale_keeps_dtype_and_sign_and_no_code_overflows(dtype, log_factor, sign, magnitude):
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype=dtype)
    before = QuantParams(torch.tensor([[sign * magnitude]], dtype=torch.float64).to(dtype))
    after = rescaled(before, torch.full((1, 1), log_factor, dtype=torch.float64), torch.zeros(()), spec)
    assert after.scale.dtype == dtype
    assert (float(after.scale) > 0) == (sign > 0)
    assert abs(float(after.scale)) >= min(torch.finfo(dtype).tiny, abs(float(before.scale)))
    assert bool(is_finite_throughout(after, spec)) or torch.equal(after.scale, before.scale)
    # With torch's exponential: that of another library may differ in the last bit of a float64.
    asked = float(before.scale.double() * torch.tensor(log_factor, dtype=torch.float64).exp())
    if torch.finfo(dtype).tiny <= abs(asked) <= torch.finfo(dtype).max / 8:
        assert float(after.scale) == pytest.approx(asked, rel=torch.finfo(dtype).eps)


def test_a_factor_of_one_keeps_even_a_subnormal_scale():
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype=torch.float16)
    before = QuantParams(torch.tensor([[1e-7]], dtype=torch.float16))
    assert torch.equal(rescaled(before, torch.zeros(1, 1), torch.zeros(()), spec).scale, before.scale)
