"""Events: silent by default, and structured if the application configures structlog."""

import logging
import subprocess
import sys
import textwrap

import pytest
import structlog
import torch

import fewbits
from support.lifecycle_helpers import mlp, quantize_small, small


def test_every_activity_is_an_event_with_fields(events, tmp_path):
    quantizer = small()
    quantizer.prepare(mlp())
    quantizer.observe([torch.ones(2, 16)])
    quantizer.convert()
    quantizer.validate()
    quantizer.save(tmp_path / "model.safetensors")
    assert [(e["event"], e.get("state"), e["scheme"], e["log_level"]) for e in events] == [
        ("prepare", "PREPARED", "int8", "info"),
        ("observe", "OBSERVED", "int8", "info"),
        ("convert", "CONVERTED", "int8", "info"),
        ("sqnr", None, "int8 channel", "info"),
        ("sqnr", None, "int8 channel", "info"),
        ("validate", "VALIDATED", "int8", "info"),
        ("save", "VALIDATED", "int8", "info"),
    ]
    prepare, observe, convert, *measured, validate, save = events
    assert (prepare["tensors"], prepare["quantized"], prepare["cast"]) == (4, 2, 0)
    assert (observe["samples"], observe["batches"], observe["more"]) == (2, 1, False)
    assert (convert["bytes_before"], convert["bytes_after"]) == (
        quantizer.ledger.bytes_before,
        quantizer.ledger.bytes_after,
    )
    assert [e["tensor"] for e in measured] == ["0.weight", "2.weight"]
    assert validate["ok"] is True
    assert save["path"] == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("count", "samples", "level"),
    [(200, {}, "warning"), (200, {"samples": 20}, "info"), (150, {}, None), (9, {}, None)],
)
def test_data_that_observe_leaves_is_an_event_and_a_warning_unless_a_limit_was_given(events, count, samples, level):
    quantizer = small()
    quantizer.prepare(mlp())
    quantizer.observe([torch.ones(1, 16)] * count, **samples)
    told = [e for e in events if e["event"] == "data_left"]
    limit = samples.get("samples", 150)
    expected = {"event": "data_left", "limit": limit, "samples": limit, "batches": limit, "more": True}
    advised = expected | {"advice": "samples=None runs all of it"}
    assert told == ([advised | {"log_level": level}] if level else [])


def test_data_that_may_be_left_in_a_generator_is_a_warning(events):
    fewbits.quantize(mlp(), "int8", data=(torch.ones(1, 16) for _ in range(200)))
    assert [(e["log_level"], e["more"]) for e in events if e["event"] == "data_left"] == [("warning", None)]


def test_every_measured_tensor_is_an_event_with_its_verdict(events):
    even = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = {"good": (7 * even).round().index_fill(1, torch.tensor([0]), 7.0), "fair": even}
    source |= {name: even.index_fill(1, torch.tensor([0]), outlier) for name, outlier in (("low", 40.0), ("bad", 4.0))}
    report = fewbits.quantize(source, "int4", group_size=64, fail_under=15, on_failure="ignore").report
    told = {e["tensor"]: e for e in events if e["event"] == "sqnr"}
    measured = {t.name: t for t in report.tensors if t.measurement is not None}
    assert told.keys() == measured.keys()
    for name, event in told.items():
        assert event["sqnr_db"] == round(measured[name].measurement.sqnr_db, 2)
        assert (event["verdict"], event["scheme"]) == (measured[name].verdict, measured[name].scheme)
        assert event["log_level"] == ("warning" if event["verdict"] == "critical" else "info")
    assert {name: event["verdict"] for name, event in told.items()} == {
        "good": "good",
        "fair": "fair",
        "low": "warning",
        "bad": "critical",
    }


def test_low_sqnrs_are_one_warning_that_counts_the_tensors(events):
    report = quantize_small(mlp(width=1024), "int4", group_size=1024).report
    (low,) = [e for e in events if e["event"] == "low_sqnr"]
    assert low["log_level"] == "warning"
    assert low["tensors"] == len(report.warnings) > 0
    assert low["least"] == report.warnings[0]
    assert "smaller groups" in low["advice"]


def test_a_failure_is_an_event_that_names_the_tensor(events):
    report = quantize_small(mlp(), "int8", fail_under=200, on_failure="ignore").report
    failures = [e["finding"] for e in events if e["event"] == "validation_failure"]
    assert failures == report.failures
    assert failures


@pytest.mark.parametrize("call", ["convert", "validate", "save"])
def test_a_refused_call_is_no_event(events, call):
    with pytest.raises(fewbits.errors.StateError):
        getattr(small(), call)(*(["path"] if call == "save" else []))
    assert not events


SCRIPT = """
    import sys
    import torch
    import fewbits

    torch.manual_seed(0)
    fewbits.quantize(torch.nn.Linear(256, 64), "int4").save(sys.argv[1])
    import structlog
    assert not structlog.is_configured()
"""


def test_unconfigured_nothing_is_printed(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT), tmp_path / "model.safetensors"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "event='prepare'" not in done.stderr


def test_unconfigured_events_go_to_the_standard_logger(caplog):
    structlog.reset_defaults()
    with caplog.at_level(logging.INFO, logger="fewbits"):
        quantize_small(mlp(), "int8")
    messages = [record.getMessage() for record in caplog.records if record.name == "fewbits"]
    assert [message.split()[0] for message in messages] == [
        "event='prepare'",
        "event='convert'",
        "event='sqnr'",
        "event='sqnr'",
        "event='validate'",
    ]
