"""Dequantizing FP8 codes with scales, whole or in part."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.numerics.scaled import FP8_DTYPES, ScaleGrid, decoded, dequantize_scaled
from support.fp8 import FP8, SCALE_DTYPES, codes, expected, scale_shape, scales

SIZES = st.integers(1, 9)


def part(weight, scale, grid, start=0, stop=None, piece=1 << 18):
    """Dequantize elements `start` to `stop` in pieces of about `piece` elements."""
    out = torch.empty((weight.numel() if stop is None else stop) - start, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.scaled.BLOCK_ELEMENTS", piece)
        dequantize_scaled(
            lambda a, b: weight.reshape(-1)[a:b],
            lambda a, b: scale.reshape(-1)[a:b],
            grid,
            out,
            first=start,
            shape=weight.shape,
        )
    return out


@st.composite
def scaled(draw):
    """Draw (codes, scales, grid, dequantized tensor) with scales for blocks, rows, stacks or whole tensors."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    dtypes, seed = (draw(FP8), draw(st.sampled_from(SCALE_DTYPES))), draw(st.integers(0, 99))
    block = draw(st.tuples(SIZES, SIZES)) if len(shape) > 1 and draw(st.booleans()) else None
    if block is not None:
        found = scale_shape(shape, block)
    else:
        axes = draw(st.integers(0, len(shape) - 1))
        ones = draw(st.sampled_from([(), (1,) * (len(shape) - axes), (1,) * (axes == 0)]))
        found = shape[:axes] + ones
    weight, scale = codes(shape, dtypes[0], seed), scales(found, dtypes[1], seed)
    grid = ScaleGrid.fit(shape, found, [] if block is None else [block])
    return weight, scale, grid, expected(weight, scale, block)


@given(scaled(), st.data(), st.sampled_from([1, 2, 7, 30, 1 << 18]))
def test_dequantizing_a_part_gives_that_part_of_the_whole(problem, data, piece):
    weight, scale, grid, whole = problem
    start = data.draw(st.integers(0, weight.numel()))
    stop = data.draw(st.integers(start, weight.numel()))
    assert torch.equal(part(weight, scale, grid, start, stop, piece), whole.reshape(-1)[start:stop])


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
def test_every_code_decodes_to_the_number_of_torch(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(decoded(every).nan_to_num(7.0), every.to(torch.float32).nan_to_num(7.0))
    assert torch.equal(decoded(every).signbit(), every.to(torch.float32).signbit())


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no float8_e8m0fnu")
def test_scales_can_be_powers_of_two_in_8_bits():
    weight, scale = codes((4, 6)), torch.arange(120, 124, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = part(weight, scale, ScaleGrid.fit((4, 6), (4,), []))
    assert torch.equal(found, expected(weight, scale.to(torch.float32)).reshape(-1))


@given(st.lists(st.integers(1, 300), min_size=2, max_size=3), st.sampled_from([(128, 128), (1, 128), (64, 64)]))
def test_block_sizes_follow_from_the_number_of_scales(shape, block):
    grid = ScaleGrid.fit(shape, scale_shape(shape, block), [(200, 3), block])
    assert grid is not None
    if math.prod(scale_shape(shape, block)[-2:]) > 1 and scale_shape(shape, block) != scale_shape(shape, (200, 3)):
        blocks = -(-grid.columns // grid.block[1])
        assert blocks == scale_shape(shape, block)[-1]


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((300, 200), (2, 2)),
        ((300, 200), (3, 3)),
        ((300, 200), (200,)),
        ((300, 200), (1, 200)),
        ((300, 200), (3,)),
        ((300, 200), (2, 3)),
        ((300, 200), (300, 200)),
        ((300, 200), (1, 1, 1)),
        ((300, 200), (0,)),
        ((4, 300, 200), (3, 2)),
        ((4, 300, 200), (5, 3, 2)),
        ((4, 300, 200), (300, 1)),
        ((300,), (300,)),
        ((300,), (3,)),
    ],
)
def test_scales_of_another_shape_fit_nothing(shape, found):
    assert ScaleGrid.fit(shape, found, [(128, 128), (1, 128)]) is None


@pytest.mark.parametrize(("shape", "found"), [((0, 5), ()), ((0, 5), (0, 1)), ((3, 0), (3,)), ((), ()), ((), (1,))])
def test_tensors_of_no_or_one_element_are_dequantized(shape, found):
    grid = ScaleGrid.fit(shape, found, [(128, 128)])
    assert torch.equal(part(codes(shape), scales(found), grid), expected(codes(shape), scales(found)).reshape(-1))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (math.nan, fewbits.errors.NonFiniteError, "scale 1 is nan"),
        (math.inf, fewbits.errors.NonFiniteError, "scale 1 is inf"),
        (-math.inf, fewbits.errors.NonFiniteError, "scale 1 is -inf"),
        (-0.5, fewbits.errors.NumericsError, r"scale 1 is -0\.5"),
        (0.0, fewbits.errors.NumericsError, r"the scale of the element at index \(2, 1\) is 0"),
        (-0.0, fewbits.errors.NumericsError, r"the scale of the element at index \(2, 1\) is 0"),
        (1e38, fewbits.errors.RangeError, r"the element at index \(2, 1\) is 448; times its scale it is beyond"),
    ],
)
@pytest.mark.parametrize("piece", [2, 1 << 18])
def test_a_bad_scale_is_named(bad, error, message, piece):
    weight, scale = torch.zeros(4, 3).to(torch.float8_e4m3fn), torch.ones(2, 1)
    weight.view(torch.uint8)[2, 1] = 0x7E  # 448
    scale[1] = bad
    with pytest.raises(error, match=message):
        part(weight, scale, ScaleGrid.fit((4, 3), (2, 1), [(2, 3)]), piece=piece)


def test_a_scale_of_zero_is_allowed_for_codes_of_zero():
    weight, scale = torch.zeros(4, 3).to(torch.float8_e4m3fn), torch.tensor([[0.0], [2.0]])
    weight.view(torch.uint8)[2, 1] = 0x7E
    assert part(weight, scale, ScaleGrid.fit((4, 3), (2, 1), [(2, 3)])).tolist()[6:9] == [0, 896, 0]


@pytest.mark.parametrize(
    ("dtype", "code", "value"),
    [(torch.float8_e4m3fn, 0x7F, "nan"), (torch.float8_e5m2, 0x7C, "inf"), (torch.float8_e5m2, 0xFF, "nan")],
)
@pytest.mark.parametrize("piece", [2, 1 << 18])
def test_a_code_that_is_nan_or_inf_is_named(dtype, code, value, piece):
    weight = torch.ones(2, 3, 5).to(dtype)
    weight.view(torch.uint8)[1, 2, 3] = code
    with pytest.raises(fewbits.errors.NonFiniteError, match=rf"index \(1, 2, 3\) is {value}"):
        part(weight, torch.ones(()), ScaleGrid.fit((2, 3, 5), (), []), piece=piece)


def test_tiny_products_are_rounded_and_not_refused():
    weight, scale = codes((3, 40)), torch.full((3, 1), 1e-40)
    assert torch.equal(part(weight, scale, ScaleGrid.fit((3, 40), (3, 1), [])), expected(weight, scale).reshape(-1))
