"""`quantize`, the lifecycle in one call."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import Int8PerChannel, LayerSelector, MinMaxObserver, QuantizedTensor, Result, State
from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError, CalibrationError, SelectionError, ValidationError
from fewbits.observers import OBSERVERS
from support import lifecycle_helpers
from support.lifecycle_helpers import JsonSerializer, Watcher, files_in, hook_count, snapshot, stored

SCHEMES = ["int8", "int8-tensor", "int4", "fp16"]


def mlp(seed=0):
    """Linear, ReLU, Linear, with weights large enough to be quantized."""
    return lifecycle_helpers.mlp(seed, width=64)


def poor():
    """A model for which a single scale is bad: one large weight, and thousands that round to zero."""
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
    [
        ("int88", "int8"),
        ("INT8", "int8"),
        ("in4", "int4"),
        ("fp61", "fp16"),
        ("int8_tensor", "int8-tensor"),
        ("", None),
    ],
)
def test_an_unknown_scheme_is_refused_with_the_nearest(scheme, near):
    hint = f" (did you mean {near!r}?)" if near else ""
    with pytest.raises(ArgumentError) as caught:
        fewbits.quantize(mlp(), scheme)
    assert f"no scheme {scheme!r}{hint}; there are 'int8-tensor', 'int8', 'int2', 'int3'" in str(caught.value)


@pytest.mark.parametrize("junk", [8, Int8PerChannel, ("int8",), ["int8"], {"scheme": "int8"}], ids=repr)
def test_a_scheme_of_another_type_is_refused(junk):
    with pytest.raises(ArgumentError, match="scheme"):
        fewbits.quantize(mlp(), junk)


def test_without_a_scheme_or_a_config_the_schemes_are_listed():
    with pytest.raises(ArgumentError, match=r"give a scheme or a config; .* 'int8-tensor', 'int8', 'int2', 'int3'"):
        fewbits.quantize(mlp())


def test_a_setting_of_other_schemes_is_refused_with_their_names():
    with pytest.raises(ArgumentError, match="'int8' does not take group_size, a setting of 'int2'"):
        fewbits.quantize(mlp(), "int8", group_size=64)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("groupsize", "group_size"), ("exlude", "exclude"), ("ouput", "output"), ("validat", "validate"), ("zzz", None)],
)
@pytest.mark.parametrize("scheme", ["int4", Int8PerChannel()], ids=["named", "own"])
def test_an_unknown_setting_is_refused_with_the_nearest_and_all_settings(scheme, wrong, near):
    with pytest.raises(ArgumentError) as caught:
        fewbits.quantize(mlp(), scheme, **{wrong: 64})
    hint = f" (did you mean {near!r}?)" if near else ""
    assert f"there is no setting {wrong!r}{hint}; there are scheme, group_size, symmetric" in str(caught.value)


def test_a_misspelled_argument_of_plan_is_refused_with_the_nearest_of_plan():
    with pytest.raises(ArgumentError, match=r"no setting 'ouput' \(did you mean 'output'\?\)"):
        fewbits.plan(mlp(), "int8", ouput="out")
    with pytest.raises(ArgumentError, match=r"no setting 'inplace'; there are"):
        fewbits.plan(mlp(), "int8", inplace=True)


def test_settings_reach_the_scheme():
    result = fewbits.quantize(mlp(), "int4", group_size=8, symmetric=False, scale_dtype=torch.float16)
    spec = result.ledger["0.weight"].spec
    assert (spec.group_size, spec.symmetric, spec.scale_dtype) == (8, False, torch.float16)


def test_rules_reach_the_selector():
    assert fewbits.quantize(mlp(), "int8", exclude=["0"]).ledger["0.weight"].reason == "excluded by '0'"
    assert fewbits.quantize(mlp(), "int8", include=["0"]).ledger["2.weight"].reason == "no include rule names it"
    assert fewbits.quantize(mlp(), "int8", overrides={"2": "keep"}).ledger["2.weight"].fate == "kept"
    assert fewbits.quantize(mlp(), "int8", min_elements=513).ledger["2.weight"].fate == "kept"
    assert fewbits.quantize(mlp(), "int8", min_elements=512).ledger["2.weight"].fate == "quantized"


def test_an_override_gives_one_layer_another_spec():
    ledger = fewbits.quantize(mlp(), "int8", overrides={"2": {"scheme": "int4", "group_size": 16}}).ledger
    assert ledger["0.weight"].spec.bits == 8
    assert (ledger["2.weight"].spec.bits, ledger["2.weight"].spec.group_size) == (4, 16)


@pytest.mark.parametrize(
    ("rule", "value"), [("include", ["0"]), ("exclude", ["0"]), ("overrides", {"0": "keep"}), ("min_elements", 1)]
)
@pytest.mark.parametrize("in_config", [False, True])
def test_rules_and_a_selector_exclude_each_other(rule, value, in_config):
    config = QuantizationConfig(**{rule: value}) if in_config else None
    settings = {} if in_config else {rule: value}
    with pytest.raises(ArgumentError, match=f"^{rule}: rules of the default selector"):
        fewbits.quantize(mlp(), "int8", config=config, selector=LayerSelector(), **settings)


@pytest.mark.parametrize("rule", ["include", "exclude"])
def test_a_string_is_refused_as_a_list(rule):
    with pytest.raises(ArgumentError, match=rf"{rule} must be a list of name patterns"):
        fewbits.quantize(mlp(), "int8", **{rule: "0"})


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(SelectionError, match="'1' matches nothing"):
        fewbits.quantize(mlp(), "int8", exclude=["1"])


# Keywords, config and defaults.


def spec_of(scheme=None, **settings):
    return fewbits.quantize(mlp(), scheme, **settings).ledger["0.weight"].spec


def test_a_config_gives_the_same_bytes_as_the_same_settings(tmp_path):
    settings = {"group_size": 8, "symmetric": False, "exclude": ["2"], "observer": "mse"}
    fewbits.quantize(mlp(), config=QuantizationConfig(scheme="int4", **settings)).save(tmp_path / "config")
    fewbits.quantize(mlp(), "int4", **settings).save(tmp_path / "keywords")
    assert (tmp_path / "config").read_bytes() == (tmp_path / "keywords").read_bytes()


def test_keywords_outrank_the_config_and_the_config_the_defaults():
    config = QuantizationConfig(scheme="int4", group_size=8, symmetric=False)
    assert (spec_of(config=config).group_size, spec_of(config=config).symmetric) == (8, False)
    outranked = spec_of(config=config, group_size=4)
    assert (outranked.group_size, outranked.symmetric) == (4, False)
    assert spec_of(config=config, group_size=None, ragged="shorter").group_size == 128
    assert spec_of("int4", ragged="shorter").symmetric is True


def test_a_scheme_outranks_the_scheme_of_the_config():
    config = QuantizationConfig(scheme="int4", exclude=["2"])
    result = fewbits.quantize(mlp(), "int8", config=config)
    assert result.ledger["0.weight"].spec.bits == 8
    assert result.ledger["2.weight"].fate == "kept"


def test_a_setting_of_the_config_is_refused_if_the_new_scheme_does_not_take_it():
    config = QuantizationConfig(scheme="int4", group_size=8)
    with pytest.raises(ArgumentError, match="'int8' does not take group_size"):
        fewbits.quantize(mlp(), "int8", config=config)
    assert spec_of("int8", config=config, group_size=None).bits == 8


def test_a_list_of_the_config_is_replaced_not_extended():
    config = QuantizationConfig(exclude=["0"])
    assert fewbits.quantize(mlp(), config=config, exclude=["2"]).ledger["0.weight"].fate == "quantized"


def test_a_config_stays_as_it_is():
    config = QuantizationConfig(scheme="int4", group_size=8)
    before = config.to_dict()
    fewbits.quantize(mlp(), "int8", config=config, group_size=None, exclude=["2"])
    assert config.to_dict() == before


@pytest.mark.parametrize("junk", ["config.toml", {"scheme": "int8"}, QuantizationConfig], ids=repr)
def test_a_config_of_another_type_is_refused_with_advice(junk):
    with pytest.raises(ArgumentError, match=r"config must be a QuantizationConfig, not .*from_file\(path\)"):
        fewbits.quantize(mlp(), config=junk)


def test_thresholds_of_a_config_reach_the_validation():
    with pytest.raises(ValidationError, match="is below 1000 dB"):
        fewbits.quantize(mlp(), config=QuantizationConfig(fail_under=1000))
    config = QuantizationConfig(fail_under=1000, on_failure="ignore")
    assert not fewbits.quantize(mlp(), config=config).report.ok
    assert fewbits.quantize(mlp(), config=config, fail_under=10).report.ok
    with pytest.warns(UserWarning, match="validation failed"):
        fewbits.quantize(mlp(), config=config, on_failure="warn")


# Observers and other strategies.


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("recipe", [str, lambda name: {"name": name}], ids=["name", "table"])
def test_an_observer_can_be_named(name, recipe):
    result = fewbits.quantize(mlp(), "int8", observer=recipe(name), data=[torch.randn(4, 16)])
    assert type(result.quantizer.observer) is OBSERVERS[name]
    assert result.report.ok


def test_an_observer_object_outranks_a_named_observer():
    observer = Watcher()
    config = QuantizationConfig(observer="mse", activation_observer="histogram")
    result = fewbits.quantize(mlp(), config=config, observer=observer, data=[torch.randn(4, 16)])
    assert result.quantizer.observer is observer
    assert type(result.quantizer.activation_observer) is OBSERVERS["histogram"]
    renamed = fewbits.quantize(mlp(), config=config, observer="minmax", activation_observer=MinMaxObserver())
    assert type(renamed.quantizer.observer) is type(renamed.quantizer.activation_observer) is MinMaxObserver


@pytest.mark.parametrize(
    ("strategy", "junk", "message"),
    [
        ("observer", "mss", r"there is no observer 'mss' \(did you mean 'mse'"),
        ("observer", {"name": "minmax", "bins": 8}, "'minmax' does not take 'bins'"),
        ("observer", MinMaxObserver, "observer must be an instance of Observer"),
        ("activation_observer", 8, "activation_observer must be an instance of Observer"),
        ("selector", "layers", "selector must be an instance of LayerSelector"),
        ("serializer", {"name": "json"}, "serializer must be an instance of Serializer"),
    ],
)
def test_a_strategy_of_another_type_is_refused(strategy, junk, message):
    with pytest.raises(ArgumentError, match=message):
        fewbits.quantize(mlp(), "int8", **{strategy: junk})


def test_a_selector_and_a_serializer_are_used(tmp_path):
    serializer = JsonSerializer()
    result = fewbits.quantize(mlp(), "int8", selector=LayerSelector(exclude=["2"]), serializer=serializer)
    result.save(tmp_path / "model.json")
    assert result.ledger["2.weight"].fate == "kept"
    assert "model.json" in [*serializer.written, *serializer.opened]


def seen_samples(batches, **settings):
    """The number of samples that reach the first layer."""
    shapes = []
    observer = Watcher(lambda x: shapes.append(tuple(x.shape)))
    fewbits.quantize(mlp(), "int8", data=batches, observer=observer, **settings)
    return sum(rows for rows, columns in shapes if columns == 16)


def test_samples_limits_how_much_data_is_run():
    batches = [torch.randn(1, 16) for _ in range(200)]
    assert seen_samples(batches) == 150
    assert seen_samples(batches, samples=7) == 7
    assert seen_samples(batches, config=QuantizationConfig(samples=20)) == 20
    assert seen_samples(batches, samples=None) == 200


def test_forward_runs_the_batches():
    shown = []
    fewbits.quantize(
        mlp(),
        "int8",
        observer=Watcher(shown.append),
        data=[{"rows": torch.ones(3, 16)}],
        forward=lambda model, batch: model(batch["rows"]),
    )
    assert len(shown) == 2


@pytest.mark.parametrize(("mishap", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (ValueError, CalibrationError)])
def test_any_error_removes_the_hooks_from_the_model(mishap, raised):
    model = mlp()

    def forward(model, batch):
        raise mishap

    with pytest.raises(raised):
        fewbits.quantize(model, "int8", inplace=True, observer=Watcher(), data=[0], forward=forward)
    assert hook_count(model) == 0
    assert snapshot(model.state_dict()) == snapshot(mlp().state_dict())


# A custom quantizer.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("include", ["0"]),
        ("exclude", ["0"]),
        ("scale_dtype", torch.float16),
        ("observer", "mse"),
        ("observer", MinMaxObserver()),
        ("selector", LayerSelector()),
        ("serializer", JsonSerializer()),
        ("config", QuantizationConfig(scheme="int4")),
        ("config", QuantizationConfig(exclude=["0"])),
    ],
)
def test_settings_of_a_quantizer_are_refused_beside_it(name, value):
    given = value.changed()[0] if name == "config" else name
    with pytest.raises(ArgumentError, match=rf"^{given}: pass these to the quantizer, Int8PerChannel\("):
        fewbits.quantize(mlp(), Int8PerChannel(), **{name: value})


def test_settings_of_the_run_are_allowed_beside_a_quantizer():
    config = QuantizationConfig(fail_under=1000, on_failure="error")
    with pytest.raises(ValidationError, match="is below 1000 dB"):
        fewbits.quantize(mlp(), Int8PerChannel(), config=config)
    assert not fewbits.quantize(mlp(), Int8PerChannel(), config=config, on_failure="ignore").report.ok
    shown = []
    quantizer = Int8PerChannel(observer=Watcher(shown.append))
    fewbits.quantize(mlp(), quantizer, data=[torch.ones(1, 16)] * 9, samples=2)
    assert len(shown) == 4


def test_a_quantizer_that_is_in_use_is_refused():
    quantizer = Int8PerChannel()
    fewbits.quantize(mlp(), quantizer)
    with pytest.raises(fewbits.errors.StateError, match=r"call reset\(\) first"):
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


def test_in_place_without_comparing_a_later_validation_names_the_missing_checks():
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


def test_a_failure_can_appear_only_in_the_report():
    result = fewbits.quantize(poor(), "int8-tensor", on_failure="ignore")
    assert not result.report.ok
    assert result.quantizer.state is State.VALIDATED


@pytest.mark.parametrize(("fail_under", "ok"), [(-100, True), (0, True), (1000, False)])
def test_fail_under_decides_which_tensors_fail(fail_under, ok):
    report = fewbits.quantize(mlp(), "int4", group_size=8, on_failure="ignore", fail_under=fail_under).report
    assert report.ok is ok


@pytest.mark.parametrize("reaction", ["raise", None, True])
def test_an_unknown_on_failure_is_refused_before_anything_is_written(checkpoint, reaction):
    with pytest.raises(ArgumentError, match="on_failure must be 'error', 'warn' or 'ignore'"):
        fewbits.quantize(checkpoint, "int8", output=checkpoint.with_name("out"), on_failure=reaction)
    assert list(files_in(checkpoint.parent)) == ["source.safetensors"]


def test_progress_is_called_before_and_after_every_tensor_of_each_activity():
    told = []
    ledger = fewbits.quantize(mlp(), "int8", progress=told.append).ledger
    assert [step.activity for step in told] == ["convert"] * 2 * len(ledger) + ["validate"] * 2 * len(ledger)
    for steps in (told[: len(told) // 2], told[len(told) // 2 :]):
        assert [step.name for step in steps] == [row.name for row in ledger for _ in range(2)]
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert (steps[0].done, steps[-1].done) == (0, ledger.bytes_before)
        assert {step.total for step in steps} == {ledger.bytes_before}


@pytest.mark.parametrize("source", ["module", "mapping", "file"])
@pytest.mark.parametrize("activity", ["convert", "validate"])
def test_an_error_in_progress_reaches_the_caller(checkpoint, source, activity):
    def fail(step):
        if step.activity == activity:
            raise ZeroDivisionError

    made = {"module": mlp, "mapping": lambda: mlp().state_dict(), "file": lambda: checkpoint}[source]()
    output = checkpoint.with_name("out") if source == "file" else None
    with pytest.raises(ZeroDivisionError):
        fewbits.quantize(made, "int8", output=output, progress=fail)
