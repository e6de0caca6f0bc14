"""`quantize`, the lifecycle in one call."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import (
    ArgumentError,
    Int8PerChannel,
    LayerSelector,
    QuantizedTensor,
    Result,
    SelectionError,
    State,
    ValidationError,
)
from lifecycle_helpers import files_in, mlp, snapshot, stored

SCHEMES = ["int8", "int8-tensor", "int4", "fp16"]


def poor():
    """A model that one scale for all weights serves badly: one large weight, and thousands that round to zero."""
    model = nn.Sequential(nn.Linear(256, 128))
    with torch.no_grad():
        model[0].weight.fill_(3.5e-3)[0, 0] = 1.0
    return model


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(mlp().state_dict(), path)
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_becomes_a_model(scheme):
    result = fewbits.quantize(mlp(), scheme)
    assert isinstance(result, Result)
    assert isinstance(result.model, nn.Sequential)
    assert result.model(torch.randn(2, 16)).shape == (2, 8)
    assert result.report.ok
    assert result.quantizer.state is State.VALIDATED
    assert result.ledger is result.quantizer.ledger


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_becomes_a_mapping(scheme):
    source = mlp().state_dict()
    result = fewbits.quantize(source, scheme)
    assert list(result.model) == list(source)
    kind = torch.Tensor if scheme == "fp16" else QuantizedTensor
    assert isinstance(result.model["0.weight"], kind)
    assert type(source["0.weight"]) is torch.Tensor


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [Path, str])
def test_a_path_becomes_a_file(checkpoint, scheme, kind):
    output = checkpoint.with_name("out.safetensors")
    before = checkpoint.read_bytes()
    result = fewbits.quantize(kind(checkpoint), scheme, output=kind(output))
    assert Path(result.model) == output
    assert result.report.ok
    assert result.ledger.bytes_after == result.report.bytes_after
    assert fewbits.load(output).keys() == mlp().state_dict().keys()
    assert checkpoint.read_bytes() == before


def test_a_result_can_be_saved_and_loaded(tmp_path):
    result = fewbits.quantize(mlp(), "int8")
    result.save(tmp_path / "model.safetensors")
    loaded = fewbits.load(tmp_path / "model.safetensors", into=mlp(1))
    assert snapshot(loaded.state_dict()) == snapshot(result.model.state_dict())


def test_the_result_of_a_file_can_be_saved_again(checkpoint):
    output, again = checkpoint.with_name("out.safetensors"), checkpoint.with_name("again.safetensors")
    fewbits.quantize(checkpoint, "int8", output=output).save(again)
    assert stored(again) == stored(output)


def test_the_same_input_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        fewbits.quantize(mlp(), "int4", group_size=8).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_path_needs_an_output(checkpoint):
    with pytest.raises(ArgumentError, match="needs output="):
        fewbits.quantize(checkpoint, "int8")


@pytest.mark.parametrize("source", [mlp, lambda: dict(mlp().state_dict())])
def test_only_a_path_takes_an_output(source, tmp_path):
    model = source()
    with pytest.raises(ArgumentError, match="output= goes with a path"):
        fewbits.quantize(model, "int8", output=tmp_path / "out", inplace=True)
    if isinstance(model, nn.Module):
        assert snapshot(model.state_dict()) == snapshot(mlp().state_dict())
    assert not files_in(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "near"),
    [("int88", "int8"), ("INT8", None), ("in4", "int4"), ("fp61", "fp16"), ("int8_tensor", "int8-tensor"), ("", None)],
)
def test_an_unknown_scheme_is_refused_with_the_nearest(scheme, near):
    with pytest.raises(ArgumentError) as caught:
        fewbits.quantize(mlp(), scheme)
    assert f"there is no scheme {scheme!r}; there are 'int8-tensor', 'int8', 'int4', 'fp16'" in str(caught.value)
    assert near is None or f"did you mean {near!r}?" in str(caught.value)


@pytest.mark.parametrize("junk", [None, 8, Int8PerChannel, ("int8",), ["int8"], {"scheme": "int8"}], ids=repr)
def test_what_is_no_scheme_is_refused(junk):
    with pytest.raises(ArgumentError, match="scheme"):
        fewbits.quantize(mlp(), junk)


def test_an_option_that_the_scheme_does_not_take_is_named():
    with pytest.raises(ArgumentError, match=r"'int8'.*group_size"):
        fewbits.quantize(mlp(), "int8", group_size=64)


def test_options_reach_the_scheme():
    result = fewbits.quantize(mlp(), "int4", group_size=8, symmetric=False, scale_dtype=torch.float16)
    spec = result.ledger["0.weight"].spec
    assert (spec.group_size, spec.symmetric, spec.scale_dtype) == (8, False, torch.float16)


def test_include_and_exclude_reach_the_selector():
    assert fewbits.quantize(mlp(), "int8", exclude=["0"]).ledger["0.weight"].reason == "excluded by '0'"
    assert fewbits.quantize(mlp(), "int8", include=["0"]).ledger["2.weight"].reason == "no include rule names it"


@pytest.mark.parametrize("rule", ["include", "exclude"])
def test_rules_and_a_selector_exclude_each_other(rule):
    with pytest.raises(ArgumentError, match="include and exclude are rules of the default selector"):
        fewbits.quantize(mlp(), "int8", selector=LayerSelector(), **{rule: ["0"]})


@pytest.mark.parametrize("rule", ["include", "exclude"])
def test_one_string_in_place_of_a_list_is_refused(rule):
    with pytest.raises(SelectionError, match=rf"{rule} is a sequence"):
        fewbits.quantize(mlp(), "int8", **{rule: "0"})


@pytest.mark.parametrize("options", [{"include": ["0"]}, {"exclude": ["0"]}, {"scale_dtype": torch.float16}])
def test_options_of_a_quantizer_go_to_the_quantizer(options):
    with pytest.raises(ArgumentError, match=rf"{next(iter(options))}: pass these to the quantizer itself"):
        fewbits.quantize(mlp(), Int8PerChannel(), **options)


def test_a_quantizer_that_is_in_use_is_refused():
    quantizer = Int8PerChannel()
    fewbits.quantize(mlp(), quantizer)
    with pytest.raises(fewbits.StateError, match=r"call reset\(\) first"):
        fewbits.quantize(mlp(), quantizer)


def test_in_place_the_model_itself_becomes_the_result():
    model = mlp()
    result = fewbits.quantize(model, "int8", inplace=True)
    assert result.model is model
    assert result.report.ok
    assert result.report.sqnr_db > 30


@pytest.mark.parametrize("inplace", [False, True])
def test_without_validation_there_is_no_report(inplace):
    result = fewbits.quantize(mlp(), "int8", validate=False, inplace=inplace)
    assert result.report is None
    assert result.quantizer.state is State.CONVERTED


def test_in_place_without_measuring_a_later_validation_says_what_it_could_not_check():
    result = fewbits.quantize(mlp(), "int8", validate=False, inplace=True)
    report = result.quantizer.validate()
    assert report.ok
    assert report.sqnr_db is None
    assert "no source" in report.unchecked[0]


def test_a_failure_raises_with_the_report():
    with pytest.raises(ValidationError, match=r"0\.weight: SQNR .* dB is below 10 dB") as caught:
        fewbits.quantize(poor(), "int8-tensor")
    assert not caught.value.report.ok
    assert "0.weight" in caught.value.report.failures[0]


def test_a_failure_can_be_a_warning():
    with pytest.warns(UserWarning, match=r"validation failed:(?s:.*)0\.weight"):
        result = fewbits.quantize(poor(), "int8-tensor", on_failure="warn")
    assert not result.report.ok


def test_a_failure_can_be_left_to_the_report():
    result = fewbits.quantize(poor(), "int8-tensor", on_failure="ignore")
    assert not result.report.ok
    assert result.quantizer.state is State.VALIDATED


@pytest.mark.parametrize(("fail_under", "ok"), [(-100, True), (0, True), (1000, False)])
def test_fail_under_moves_the_line(fail_under, ok):
    report = fewbits.quantize(mlp(), "int4", group_size=8, on_failure="ignore", fail_under=fail_under).report
    assert report.ok is ok


@pytest.mark.parametrize("reaction", ["raise", None, True])
def test_an_unknown_reaction_to_failures_is_refused_before_anything_is_written(checkpoint, reaction):
    with pytest.raises(ArgumentError, match="on_failure must be 'error', 'warn' or 'ignore'"):
        fewbits.quantize(checkpoint, "int8", output=checkpoint.with_name("out"), on_failure=reaction)
    assert list(files_in(checkpoint.parent)) == ["source.safetensors"]


def test_progress_is_told_before_and_after_every_tensor_of_each_activity():
    told = []
    ledger = fewbits.quantize(mlp(), "int8", progress=told.append).ledger
    assert [step.activity for step in told] == ["convert"] * 2 * len(ledger) + ["validate"] * 2 * len(ledger)
    for steps in (told[: len(told) // 2], told[len(told) // 2 :]):
        assert [step.name for step in steps] == [row.name for row in ledger for _ in range(2)]
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert (steps[0].done, steps[-1].done) == (0, ledger.bytes_before)
        assert {step.total for step in steps} == {ledger.bytes_before}
