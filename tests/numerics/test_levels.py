"""Codes with levels, compared with exact fractions in plain Python."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import attrs
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import fewbits
from fewbits import MinMaxObserver, QuantSpec, measure
from fewbits.errors import ArgumentError, FormatError, NumericsError, RangeError
from fewbits.extend import Layout, QuantParams
from fewbits.numerics.affine import bound_and_clipped, decode, encode
from fewbits.numerics.dtypes import POWERS_OF_TWO, SCALE_DTYPES, compute_dtype
from fewbits.numerics.levels import E2M1, E4M3
from fewbits.numerics.levels import NF4 as OURS
from fewbits.numerics.packing import pack
from fewbits.numerics.quantize import quantize
from fewbits.numerics.scales import choose_params
from fewbits.numerics.spec import spec_from_dict
from support.lifecycle_helpers import small
from support.strategies import FLOATS, as_matrix, fractions, layouts, per_element, rounded, ulp, weights

#: NF4 (quantiles of a normal distribution), and the numbers of other formats in use.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (-8.0, -6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TERNARY = (-1.0, 0.0, 1.0, 1.5)
KNOWN = {
    "NF4": NF4,
    "FP4": FP4,
    "e2m1": E2M1,
    "ternary": TERNARY[:3],
    "ternary and one": TERNARY,
    "integers": tuple(map(float, range(-8, 8))),
}


@st.composite
def level_tuples(draw):
    """Draw 3 to 16 rising numbers around 0, spread evenly or unevenly."""
    if draw(st.booleans()):
        return draw(st.sampled_from([*KNOWN.values()]))
    count = draw(st.integers(3, 16))
    negative = draw(st.integers(1, count - 2))
    sizes = st.floats(2.0**-6, 64.0, width=32)
    below = draw(st.lists(sizes, min_size=negative, max_size=negative, unique=True))
    above = draw(st.lists(sizes, min_size=count - 1 - negative, max_size=count - 1 - negative, unique=True))
    return (*sorted(-size for size in below), 0.0, *sorted(above))


@st.composite
def leveled_specs(draw):
    levels = draw(level_tuples())
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    return QuantSpec(
        bits=(len(levels) - 1).bit_length(),
        granularity=granularity,
        group_size=draw(st.integers(1, 9)) if granularity == "group" else None,
        scale_dtype=draw(st.sampled_from((None, *SCALE_DTYPES))),
        levels=levels,
    )


@st.composite
def problems(draw):
    """Draw (weight, spec, layout), where a scale of 64 times the largest magnitude is finite."""
    spec, dtype = draw(leveled_specs()), draw(st.sampled_from(FLOATS))
    limit = min(torch.finfo(d).max for d in (dtype, spec.scale_dtype or dtype)) * 2.0**-8
    weight = draw(weights((dtype,), min_dims=1, limit=limit))
    return weight, spec, draw(layouts(tuple(weight.shape)))


def elements(weight, q):
    """Yield (weight, unsigned code, scale) of each element; weight and scale as fractions."""
    scale = per_element(q.scale, q.spec, *q.layout.matrix_shape)
    codes = (q.codes().to(torch.int64) - q.spec.code_min).flatten().tolist()
    return zip(fractions(as_matrix(weight, q.layout)), codes, fractions(scale), strict=True)


def groups_of(weight, q):
    """Yield (all elements that share a scale, the scale), as fractions."""
    matrix, spec = as_matrix(weight, q.layout), q.spec
    width = {"tensor": matrix.numel(), "channel": q.layout.columns, "group": spec.group_size}[spec.granularity]
    rows = [matrix.flatten()] if spec.granularity == "tensor" else matrix
    parts = [fractions(group) for row in rows for group in row.split(width)]
    return zip(parts, fractions(q.scale), strict=True)


def bound_of(w, s, levels):
    """Return half the distance between the two levels around an element, or its distance to the nearer end."""
    steps = [Fraction(level) * s for level in levels]
    if not steps[0] <= w <= steps[-1]:
        inside = steps[1] - steps[0] if w < 0 else steps[-1] - steps[-2]
        return max(inside / 2, steps[0] - w, w - steps[-1])
    return max((high - low) / 2 for low, high in pairwise(steps) if low <= w <= high)


# Properties of every tensor and any levels.


@given(problems())
def test_every_element_takes_the_nearest_level(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    for w, code, s in elements(weight, q):
        distances = [abs(w - Fraction(level) * s) for level in spec.levels]
        # The quotient of element and scale is rounded, which can decide between two equally near levels.
        assert distances[code] <= min(distances) + abs(w) / 2**22


@given(problems())
def test_every_element_is_within_half_the_distance_of_the_levels_around_it(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    for w, code, s in elements(weight, q):
        assert abs(w - Fraction(spec.levels[code]) * s) <= bound_of(w, s, spec.levels) + abs(w) / 2**23
    measured = measure(weight, q)
    assert measured.broken_at is None
    assert measured.worst_bound_ratio <= 1
    assert measured.clipped == 0


@given(problems())
def test_the_bound_agrees_with_exact_fractions(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    x = as_matrix(weight, layout).double()
    bounds = bound_and_clipped(x, q.params(), q.spec)[0].flatten().tolist()
    for (w, _, s), bound in zip(elements(weight, q), bounds, strict=True):
        expected = bound_of(w, s, spec.levels) + abs(w) / 2**23
        # For an element on a level, up to the rounding of a float64 quotient, the bound may use either neighbour.
        # Quotients below the smallest subnormal number are skipped.
        steps, near = [Fraction(level) * s for level in spec.levels], abs(w) / 2**50 + s * Fraction(2) ** -1074
        around = [high - low for low, high in pairwise(steps) if low - near <= w <= high + near]
        least, most = (min(around) / 2, max(around) / 2 + abs(w) / 2**23) if around[1:] else (expected, expected)
        assert float(least) * (1 - 1e-9) <= bound <= float(most) * (1 + 1e-9)


@given(problems())
def test_zero_stays_exactly_zero(problem):
    weight, spec, layout = problem
    weight = torch.where(torch.arange(weight.numel()).reshape(weight.shape) % 3 == 0, -0.0, weight)
    q = quantize(weight, spec, layout=layout)
    assert all(spec.levels[code] == 0 for w, code, _ in elements(weight, q) if w == 0)
    assert (q.dequantize()[weight == 0] == 0).all()


@given(problems())
def test_the_scale_is_the_smallest_with_which_nothing_clips(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    dtype, first, last = q.scale.dtype, Fraction(spec.levels[0]), Fraction(spec.levels[-1])
    gaps = Fraction(spec.levels[1]) - first, last - Fraction(spec.levels[-2])
    for group, s in groups_of(weight, q):
        low, high = min(0, *group), max(0, *group)
        exact = max(low / first, high / last)
        nearest = Fraction(max(rounded(float(exact), dtype), torch.finfo(dtype).tiny))
        assert s in (nearest, nearest + Fraction(ulp(float(nearest), dtype)))
        slack = (high - low) / 2**50
        assert high <= s * (last + gaps[1] / 2) + slack
        assert low >= s * (first - gaps[0] / 2) - slack
        if s > nearest:
            assert high > nearest * (last + gaps[1] / 2) or low < nearest * (first - gaps[0] / 2)


@given(problems())
def test_a_code_decodes_to_its_level_times_the_scale(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    real = compute_dtype(q.scale.dtype)
    levels = torch.tensor(spec.levels, dtype=real)
    codes = q.codes().to(torch.int64) - spec.code_min
    expected = levels[codes] * per_element(q.scale, spec, *layout.matrix_shape).to(real)
    assert torch.equal(as_matrix(q.dequantize(real), layout), expected)


@given(problems())
def test_quantizing_decoded_codes_gives_the_same_codes(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    decoded = q.dequantize(compute_dtype(q.scale.dtype))
    again = quantize(decoded, q.spec, lambda rows, spec: QuantParams(q.scale), layout=layout)
    # Levels that differ by less than the smallest number decode to the same number.
    assert torch.equal(again.dequantize(decoded.dtype), decoded)


@given(problems(), st.integers(1, 100))
def test_the_size_of_a_block_changes_nothing(problem, block):
    weight, spec, layout = problem
    whole = quantize(weight, spec, layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        assert quantize(weight, spec, layout=layout).equal(whole)


@given(problems())
def test_the_default_is_the_min_max_observer(problem):
    weight, spec, layout = problem
    chosen = quantize(weight, spec, MinMaxObserver().observe_weight, layout=layout)
    assert chosen.equal(quantize(weight, spec, layout=layout))


@given(problems())
def test_a_tensor_is_rebuilt_from_its_parts_and_json(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    again = spec_from_dict(json.loads(json.dumps(q.spec.to_dict())))
    assert again == q.spec
    assert "zero_point" not in q.parts()
    assert fewbits.QuantizedTensor.from_parts(q.parts(), spec=again, layout=layout, dtype=weight.dtype).equal(q)


class Leveled(fewbits.Quantizer):
    """A scheme with any levels, in any granularity."""

    def __init__(self, spec, **strategies):
        self.spec = spec
        super().__init__(**{"ragged": "shorter"} | strategies)


@given(problems().filter(lambda problem: problem[0].dim() > 1))
def test_levels_go_through_a_file(tmp_path_factory, problem):
    weight, spec, _ = problem
    path = tmp_path_factory.mktemp("levels") / "f"
    result = fewbits.quantize({"m.weight": weight.contiguous()}, small(Leveled, spec), on_failure="ignore")
    assert not [failure for failure in result.report.failures if "SQNR" not in failure]
    result.save(path)
    loaded = fewbits.load(path)["m.weight"]
    assert loaded.equal(result.model["m.weight"])
    assert loaded.spec.levels == spec.levels
    assert load_file(path)["m.weight_packed"].dtype == torch.int32


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("levels", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_a_layer_computes_with_levels_as_dequantized_and_comes_back_from_a_file(levels, dtype, granularity, tmp_path):
    group_size = 7 if granularity == "group" else None
    spec = QuantSpec((len(levels) - 1).bit_length(), granularity, group_size=group_size, levels=levels)
    torch.manual_seed(0)
    layer = nn.Linear(20, 6, dtype=dtype)
    result = fewbits.quantize(layer, small(Leveled, spec), fail_under=0)
    result.save(tmp_path / "f")
    loaded = fewbits.load(tmp_path / "f", into=nn.Linear(20, 6, dtype=dtype))
    x = torch.randn(3, 20, dtype=dtype)
    for model in (result.model, loaded):
        assert torch.equal(model(x), fewbits.dequantize(result.model)(x))
    assert fewbits.verify(tmp_path / "f", layer, fail_under=0).ok


# Single cases.


@pytest.mark.parametrize("levels", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("exponent", [-3, 0, 5])
def test_multiples_of_the_levels_are_exact(levels, exponent):
    weight = torch.tensor([levels]) * 2.0**exponent
    q = quantize(weight, QuantSpec((len(levels) - 1).bit_length(), "channel", levels=levels))
    assert q.scale.item() == 2.0**exponent
    assert q.codes().flatten().tolist() == list(range(q.spec.code_min, q.spec.code_max + 1))
    assert torch.equal(q.dequantize(), weight)
    assert measure(weight, q).noise == 0


def test_integers_as_levels_are_integer_codes_that_use_the_lowest_one():
    levels = tuple(map(float, range(-8, 8)))
    weight = torch.tensor([[-8.0, 7.0, 3.0, -1.0]])
    leveled = quantize(weight, QuantSpec(bits=4, granularity="channel", levels=levels))
    assert leveled.codes().tolist() == [[-8, 7, 3, -1]]
    plain = quantize(weight, QuantSpec(bits=4, granularity="channel"))
    assert plain.scale.item() > leveled.scale.item() == 1


def test_the_scale_fits_the_largest_level_of_each_sign():
    levels = (-4.0, -2.0, -1.0, 0.0, 0.25, 0.5, 0.75, 1.0)
    spec = QuantSpec(bits=3, granularity="channel", levels=levels)
    for row, scale in (([-4.0, 1.0], 1.0), ([-8.0, 1.0], 2.0), ([-4.0, 3.0], 3.0), ([-1.0, 0.0], 0.25)):
        assert quantize(torch.tensor([row]), spec).scale.item() == scale


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_has_its_number_of_levels(bits):
    levels = tuple(float(i) for i in range(-1, 2**bits - 1))
    weight = torch.tensor([levels])
    q = quantize(weight, QuantSpec(bits, "channel", levels=levels))
    assert torch.equal(q.dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 4])
def test_levels_cost_no_byte(bits):
    weight = torch.randn(16, 64)
    levels = {2: TERNARY, 4: NF4}[bits]
    assert quantize(weight, QuantSpec(bits, "channel", levels=levels)).nbytes == (
        quantize(weight, QuantSpec(bits, "channel")).nbytes
    )


def test_nf4_is_better_than_int4_on_normal_weights():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    sqnr = {
        levels: measure(weight, quantize(weight, QuantSpec(4, "group", group_size=64, levels=levels))).sqnr_db
        for levels in (None, NF4)
    }
    assert sqnr[NF4] > sqnr[None]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("levels", KNOWN.values(), ids=KNOWN)
def test_the_largest_numbers_of_a_dtype_decode_to_finite_numbers(dtype, levels):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, 0.0], [-largest, 0.0], [largest, -largest]], dtype=dtype)
    q = quantize(weight, QuantSpec((len(levels) - 1).bit_length(), "channel", levels=levels))
    assert torch.isfinite(q.dequantize()).all()
    assert measure(weight, q).broken_at is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_scale_beyond_its_dtype_is_refused(dtype):
    levels = tuple(level / 4 for level in NF4)
    with pytest.raises(RangeError, match="beyond the largest"):
        quantize(torch.tensor([[torch.finfo(dtype).max]], dtype=dtype), QuantSpec(4, "tensor", levels=levels))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_and_subnormals_have_the_smallest_normal_scale(dtype):
    tiny = torch.finfo(dtype).tiny
    weight = torch.tensor([[0.0, -0.0, tiny * torch.finfo(dtype).eps]], dtype=dtype)
    q = quantize(weight, QuantSpec(4, "channel", levels=NF4))
    assert q.scale.item() == tiny
    assert not q.dequantize().any()


def test_torch_warns_for_no_strides():
    torch.set_warn_always(True)  # by default torch warns once per process
    try:
        weight = torch.randn(8, 6).T
        q = quantize(weight, QuantSpec(4, "channel", levels=NF4))
        assert measure(weight, q).broken_at is None
    finally:
        torch.set_warn_always(False)


def test_the_bound_holds_for_negative_and_for_clipping_scales():
    spec = QuantSpec(4, "channel", scale_dtype=torch.float32, levels=FP4)
    x = torch.tensor([[-9.0, -8.5, 0.3, 5.2, 6.9, 20.0]])
    for scale in (torch.tensor([[1.0]]), torch.tensor([[-1.0]])):
        params = QuantParams(scale)
        decoded = decode(encode(x, params, spec), params, spec, torch.float64)
        expected = min(FP4, key=lambda level: abs(level * float(scale) - 20.0)) * float(scale)
        assert decoded[0, -1] == expected
        error = (x.double() - decoded).abs()
        bound, clipped = bound_and_clipped(x.double(), params, spec)
        assert (error <= bound).all()
        outside = clipped[0].tolist()
        low, high = sorted(level * float(scale) for level in (FP4[0], FP4[-1]))
        # An element up to half the distance of the last two levels outside counts as inside.
        assert outside == [not low - 1 <= w <= high + 1 for w in x[0].tolist()]


def test_params_with_a_zero_point_are_refused():
    spec = QuantSpec(4, "channel", levels=NF4)
    zero_points = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(NumericsError, match="zero point"):
        quantize(torch.ones(3, 4), spec, lambda rows, spec: QuantParams(torch.ones(3, 1), zero_points))


def test_a_range_of_zero_width_is_handled():
    spec = QuantSpec(4, "channel", scale_dtype=torch.float32, levels=NF4)
    zero = torch.zeros(2, 1)
    params = choose_params(zero, zero, spec)
    assert params.scale.tolist() == [[torch.finfo(torch.float32).tiny]] * 2
    assert params.zero_point is None


# Which levels are valid.


@given(level_tuples())
def test_levels_keep_their_order_and_are_rounded_to_float32(levels):
    bits = (len(levels) - 1).bit_length()
    spec = QuantSpec(bits, "channel", levels=list(levels))
    assert spec.levels == tuple(torch.tensor(levels, dtype=torch.float32).tolist())
    assert spec == QuantSpec(bits, "channel", levels=levels)
    assert hash(spec) == hash(QuantSpec(bits, "channel", levels=levels))
    assert spec != QuantSpec(bits, "channel")
    assert str(spec) in (f"{len(levels)} levels channel", "nf4 channel", "e2m1 channel")


@given(level_tuples(), st.data())
def test_levels_in_another_order_are_refused(levels, data):
    shuffled = data.draw(st.permutations(levels).filter(lambda order: tuple(order) != levels))
    with pytest.raises(ArgumentError, match="rising order"):
        QuantSpec((len(levels) - 1).bit_length(), "channel", levels=shuffled)


@given(level_tuples(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_levels_that_are_not_finite_are_refused(levels, bad, data):
    place = data.draw(st.integers(0, len(levels) - 1))
    with pytest.raises(ArgumentError, match="finite numbers"):
        QuantSpec((len(levels) - 1).bit_length(), "channel", levels=[*levels[:place], bad, *levels[place + 1 :]])


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        ((-1.0, 0.0), "too few"),
        ((-2.0, -1.0, 0.0, 1.0, 2.0), "too many"),
        ((), "none"),
        ((-1.0, 0.5, 1.0, 2.0), "without zero"),
        ((0.0, 1.0, 2.0, 3.0), "zero first"),
        ((-3.0, -2.0, -1.0, 0.0), "zero last"),
        ((-1.0, 0.0, 0.0, 1.0), "zero twice"),
        ((-1.0, -0.0, 0.0, 1.0), "zeros of both signs"),
        ((-1.0, 0.0, 1.0, 1.0), "one twice"),
        ((-1.0, 0.0, 1.0, 1.0 + 2.0**-40), "twice the same in float32"),
        ((-1.0, 0.0, 1e-40, 1.0), "subnormal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_levels_that_are_not_rising_numbers_around_zero_are_refused(levels, why):
    with pytest.raises(
        ArgumentError, match="levels of 2 bits must be 3 to 4 finite numbers in rising order, none of them"
    ):
        QuantSpec(2, "channel", levels=levels)


def test_a_level_that_float32_rounds_to_zero_is_zero():
    assert QuantSpec(2, "channel", levels=(-1.0, 1e-60, 1.0, 2.0)).levels == (-1.0, 0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    "junk", [4, True, "nf4", ["a", "b", "c", "d"], [None] * 4, [-1.0, 0.0, 1.0, 1e60], 0.5], ids=str
)
def test_levels_that_are_not_numbers_are_refused(junk):
    with pytest.raises(ArgumentError, match="levels"):
        QuantSpec(2, "channel", levels=junk)


def test_levels_go_with_symmetric_specs_only():
    with pytest.raises(ArgumentError, match="levels need symmetric=True"):
        QuantSpec(2, "channel", symmetric=False, levels=TERNARY)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_levels_do_not_go_with_int8_activations(activations):
    with pytest.raises(ArgumentError, match="int8 activations need integer codes"):
        QuantSpec(2, "channel", activations=activations, levels=TERNARY)


EDITS = {
    "two less": lambda fields: fields.update(levels=[-1.0, 0.0]),
    "falling": lambda fields: fields["levels"].reverse(),
    "another width": lambda fields: fields.update(bits=3),
    "a number": lambda fields: fields.update(levels=4),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_description_with_other_levels_is_refused(edit):
    fields = QuantSpec(2, "channel", levels=TERNARY).to_dict()
    assert spec_from_dict(dict(fields)) == QuantSpec(2, "channel", levels=TERNARY)
    edit(fields)
    with pytest.raises(ArgumentError):
        spec_from_dict(fields)


@pytest.mark.parametrize("levels", KNOWN.values(), ids=KNOWN)
def test_bits_cannot_change_without_the_levels(levels):
    spec = QuantSpec((len(levels) - 1).bit_length(), "channel", levels=levels)
    with pytest.raises(ArgumentError, match="levels of 5 bits must be 17 to 32"):
        attrs.evolve(spec, bits=5)
    assert attrs.evolve(spec, levels=None, bits=5).levels is None


def test_a_layout_of_any_shape_has_levels():
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    layout = Layout.of((3, 4, 5), inputs=(1,))
    q = quantize(weight, QuantSpec(4, "channel", levels=NF4), layout=layout)
    assert (q.dequantize() - weight).abs().max() < 0.6
    assert q.scale.shape == (15, 1)


def test_the_levels_of_nf4_and_mxfp4_are_those_of_their_formats():
    assert OURS == NF4
    assert E2M1 == (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert len(E4M3) == 253


# Codes without a level.


@given(level_tuples(), st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_code_without_a_level_is_refused_and_decodes_to_nan(levels, rows, columns, data):
    spec = QuantSpec((len(levels) - 1).bit_length(), "channel", levels=levels)
    layout, params = Layout.of((rows, columns)), QuantParams(torch.ones(rows, 1))
    codes = torch.randint(spec.code_min, spec.code_max + 1, (rows, columns), generator=torch.Generator().manual_seed(0))
    valid = fewbits.QuantizedTensor.from_codes(codes, params, spec=spec, layout=layout, dtype=torch.float32)
    assert valid.has_valid_codes()
    assert valid.dequantize().isfinite().all()
    if not spec.invalid_codes:
        return
    at = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    codes[at] = data.draw(st.integers(spec.code_max + 1, 2 ** (spec.bits - 1) - 1))
    with pytest.raises(FormatError, match=f"must lie between {spec.code_min} and {spec.code_max}"):
        fewbits.QuantizedTensor.from_codes(codes, params, spec=spec, layout=layout, dtype=torch.float32)
    unsigned = (codes - spec.code_min).to(torch.uint8)
    broken = attrs.evolve(valid, packed=pack(unsigned, spec.bits))
    assert not broken.has_valid_codes()
    assert broken.dequantize().isnan().nonzero().tolist() == [list(at)]


# Scales that are powers of two.


@pytest.mark.skipif(POWERS_OF_TWO is None, reason="torch 2.6 has no such dtype")
@given(problems())
def test_a_power_of_two_is_the_smallest_with_which_nothing_clips(problem):
    weight, spec, layout = problem
    assume(float(weight.abs().amax()) <= 2.0**126)  # the largest scale is 2**127
    q = quantize(weight, attrs.evolve(spec, scale_dtype=POWERS_OF_TWO), layout=layout)
    levels = [*map(Fraction, spec.levels)]
    lowest, highest = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    for group, s in groups_of(weight, q):
        low, high = min(0, *group), max(0, *group)
        assert math.frexp(s)[0] == 0.5
        assert lowest * s <= low
        assert high <= highest * s
        if s > Fraction(2) ** -127:
            assert levels[0] * s / 2 > low or high > levels[-1] * s / 2
