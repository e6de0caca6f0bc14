"""Levels fitted to weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits import QuantSpec, measure
from fewbits.errors import ArgumentError, NonFiniteError
from fewbits.numerics.quantize import quantize
from fewbits.schemes import LevelsGrouped, NF4Grouped, fit_levels
from support.lifecycle_helpers import small
from support.strategies import FLOATS, contents, seeds


def weight(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


drawn = st.sampled_from(FLOATS).flatmap(lambda dtype: contents((6, 20), dtype, limit=torch.finfo(dtype).max / 16))


@given(drawn, st.integers(2, 8), st.integers(1, 25))
def test_fitted_levels_are_levels_that_begin_with_minus_one_and_end_with_one(tensor, bits, group_size):
    levels = fit_levels([tensor], bits, group_size)
    assert QuantSpec(bits, "group", group_size=group_size, levels=levels).invalid_codes == 0
    assert (levels[0], 0.0 in levels, levels[-1]) == (-1.0, True, 1.0)


@given(seeds, st.integers(2, 5))
def test_fitted_levels_leave_less_noise_than_evenly_spaced_ones(seed, bits):
    tensor = weight(40, 64, seed=seed).pow(3)
    half = 2 ** (bits - 1)
    even = (*(code / (half - 1) for code in range(1 - half, 0)), *(code / half for code in range(half + 1)))

    def noise(levels):
        # In units of the largest magnitude of each row, as levels are fitted.
        rows = tensor / tensor.abs().amax(1, keepdim=True)
        return measure(rows, quantize(rows, QuantSpec(bits, "channel", levels=levels))).noise

    assert noise(fit_levels([tensor], bits, 64)) < noise(even)


def test_fitted_levels_are_better_than_nf4_for_other_distributions():
    tensors = {"w": weight(64, 256).pow(3)}
    fitted = fewbits.quantize(tensors, LevelsGrouped(fit_levels(tensors.values())), on_failure="ignore")
    nf4 = fewbits.quantize(tensors, NF4Grouped(), on_failure="ignore")
    assert fitted.report.sqnr_db > nf4.report.sqnr_db + 0.5
    assert fitted.ledger.bytes_after == nf4.ledger.bytes_after


@given(seeds, st.permutations(range(4)))
def test_the_order_of_weights_rows_and_blocks_changes_nothing(seed, order):
    tensor = weight(40, 70, seed=seed)
    expected = fit_levels([tensor])
    assert fit_levels([tensor[part::4] for part in order]) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
        assert fit_levels([tensor.flip(0)]) == expected


def test_the_number_of_threads_changes_nothing():
    tensor, threads = weight(300, 300), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(count), fit_levels([tensor]))[1] for count in (1, 2)]
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_a_power_of_two_and_a_dtype_change_nothing():
    tensor = weight(20, 64, dtype=torch.float16)
    assert fit_levels([tensor]) == fit_levels([tensor.double() * 2.0**900]) == fit_levels([tensor.float() / 2**60])


def test_zeros_and_short_last_groups_are_no_obstacle():
    assert fit_levels([torch.zeros(3, 5)], bits=2) == (-1.0, 0.0, 0.5, 1.0)
    assert fit_levels([torch.tensor([[1.0, 0.25, -1.0, 0.0, 4.0]])], bits=2, group_size=4) == (-1.0, 0.0, 0.25, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one weight"),
        (([torch.empty(0, 4)],), "at least one weight"),
        (([torch.ones(2, 2, dtype=torch.int64)],), "floating tensors, not to torch.int64"),
        (([[1.0, 2.0]],), "floating tensors, not to"),
        (([torch.ones(2, 2)], 1), "bits must be"),
        (([torch.ones(2, 2)], 4, 0), "group_size must be"),
    ],
)
def test_arguments_that_cannot_be_fitted_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        fit_levels(*arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_index(bad):
    tensor = torch.ones(2, 3)
    tensor[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"index \(1, 2\)"):
        fit_levels([tensor])


@pytest.mark.parametrize(
    "junk", [(), (0.0,), (1.0, 2.0), (-1.0, 0.0, math.nan, 1.0), [-1.0, 0.5, 1.0], range(300), 4, None, "abc"]
)
def test_a_scheme_refuses_other_levels(junk):
    with pytest.raises(ArgumentError):
        small(LevelsGrouped, junk)
