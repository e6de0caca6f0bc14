"""Codes as sums of digits and bytes: different codes differ, zero stays zero, and numbers stay near."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import QuantSpec
from fewbits.kernels.digits import digits_of, levels_in_bytes, planes
from fewbits.numerics.levels import E2M1
from fewbits.numerics.metrics import sqnr_db
from kernels.kernel_cases import FLOAT8, NF4, curved


def with_levels(bits, levels):
    return QuantSpec(bits=bits, granularity="group", group_size=64, levels=levels)


@st.composite
def levels(draw):
    """A spec with any levels: any magnitude, however close together."""
    bits, size = draw(st.sampled_from([2, 3, 4, 5])), draw(st.floats(2.0**-30, 2.0**30))
    count = 2**bits - 1
    others = draw(st.lists(st.integers(-(10**6), 10**6).filter(bool), min_size=count, max_size=count, unique=True))
    if min(others) > 0 or max(others) < 0:
        others[0] = -others[0]
    return with_levels(bits, sorted(number * size for number in {0, *others}))


def numbers(spec):
    """The number that the digits of each code give."""
    digits = digits_of(spec)
    units = torch.tensor(digits.units, dtype=torch.float64).unsqueeze(1)
    return (units * (torch.tensor(digits.nibbles) - 8)).sum(0)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_two_digits_are_an_integer_exactly(bits):
    spec = QuantSpec(bits=bits, granularity="channel")
    assert numbers(spec).tolist() == list(range(spec.code_min, spec.code_max + 1))


@settings(max_examples=25)
@given(levels())
def test_digits_tell_any_levels_apart_and_stay_near(spec):
    nibbles, expected = digits_of(spec).nibbles, torch.tensor(spec.levels, dtype=torch.float64)
    assert len(nibbles) == planes(spec)
    assert all(0 <= nibble <= 15 for plane in nibbles for nibble in plane)
    assert len(set(zip(*nibbles, strict=True))) == 2**spec.bits
    found = numbers(spec)
    assert found[expected == 0] == 0
    # Levels that are as close as two points have to move apart.
    assert float((found - expected).abs().max()) <= float(expected.abs().max()) * 2**spec.bits / 127


@pytest.mark.parametrize(("spec", "least"), [(NF4, 54.0), (with_levels(3, curved(3)), 60.0)], ids=["nf4", "8 levels"])
def test_two_digits_are_accurate(spec, least):
    expected = torch.tensor(spec.levels, dtype=torch.float64)
    noise = (numbers(spec) - expected).square().sum()
    assert sqnr_db(float(expected.square().sum()), float(noise)) > least


def test_two_digits_hold_four_bit_floats_exactly_and_tell_the_invalid_code():
    spec = with_levels(4, E2M1)
    *found, invalid = numbers(spec).tolist()
    assert tuple(found) == E2M1
    assert invalid not in E2M1


def test_two_bytes_hold_float8_exactly_but_for_the_smallest_numbers():
    whole, unit = levels_in_bytes(FLOAT8)
    assert len(whole) == 256
    assert whole == sorted(set(whole))
    assert max(map(abs, whole)) < 2**15
    whole = whole[: len(FLOAT8.levels)]
    found, expected = (torch.tensor(one, dtype=torch.float64) for one in ([n * unit for n in whole], FLOAT8.levels))
    exact = (expected.abs() >= 1) | (expected == 0)
    assert torch.equal(found[exact], expected[exact])
    assert float((found - expected).abs().max()) <= 448 / 1190
