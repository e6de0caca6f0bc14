"""`Report` as a value: verdicts, failures, text and JSON."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import Measurement, Report, TensorReport
from fewbits.validation.tensors import verdict_of
from support.lifecycle_helpers import mlp, quantize_small


def measured(signal=100.0, noise=1.0, **fields):
    defaults = {
        "elements": 8, "dot": 100.0, "decoded": 100.0, "max_abs_error": 0.5, "worst_bound_ratio": 0.9,
    }  # fmt: skip
    return Measurement(signal=signal, noise=noise, **(defaults | fields))


def tensor(name="w", db=40.0, failures=(), **fields):
    measurement = measured(signal=10 ** (db / 10), **fields)
    return TensorReport(name, "quantized", "int8 channel", measurement, verdict_of(measurement.sqnr_db), failures)


def report(*tensors, **fields):
    defaults = {"checks": ("size",), "bytes_before": 400, "bytes_after": 100}
    return Report(tensors=tensors, **(defaults | fields))


@pytest.mark.parametrize(
    ("db", "verdict"),
    [
        (-math.inf, "critical"),
        (math.nan, "critical"),
        (9.999, "critical"),
        (10.0, "warning"),
        (19.999, "warning"),
        (20.0, "fair"),
        (30.0, "fair"),
        (30.001, "good"),
        (math.inf, "good"),
    ],
)
def test_the_verdict_on_an_sqnr(db, verdict):
    assert verdict_of(db) == verdict


@given(st.floats(), st.floats(allow_nan=False))
def test_an_sqnr_is_critical_exactly_if_it_is_below_the_limit(db, fail_under):
    assert (verdict_of(db, fail_under) == "critical") == (not db >= fail_under)


def test_warnings_never_fail_and_are_listed_by_rising_sqnr():
    found = report(*(tensor(f"layer{i}", db=15.0 - i) for i in range(4)), tensor("fine"))
    assert found.ok
    assert [warning.split(":")[0] for warning in found.warnings] == ["layer3", "layer2", "layer1", "layer0"]
    assert json.loads(found.to_json())["warnings"] == found.warnings
    assert all(f"layer{i}" in str(found) for i in range(4))


@pytest.mark.parametrize("count", [1, 37])
def test_a_summary_has_one_warning_line_for_any_number_of_tensors(count):
    found = report(*(tensor(f"layer{i}", db=15.0 - i / 10) for i in range(count)), tensor("fine"))
    (warning,) = [line for line in found.summary(500).splitlines() if line.startswith("warning: ")]
    assert f"{count} of {count + 1} tensors are below 20 dB" in warning
    assert f"the least at {15 - (count - 1) / 10:.2f} dB (layer{count - 1})" in warning
    assert "smaller groups" in warning
    assert "--tensors" in warning


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([0.5, 0.25], "every element is within it; the largest error is 50 % of it"),
        ([0.999_999], "every element is within it; the largest error is 99.99 % of it"),
        ([1.0], "every element is within it; the largest error is 100 % of it"),
        ([0.0], "every element is within it; the largest error is 0 % of it"),
        ([0.5, 1.25], "exceeded in 1 of 2 tensors; the largest error is 1.25 times it"),
        ([math.inf], "exceeded in 1 of 1 tensors; the largest error is inf times it"),
    ],
)
def test_the_summary_says_whether_every_element_is_within_its_bound(ratios, said):
    found = report(*(tensor(f"w{i}", worst_bound_ratio=ratio) for i, ratio in enumerate(ratios)))
    assert f"error bound: {said}" in found.summary().splitlines()


def test_an_error_just_beyond_its_bound_is_not_called_within_it():
    """The ratio of error and bound can round to 1 although the error exceeds the bound."""
    found = report(tensor(worst_bound_ratio=1.0, broken_at=(0, 0)))
    assert "error bound: exceeded in 1 of 1 tensors" in found.summary()


names = st.lists(st.text("abc_", min_size=1, max_size=20), min_size=1, max_size=12).map(".".join)


@given(st.lists(st.tuples(names, st.floats(0, 60), st.text(max_size=200)), max_size=6), st.integers(60, 120))
def test_no_line_of_a_summary_is_longer_than_the_width(found, width):
    tensors = [tensor(name, db, failures=(failure,) if failure else ()) for name, db, failure in found]
    described = report(*tensors, checks=("digests", "size", "scales") * 4, unchecked=("x y " * 40,))
    text = described.summary(width)
    for failure in sorted(described.failures, key=len, reverse=True):  # failures never wrap
        assert f"failure: {failure}" in text
        text = text.replace(f"failure: {failure}", "", 1)
    assert all(len(line) <= width for line in text.splitlines())


@given(st.lists(names, min_size=1, max_size=6, unique=True))
def test_a_table_fits_the_given_width_and_has_whole_names_without_one(found):
    described = report(*map(tensor, found))
    assert all(len(line) <= 80 for line in described.table(80).splitlines())
    assert all(name in described.table() for name in found)


@pytest.mark.parametrize(
    ("found", "failures"),
    [
        (report(tensor(failures=("broken",))), ["w: broken"]),
        (report(tensor(), general=("too large",)), ["too large"]),
        (report(tensor(failures=("a", "b")), general=("c",)), ["c", "w: a", "w: b"]),
    ],
)
def test_every_failure_is_listed_with_its_tensor(found, failures):
    assert not found.ok
    assert found.failures == failures
    assert found.summary().startswith("FAILED")
    assert all(f"failure: {failure}" in found.summary() for failure in failures)
    assert json.loads(found.to_json())["failures"] == failures


def test_total_sqnr_is_total_signal_over_total_noise():
    found = report(tensor("a", db=10.0), tensor("b", db=30.0))
    assert found.sqnr_db == pytest.approx(10 * math.log10((10 + 1000) / 2))


def test_kept_tensors_have_no_sqnr():
    found = report(TensorReport("bias", "kept", "", None, None))
    assert found.sqnr_db is None
    assert found.ok
    assert json.loads(found.to_json())["sqnr_db"] is None
    assert "SQNR:" not in found.summary()
    assert "bias" in str(found)


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


ODD = st.sampled_from([0.0, 1.0, 1e-300, math.inf, math.nan])


@given(ODD, ODD, ODD, ODD)
def test_json_is_strict_for_all_measurements(signal, noise, error, scale):
    measurement = measured(
        signal, noise, max_abs_error=error, worst_bound_ratio=error, scale_min=scale, scale_max=scale, code_min=-1,
        code_max=1,
    )  # fmt: skip
    found = report(TensorReport("w", "quantized", "int8", measurement, verdict_of(measurement.sqnr_db)))
    described = strict(found.to_json())["tensors"][0]
    assert described["exact"] is (noise == 0)
    assert described["sqnr_db"] is None or math.isfinite(described["sqnr_db"])
    assert "w" in str(found)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp16"])
def test_an_exact_result_is_null_and_exact_in_json(scheme):
    options = {"group_size": 4} if scheme == "int4" else {}
    found = quantize_small({"w": torch.zeros(4, 8)}, scheme, **options).report
    described = strict(found.to_json())
    assert described["ok"]
    assert described["sqnr_db"] is None
    assert (described["tensors"][0]["sqnr_db"], described["tensors"][0]["exact"]) == (None, True)
    assert "inf" in str(found)


def test_json_contains_every_tensor_with_its_measurement():
    result = quantize_small(mlp(), "int8")
    described = strict(result.report.to_json())
    assert [t["name"] for t in described["tensors"]] == [row.name for row in result.ledger]
    weight = described["tensors"][0]
    assert weight["codes"] == [-127, 127]
    assert weight["elements"] == 512
    assert weight["verdict"] == "good"
    assert 0 < weight["worst_bound_ratio"] <= 1
    assert described["bytes_after"] == result.ledger.bytes_after
    assert described == json.loads(result.report.to_json(indent=None))


def test_the_text_names_every_tensor_and_every_check():
    found = quantize_small(mlp(), "int8").report
    text = str(found)
    assert all(t.name in text for t in found.tensors)
    assert all(check in text for check in found.checks)
    assert "passed: 4 tensors" in text


def test_an_empty_report_can_be_printed():
    found = report(bytes_before=0, bytes_after=0)
    assert found.ok
    assert "0 tensors" in str(found)
    assert strict(found.to_json())["tensors"] == []
