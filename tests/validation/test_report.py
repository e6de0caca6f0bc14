"""`Report` as a value: verdicts, what counts as a failure, text and JSON."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import Measurement, Report, TensorReport
from fewbits.validation.report import verdict_of
from lifecycle_helpers import mlp, quantize_small


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
def test_critical_is_exactly_what_is_under_the_line(db, fail_under):
    assert (verdict_of(db, fail_under) == "critical") == (not db >= fail_under)


def test_warnings_are_listed_and_never_fail():
    found = report(*(tensor(f"layer{i}", db=15.0) for i in range(7)), tensor("fine"))
    assert found.ok
    assert len(found.warnings) == 7
    assert found.summary().startswith("passed: 8 tensors")
    assert found.summary().count("warning: ") == 5
    assert "and 2 warnings more" in found.summary()


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


def test_sqnr_is_pooled_over_signals_and_noises():
    found = report(tensor("a", db=10.0), tensor("b", db=30.0))
    assert found.sqnr_db == pytest.approx(10 * math.log10((10 + 1000) / 2))


def test_kept_tensors_have_no_figures():
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
def test_json_is_strict_whatever_was_measured(signal, noise, error, scale):
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


def test_json_says_everything_about_every_tensor():
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
