"""Verify a file, alone and against its source."""

import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.sources.open import open_source
from fewbits.validation.verify import verify
from support.checkpoints import save, state
from support.lifecycle_helpers import small

SCHEMES = {
    "int8": small,
    "int8-tensor": lambda: small(fewbits.Int8PerTensor),
    "int4": lambda: small(fewbits.Int4Grouped, group_size=64),
    "asymmetric": lambda: small(fewbits.Int4Grouped, group_size=48, symmetric=False),
    "fp16": lambda: small(fewbits.FP16Cast),
}


def untied():
    return {name: tensor.clone() for name, tensor in state().items()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("verify") / "file.safetensors"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["mapping", "path"])
def test_a_genuine_file_passes_against_its_source(tmp_path, scheme, kind):
    safetensors.torch.save_file(untied(), tmp_path / "in")
    fewbits.quantize(tmp_path / "in", SCHEMES[scheme](), output=tmp_path / "out", on_failure="ignore")
    report = verify(tmp_path / "out", open_source(untied() if kind == "mapping" else tmp_path / "in"))
    assert report.ok, report.failures
    assert {"digests", "size", "SQNR", "error bound of every element"} <= set(report.checks)
    assert not report.unchecked
    assert all(tensor.measurement for tensor in report.tensors if tensor.fate != "kept")


def test_a_file_made_from_a_model_passes_against_that_model(scratch):
    model = nn.Sequential(nn.Embedding(9, 70), nn.Linear(70, 40), nn.BatchNorm1d(40))
    save(scratch, model)
    assert verify(scratch, open_source(model)).ok
    assert verify(scratch, open_source(model.state_dict())).ok


def test_without_a_source_the_report_lists_the_missing_checks(scratch):
    save(scratch, state())
    report = verify(scratch)
    assert report.ok
    assert "no source" in report.unchecked[0]
    assert "SQNR" not in report.checks
    assert report.sqnr_db is None


def test_the_bytes_in_the_report_are_those_of_the_file(scratch):
    result = save(scratch, state())
    assert verify(scratch).bytes_after == result.ledger.bytes_after


def test_verifying_measures_the_same_as_quantizing(scratch):
    result = save(scratch, state(), "int4", group_size=64)
    again = verify(scratch, open_source(state()))
    assert [t.measurement for t in again.tensors] == [t.measurement for t in result.report.tensors]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        pytest.param(lambda t: t.update(extra=torch.ones(2)), "extra", id="one more"),
        pytest.param(lambda t: t.pop("layers.0.bias"), "layers.0.bias", id="one less"),
        pytest.param(lambda t: t.update({"norm.weight": torch.ones(25)}), "norm.weight", id="another shape"),
        pytest.param(
            lambda t: t.update({"layers.0.weight": t["layers.0.weight"].T.contiguous()}),
            "layers.0.weight",
            id="transposed",
        ),
        pytest.param(lambda t: t.update({"norm.weight": t["norm.weight"].double()}), "norm.weight", id="another dtype"),
        pytest.param(
            lambda t: t.update({"layers.0.weight": t["layers.0.weight"].half()}), "layers.0.weight", id="half the dtype"
        ),
    ],
)
def test_a_source_with_other_names_shapes_or_dtypes_fails(scratch, edit, named):
    save(scratch, untied())
    other = untied()
    edit(other)
    report = verify(scratch, open_source(other))
    assert not report.ok
    assert any(named in failure for failure in report.failures)


@given(st.sampled_from(["layers.0.bias", "norm.weight", "steps"]), st.data())
def test_one_changed_bit_of_a_kept_tensor_fails(scratch, name, data):
    save(scratch, untied(), validate=False)
    other = untied()
    changed = other[name].reshape(-1).view(torch.uint8)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    report = verify(scratch, open_source(other))
    assert [tensor.name for tensor in report.tensors if tensor.failures] == [name]


@pytest.mark.parametrize("name", ["embeddings.weight", "layers.0.weight", "layers.1.weight", "half.weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_element_beyond_its_error_bound_fails(scratch, scheme, name):
    save(scratch, untied(), SCHEMES[scheme](), validate=False)
    other = untied()
    if other[name].dtype == torch.float16 and scheme == "fp16":
        pytest.skip("the tensor is already in half precision, so it is kept")
    flat = other[name].view(-1)
    flat[flat.abs().argmin()] += flat.abs().max() / 2
    report = verify(scratch, open_source(other))
    assert [tensor.name for tensor in report.tensors if tensor.failures] == [name]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_source_with_nan_or_inf_fails(scratch, bad):
    save(scratch, untied(), validate=False)
    other = untied()
    other["layers.0.weight"][3, 4] = bad
    report = verify(scratch, open_source(other))
    assert [tensor.name for tensor in report.tensors if tensor.failures] == ["layers.0.weight"]


def test_tied_tensors_must_be_equal_in_the_source(scratch):
    save(scratch, state(), validate=False)
    assert verify(scratch, open_source(untied())).ok
    other = untied()
    other["head.weight"] *= 2
    report = verify(scratch, open_source(other))
    assert not report.ok
    assert any("head.weight" in failure for failure in report.failures)


def test_a_damaged_tensor_is_not_decoded_but_the_others_are(scratch):
    save(scratch, untied(), validate=False)
    data = bytearray(scratch.read_bytes())
    data[-1] ^= 1
    scratch.write_bytes(data)
    report = verify(scratch, open_source(untied()))
    failing = [tensor for tensor in report.tensors if tensor.failures]
    assert len(failing) == 1
    assert failing[0].measurement is None
    assert "not the bytes that were written" in failing[0].failures[0]
    assert len(report.general) == 0


def test_fail_under_sets_the_sqnr_below_which_tensors_fail(scratch):
    save(scratch, untied(), validate=False)
    source = open_source(untied())
    assert verify(scratch, source, fail_under=35).ok
    strict = verify(scratch, source, fail_under=60)
    assert {t.name for t in strict.tensors if t.verdict == "critical"} == {
        t.name for t in strict.tensors if t.fate == "quantized"
    }


@pytest.mark.parametrize("write", [lambda path: None, lambda path: safetensors.torch.save_file(untied(), path)])
def test_missing_and_unquantized_files_cannot_be_verified(tmp_path, write):
    write(tmp_path / "f")
    with pytest.raises(fewbits.errors.CheckpointError):
        verify(tmp_path / "f")


def test_a_nan_limit_is_refused(tmp_path):
    fewbits.quantize(nn.Linear(32, 32), "int8").save(tmp_path / "f")
    with pytest.raises(fewbits.errors.ArgumentError, match="fail_under must be a number of dB, not nan"):
        fewbits.verify(tmp_path / "f", fail_under=float("nan"))
