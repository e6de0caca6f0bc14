"""`HistogramCounts` depends only on the numbers seen, not on their order or batches."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewbits.errors import CalibrationError
from fewbits.observers.histogram_counts import HistogramCounts
from support.strategies import FLOATS, contents, shapes

BINS = st.sampled_from([64, 256])


@st.composite
def batches(draw, limit=None):
    """Draw a few tensors of one dtype, of any magnitudes."""
    dtype = draw(st.sampled_from(FLOATS))
    return [
        draw(contents(draw(shapes(max_dims=3, max_elements=60)), dtype, limit)) for _ in range(draw(st.integers(1, 4)))
    ]


def same(a, b):
    assert torch.equal(a.counts, b.counts)
    assert (a.total, a.exponent, a.extremes) == (b.total, b.exponent, b.extremes)


def merged(tensors, bins):
    first, *rest = [HistogramCounts.of(x, bins) for x in tensors]
    for histogram in rest:
        first = first.merged(histogram)
    return first


def together(tensors):
    return torch.cat([x.double().flatten() for x in tensors])


def counted(values, bins):
    """Compute (exponent, {(sign, bin): count}) by exact arithmetic."""
    values = [Fraction(value) for value in values if value]
    if not values:
        return None, {}
    exponent = -1074
    while math.floor(max(map(abs, values)) / Fraction(2) ** exponent) >= bins:
        exponent += 1
    found = {}
    for value in values:
        place = int(value > 0), math.floor(abs(value) / Fraction(2) ** exponent)
        found[place] = found.get(place, 0) + 1
    return exponent, found


@given(batches(), BINS)
def test_every_number_is_in_the_bin_it_belongs_to(tensors, bins):
    histogram, values = merged(tensors, bins), together(tensors).tolist()
    exponent, found = counted(values, bins)
    assert histogram.exponent == exponent
    assert {tuple(place): int(histogram.counts[tuple(place)]) for place in histogram.counts.nonzero().tolist()} == found
    assert histogram.total == len(values)
    assert (histogram.extremes.low, histogram.extremes.high) == (min(values), max(values))


@given(batches(), BINS, st.randoms(use_true_random=False))
def test_order_and_batches_do_not_matter(tensors, bins, random):
    values = together(tensors)
    mixed = values[torch.tensor(random.sample(range(len(values)), len(values)))]
    pieces = mixed.split(random.randint(1, len(values)))
    same(merged(pieces, bins), HistogramCounts.of(values, bins))
    same(merged(tensors, bins), HistogramCounts.of(values, bins))


@given(batches(), batches(), batches(), BINS)
def test_merging_is_associative_and_commutative(a, b, c, bins):
    a, b, c = (merged(tensors, bins) for tensors in (a, b, c))
    same(a.merged(b).merged(c), a.merged(b.merged(c)))
    same(a.merged(b), b.merged(a))


@given(batches(limit=1e30), BINS, st.integers(-90, 90))
def test_a_power_of_two_moves_the_width_and_nothing_else(tensors, bins, power):
    values = together(tensors)
    assume(values.any() and values[values != 0].abs().min() > 1e-200)
    one, other = HistogramCounts.of(values, bins), HistogramCounts.of(values * 2.0**power, bins)
    assert torch.equal(one.counts, other.counts)
    assert other.exponent == one.exponent + power


@given(batches(), BINS)
def test_negation_swaps_the_sides(tensors, bins):
    values = together(tensors)
    assert torch.equal(HistogramCounts.of(-values, bins).counts, HistogramCounts.of(values, bins).counts.flip(0))


@given(batches(limit=1e300), BINS)
def test_the_occupied_bins_hold_all_but_the_zeros(tensors, bins):
    histogram, values = merged(tensors, bins), together(tensors)
    lower, upper, counts = (part[0].tolist() for part in histogram.occupied())
    assert sum(counts) + int((values == 0).sum()) == histogram.total == len(values)
    for low, high, count in zip(lower, upper, counts, strict=True):
        inside = (values > low) & (values <= high) if high <= 0 else (values >= low) & (values < high)
        assert int((inside & (values != 0)).sum()) == count


@given(batches(limit=1e300), BINS, st.sampled_from(["0.5", "0.9", "0.99", "1"]), st.booleans())
def test_the_inner_range_holds_its_share_and_is_at_most_one_bin_too_wide(tensors, bins, share, symmetric):
    histogram, values, share = merged(tensors, bins), together(tensors), Fraction(share)
    assume(values.any())
    inner, width = histogram.inner_range(share, symmetric=symmetric), 2.0**histogram.exponent
    low, high = min(inner.low, 0.0), max(inner.high, 0.0)
    assert int(((values >= low) & (values <= high)).sum()) >= share * len(values)
    assert low >= min(histogram.extremes.low, 0)
    assert high <= max(histogram.extremes.high, 0)
    spare = math.floor(len(values) * (1 - share))
    magnitudes = sorted(values.abs().tolist(), reverse=True)
    if not symmetric:
        exact = max(0.0, sorted(values.tolist(), reverse=True)[spare // 2])
        exact_low = min(0.0, sorted(values.tolist())[spare // 2])
        if exact or exact_low:
            assert high <= exact + width
            assert low >= exact_low - width
    elif magnitudes[spare]:
        assert max(-low, high) <= magnitudes[spare] + width


def test_a_range_of_zero_alone_is_replaced_by_the_extremes():
    values = torch.zeros(1000)
    values[0], values[1] = 3.0, -2.0
    for symmetric in (True, False):
        inner = HistogramCounts.of(values, 64).inner_range(Fraction(9, 10), symmetric=symmetric)
        assert (inner.low, inner.high) == (-2.0, 3.0)


def test_zeros_have_no_bin():
    histogram = HistogramCounts.of(torch.tensor([0.0, -0.0, 0.0]), 64)
    assert (int(histogram.counts.sum()), histogram.exponent, histogram.total) == (0, None, 3)
    wider = histogram.merged(HistogramCounts.of(torch.tensor([1.0]), 64))
    assert (int(wider.counts.sum()), wider.exponent, wider.total) == (1, -5, 4)


@pytest.mark.parametrize("x", [torch.empty(0), torch.empty(2, 0, 3), torch.arange(4), torch.ones(3, dtype=torch.bool)])
def test_without_floating_elements_there_is_nothing_to_count(x):
    assert HistogramCounts.of(x, 64) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_are_refused(bad, dtype):
    x = torch.ones(2, 3, dtype=dtype)
    x[1, 1] = bad
    with pytest.raises(CalibrationError, match=r"shape \(2, 3\) in .* holds NaN or Inf.*repair the batch"):
        HistogramCounts.of(x, 64)


def test_the_edges_of_float64():
    info = torch.finfo(torch.float64)
    smallest = info.tiny * info.eps
    histogram = HistogramCounts.of(torch.tensor([smallest, -info.max, info.max], dtype=torch.float64), 2048)
    assert histogram.counts[1].nonzero().flatten().tolist() == [0, 2047]
    assert histogram.counts[0].nonzero().flatten().tolist() == [2047]
    assert all(torch.isfinite(part).all() for part in histogram.occupied())
    subnormal = HistogramCounts.of(torch.tensor([smallest, 3 * smallest], dtype=torch.float64), 2048)
    assert subnormal.exponent == -1074
    assert subnormal.counts[1].nonzero().flatten().tolist() == [1, 3]
