"""Products of int8 inputs and integer codes are exact: compared with sums in 64-bit integers."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import QuantSpec
from fewbits.kernels import integers
from fewbits.kernels.digits import digits_of
from fewbits.kernels.integers import MOST_INPUTS, refuses_int_mm
from fewbits.kernels.reference import REFERENCE
from fewbits.numerics.affine import decode
from fewbits.testing.kernel_outputs import LEVELS, any_codes, as_dynamic, generator
from kernels.kernel_cases import BY_NAME, INT8, any_words, exactly, linear, normal, quantized, with_codes

needs_int_mm = pytest.mark.skipif(bool(refuses_int_mm()), reason=str(refuses_int_mm()))
WHOLE_ROWS = [
    pytest.param(BY_NAME["int_mm"], marks=needs_int_mm, id="int_mm"),
    pytest.param(BY_NAME["float_sums"], id="float_sums"),
]
TILES = BY_NAME["tile_int_mm"]
#: Levels whose digits reach farther than the largest level.
CROWDED = (-1.0, 0.0, *(0.992 + step / 1000 for step in range(9)))
EVERY = [*WHOLE_ROWS, pytest.param(TILES, marks=needs_int_mm, id="tile_int_mm")]
ASYMMETRIC = QuantSpec(bits=8, granularity="channel", symmetric=False)


def ends(rows, inputs):
    """Codes of int8 inputs: rows at either end, rows that alternate, and rows of any."""
    codes = torch.randint(-128, 128, (rows, inputs), generator=generator(5))
    codes[0], codes[1 % rows] = -128, 127
    codes[2 % rows, ::2], codes[2 % rows, 1::2] = 127, -128
    return codes


def weight_at_ends(spec, inputs):
    codes = any_codes((33, inputs), spec, generator(6))
    codes[::4], codes[1::4] = spec.code_min, spec.code_max
    zero_point = None
    if not spec.symmetric:
        zero_point = torch.full(spec.scale_shape(33, inputs), spec.code_min, dtype=torch.int32)
        zero_point[::3] = spec.code_max
    return with_codes(codes, spec, torch.ones(spec.scale_shape(33, inputs)), zero_point)


def sums(words, codes):
    """In 64-bit integers."""
    return codes @ words.centered_codes().long().t()


def with_static_scale(words):
    """Inputs that are whole numbers are their own codes."""
    return attrs.evolve(words, spec=attrs.evolve(words.spec, activations="static"), input_scale=torch.ones(1))


@pytest.mark.parametrize("kernel", WHOLE_ROWS)
@pytest.mark.parametrize("spec", [INT8, QuantSpec(bits=8, granularity="tensor"), ASYMMETRIC], ids=str)
@pytest.mark.parametrize("inputs", [9, 15, 64, 1023, 1024, 1025, 5000, MOST_INPUTS])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_sums_of_whole_rows_are_those_of_64_bit_integers(kernel, spec, inputs, rows):
    words, codes = with_static_scale(weight_at_ends(spec, inputs)), ends(rows, inputs)
    assert kernel.supports(words) is None
    found = kernel.linear(codes.float(), kernel.prepack(words))
    assert found.dtype == torch.float32
    assert torch.equal(found, sums(words, codes).float())


@needs_int_mm
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("inputs", [64, 1000, 4096, MOST_INPUTS])
def test_sums_of_tiles_without_groups_are_those_of_64_bit_integers(bits, inputs):
    spec = QuantSpec(bits=bits, granularity="channel", symmetric=False)
    words, codes = with_static_scale(weight_at_ends(spec, inputs)), ends(3, inputs)
    assert torch.equal(TILES.linear(codes.float(), TILES.prepack(words)), sums(words, codes).float())


@pytest.mark.parametrize("name", ["int_mm", "float_sums", "tile_int_mm"])
def test_more_products_than_fit_int32_are_refused(name):
    kernel, spec = BY_NAME[name], INT8
    if kernel is TILES:
        spec = QuantSpec(bits=4, granularity="group", group_size=64)
    assert MOST_INPUTS == 2**16 - 1
    assert "may not fit int32" in kernel.supports(any_words(spec, 32, MOST_INPUTS + 1))
    assert "may not fit int32" not in str(kernel.supports(any_words(spec, 32, MOST_INPUTS)))


@pytest.mark.parametrize("kernel", WHOLE_ROWS)
@given(data=st.data())
def test_whole_rows_have_the_bits_of_the_reference(kernel, data):
    spec = QuantSpec(
        bits=8,
        granularity=data.draw(st.sampled_from(["tensor", "channel"])),
        symmetric=data.draw(st.booleans()),
        scale_dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        activations=data.draw(st.sampled_from(["dynamic", "static"])),
    )
    size = st.sampled_from([1, 2, 16, 17, 33, 64, 100, 1030])
    words = any_words(spec, data.draw(size), data.draw(size), seed=data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = normal(data.draw(st.sampled_from([1, 2, 5, 40])), words.layout.columns, dtype=dtype)
    x = x * data.draw(st.sampled_from([1.0, 0.0, 1e-30, 100.0, 1e4]))
    assert torch.equal(kernel.linear(x, kernel.prepack(words)).to(dtype), REFERENCE.linear(x, words))


@needs_int_mm
@given(data=st.data())
def test_tiles_without_groups_have_the_bits_of_the_reference(data):
    spec = QuantSpec(
        bits=data.draw(st.integers(2, 5)),
        granularity=data.draw(st.sampled_from(["tensor", "channel"])),
        symmetric=data.draw(st.booleans()),
        activations=data.draw(st.sampled_from(["dynamic", "static"])),
    )
    size = st.sampled_from([33, 64, 100, 130])
    words = any_words(spec, data.draw(size), data.draw(size), seed=data.draw(st.integers(0, 99)))
    x = normal(data.draw(st.sampled_from([1, 5, 70])), words.layout.columns)
    assert torch.equal(TILES.linear(x, TILES.prepack(words)), REFERENCE.linear(x, words))


@needs_int_mm
@given(data=st.data())
def test_tiles_in_groups_lose_half_a_step_of_the_row(data):
    levels = data.draw(st.sampled_from([None, LEVELS, CROWDED]))
    spec = QuantSpec(
        bits=4 if levels else data.draw(st.integers(2, 5)),
        granularity="group",
        group_size=32,
        symmetric=levels is not None or data.draw(st.booleans()),
        levels=levels,
    )
    words = any_words(spec, 70, 96, seed=data.draw(st.integers(0, 99)))
    reach, off = 1.0, 0.0
    if levels is not None:
        digits = digits_of(spec)
        read = torch.tensor(digits.units) @ (torch.tensor(digits.nibbles, dtype=torch.float32) - 8)
        read = read[: len(levels)]
        reach, off = float(read.abs().max()), float((read - torch.tensor(levels)).abs().max())
    words.scale.mul_(2.0 ** torch.randint(-6, 7, words.scale.shape, generator=generator(7)))
    # An input of one power of two reads a column.
    found = TILES.linear(torch.eye(96), TILES.prepack(words)).t()
    weight = words.dequantize(torch.float32)
    zeros = torch.zeros_like(words.codes(slice(None)))
    ends = [
        decode(zeros + code, words.params(slice(None)), spec, torch.float32)
        for code in (0, spec.code_max - spec.code_min)
    ]
    steps = torch.maximum(ends[0].abs(), ends[1].abs()).amax(1, keepdim=True) / 127
    assert bool(((found - weight).abs() <= steps * (0.50001 * max(1.0, reach) + 127 * off)).all())


@needs_int_mm
@pytest.mark.parametrize("bits", [6, 7])
def test_more_bits_without_groups_have_the_bits_of_the_reference(bits):
    words = any_words(QuantSpec(bits=bits, granularity="channel", symmetric=False, activations="dynamic"), 70, 130)
    x = normal(9, 130)
    assert torch.equal(TILES.linear(x, TILES.prepack(words)), REFERENCE.linear(x, words))


@needs_int_mm
def test_tiny_scales_of_rows_have_the_bits_of_the_reference():
    words = any_words(QuantSpec(bits=4, granularity="channel", activations="dynamic"), 70, 130)
    words.scale.fill_(1e-37)
    x = normal(9, 130)
    assert torch.equal(TILES.linear(x, TILES.prepack(words)), REFERENCE.linear(x, words))


@needs_int_mm
@pytest.mark.parametrize("bits", [6, 7])
def test_codes_that_int8_would_coarsen_are_not_for_tiles(bits):
    spec = QuantSpec(bits=bits, granularity="group", group_size=32)
    assert "too fine for int8 codes" in TILES.supports(any_words(spec, 64, 64))


@pytest.mark.parametrize("kernel", WHOLE_ROWS)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_stays_so(kernel, activations, value):
    words = any_words(attrs.evolve(INT8, activations=activations), 40, 50)
    x = normal(5, 50)
    x[1, 7], x[3, 0] = value, -value
    found, expected = kernel.linear(x, kernel.prepack(words)), REFERENCE.linear(x, words)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_layers_have_the_bits_of_the_reference_under_every_setting(dtype, bias, activations, granularity):
    spec = QuantSpec(bits=8, granularity=granularity, activations=activations)
    module = quantized(linear(96, 128, bias=bias), spec)
    for rows in (1, 5, 300):
        x = normal(rows, 128, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module(x), exactly(module)(x))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_fewer_bits_with_int8_inputs_have_the_bits_of_the_reference(bits):
    module = quantized(linear(96, 256), QuantSpec(bits=bits, granularity="channel", activations="dynamic"))
    for rows in (1, 200):
        with torch.no_grad():
            assert torch.equal(module(normal(rows, 256)), exactly(module)(normal(rows, 256)))


def int8_layer(kernel, inputs=2048):
    module = quantized(linear(64, inputs), attrs.evolve(INT8, activations="dynamic"), compute="exact")
    expected = module(normal(40, inputs)).detach()
    module.weight_stored.prepack("auto", [kernel])
    return module, expected


@pytest.mark.parametrize("kernel", WHOLE_ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_does_not_round_the_sums(kernel, dtype):
    module, expected = int8_layer(kernel)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(module(normal(40, 2048)), expected)


@torch.no_grad()
def test_float_sums_step_aside_where_torch_may_round_factors():
    module, expected = int8_layer(BY_NAME["float_sums"])
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert "may round" in BY_NAME["float_sums"].takes(normal(2, 2048), 2, module.weight_stored.weight_layout())
            assert torch.equal(module(normal(40, 2048)), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kernel", EVERY)
def test_the_default_dtype_changes_nothing(kernel):
    spec = QuantSpec(bits=4, granularity="group", group_size=64) if kernel is TILES else INT8
    words, x = any_words(spec, 64, 128), normal(130, 128)
    layout = kernel.prepack(words)
    expected = kernel.linear(x, layout)
    torch.set_default_dtype(torch.float64)
    try:
        found = kernel.linear(x, layout)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", EVERY)
def test_another_default_device_changes_nothing(kernel):
    spec = QuantSpec(bits=4, granularity="group", group_size=64) if kernel is TILES else INT8
    words, x = any_words(spec, 64, 128), normal(130, 128)
    expected = kernel.linear(x, kernel.prepack(words))
    with torch.device("meta"):
        assert torch.equal(kernel.linear(x, kernel.prepack(words)), expected)


def test_rounding_inputs_without_being_asked_to_is_what_dynamic_does():
    words, x = any_words(INT8, 40, 64), normal(9, 64)
    kernel = BY_NAME["float_sums"]
    assert torch.equal(kernel.linear(x, kernel.prepack(words)), REFERENCE.linear(x, as_dynamic(words)))


def test_zero_points_and_sums_cannot_overflow_together():
    assert 2 * 128 * 128 * MOST_INPUTS < 2**31
    assert integers.EXACT_IN_FLOAT * 128 * 128 <= 2**24
