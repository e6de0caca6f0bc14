"""Histograms and curves: counts add up, drawings stay within their boxes, wrong files are refused."""

import json
import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fewbits.errors import CheckpointError, FormatError
from fewbits.pages.charts import CURVE_SIZE, Histogram
from fewbits.pages.curve import Curve

numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=50)


@given(st.lists(numbers, min_size=1, max_size=3))
@example([[0.0, 0.0]])
@example([[5e-324]])
@example([[1e30, 1.0]])
def test_a_histogram_counts_every_number_or_says_how_many_are_beyond(pieces):
    tensors = [torch.tensor(piece, dtype=torch.float64) for piece in pieces]
    found, count = Histogram.of(lambda: tensors), sum(map(len, pieces))
    assert sum(found.counts) + round(found.beyond / 100 * count) == count
    assert found.largest == max(abs(number) for piece in pieces for number in piece)
    assert found.span > 0
    heights = [float(y) for y in re.findall(r"V([\d.]+)", found.path)]
    assert len(heights) == len(found.counts) + 1
    assert all(0 <= y <= 90 for y in heights)


def test_a_histogram_of_a_normal_distribution_is_symmetric():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    found = Histogram.of(lambda: [values, -values])
    assert list(found.counts) == list(reversed(found.counts))
    assert max(found.counts) == found.counts[30]
    assert found.span == pytest.approx(4, rel=0.05)
    assert found.beyond < 0.1


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf], [1e200]])
def test_numbers_that_cannot_be_drawn_have_no_histogram(values):
    assert Histogram.of(lambda: [torch.tensor(values, dtype=torch.float64)]) is None


errors = st.floats(-1e99, 1e99) | st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1 + 2**-52, 5e-324, 1e-300])


def test_numbers_that_are_almost_equal_have_one_mark():
    drawn = Curve(((0, 1.0), (0, 1.0000000000000002)), {}, "error").drawn()
    assert [(mark.y, mark.label) for mark in drawn.up] == [(250.0, "1")]


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1) | st.integers(0, 9), errors), min_size=1, max_size=20), st.data())
def test_any_curve_is_drawn_within_its_box(points, data):
    knee = data.draw(st.none() | st.integers(0, len(points) - 1))
    named = {} if knee is None else {"knee": points[knee]}
    drawn = Curve(tuple(sorted(points)), named, "error").drawn()
    places = [tuple(map(float, place.split())) for place in drawn.path[1:].split("L")]
    places += [(mark.x, mark.y) for mark in (*drawn.across, *drawn.up, *drawn.marks)]
    assert all(0 <= x <= CURVE_SIZE[0] and 0 <= y <= CURVE_SIZE[1] for x, y in places)
    assert len(drawn.up) <= 9
    assert len(drawn.across) <= 6
    assert len(drawn.marks) == (knee is not None)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.02, 1, ["0.02", "0.05", "0.1", "0.2", "0.5", "1"]),
        (1e-6, 1, ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
        (7, 7, ["7"]),
    ],
)
def test_marks_on_the_axis_are_round_numbers(low, high, labels):
    drawn = Curve(((1, float(high)), (2, float(low))), {}, "error").drawn()
    assert [mark.label for mark in drawn.up] == labels


@pytest.mark.parametrize(
    "wrong",
    [
        [], {}, {"points": []}, {"points": {}}, {"points": [1]}, {"points": [{"bytes": 1}]},
        {"points": [{"bytes": -1, "error": 1}]}, {"points": [{"bytes": True, "error": 1}]},
        {"points": [{"bytes": 1.5, "error": 1}]}, {"points": [{"bytes": 2**63, "error": 1}]},
        {"points": [{"bytes": 1, "error": math.nan}]}, {"points": [{"bytes": 1, "error": math.inf}]},
        {"points": [{"bytes": 1, "error": "1"}]}, {"points": [{"bytes": 1, "error": 10**400}]},
        {"points": [{"bytes": 1, "error": 1}], "knee": 1}, {"points": [{"bytes": 1, "error": 1}], "chosen": -1},
        {"points": [{"bytes": 1, "error": 1}], "knee": True}, {"points": [{"bytes": 1, "error": 1}], "error": None},
    ],
)  # fmt: skip
def test_a_wrong_curve_is_refused(wrong, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(wrong))
    with pytest.raises(FormatError, match=r"c\.json"):
        Curve.read(tmp_path / "c.json")


def test_a_file_that_is_no_curve_is_refused(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff{")
    with pytest.raises(FormatError, match="no JSON"):
        Curve.read(tmp_path / "c.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Curve.read(tmp_path / "missing.json")


def test_a_curve_may_have_other_keys_and_no_named_points(tmp_path):
    fields = {"points": [{"bytes": 9, "error": 1, "scheme": "int4"}, {"bytes": 3, "error": 2.5}], "knee": None, "x": 1}
    (tmp_path / "c.json").write_text(json.dumps(fields))
    assert Curve.read(tmp_path / "c.json") == Curve(((3, 2.5), (9, 1.0)), {}, "error")
