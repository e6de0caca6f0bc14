"""`QuantizationConfig`: allowed and refused values, and round trips through dict, file and pickle."""

import copy
import json
import pickle
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import CastSpec, LayerSelector, MinMaxObserver, QuantSpec
from fewbits.config.config import SETTINGS, VERSION, QuantizationConfig
from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.dtypes import POWERS_OF_TWO, SCALE_DTYPES, dtype_name
from fewbits.observers import OBSERVERS
from fewbits.schemes import SCHEMES
from support.lifecycle_helpers import FEWER_EXAMPLES

# Settings as in a file: only strings, numbers, booleans, lists and tables.

NAMES = st.text("ab_0*?", min_size=1, max_size=3)
PATTERNS = st.lists(NAMES, min_size=1, max_size=3).map(".".join) | st.sampled_from(["re:.*", "re:[a=]+", 're:a"\\d'])
PATTERN_LISTS = st.lists(PATTERNS, max_size=3)
TYPES = st.lists(st.sampled_from(["Embedding", "Linear", "LayerNorm"]), max_size=2)
AVAILABLE = [name for name in SCHEMES if name != "mxfp4" or POWERS_OF_TWO]
DTYPES = st.sampled_from([dtype_name(dtype) for dtype in SCALE_DTYPES])
RECIPES = st.sampled_from([*OBSERVERS, *({"name": name} for name in OBSERVERS)]) | st.builds(
    lambda percentile: {"name": "percentile", "percentile": percentile}, st.floats(90, 100)
)
RULES = (
    st.sampled_from(["keep", *AVAILABLE])
    | st.fixed_dictionaries({"scheme": st.just("int4"), "group_size": st.integers(1, 512)})
    | st.fixed_dictionaries({"scheme": st.just("int4"), "symmetric": st.booleans()})
    | st.fixed_dictionaries({"scheme": st.just("int8"), "bits": st.integers(2, 8), "scale_dtype": DTYPES})
    | st.sampled_from([QuantSpec(3, "channel").to_dict(), CastSpec(torch.bfloat16).to_dict()])
)  # fmt: skip
AXES = st.integers(-3, 3) | st.lists(st.integers(-3, 3), min_size=1, max_size=2)

ANYWHERE = {
    "ragged": st.sampled_from(["auto", "shorter", "fallback", "error"]),
    "observer": RECIPES,
    "activation_observer": RECIPES,
    "include": PATTERN_LISTS,
    "exclude": PATTERN_LISTS,
    "include_types": TYPES,
    "exclude_types": TYPES,
    "modules_to_not_convert": PATTERN_LISTS,
    "overrides": st.dictionaries(PATTERNS, RULES, max_size=3),
    "embeddings": st.sampled_from(["keep", "quantize"]) | RULES,
    "input_axes": st.dictionaries(PATTERNS, AXES, max_size=3),
    "min_elements": st.none() | st.integers(0, 10**9),
    "skip_types": TYPES,
    "samples": st.integers(1, 10**9),
    "fail_under": st.floats(-1e9, 1e9) | st.integers(-100, 100),
    "on_failure": st.sampled_from(["error", "warn", "ignore"]),
}
INT8 = {"activations": st.sampled_from(["dynamic", "static"]), "scale_dtype": DTYPES}
INT4 = {"group_size": st.integers(1, 512), "symmetric": st.booleans(), "scale_dtype": DTYPES}
FLOAT = {"scale_dtype": DTYPES}
NF4 = {"group_size": st.integers(1, 512)} | FLOAT
OF_SCHEME = {
    "int8": INT8, "int8-tensor": INT8, "int3": INT4, "int4": INT4, "nf4": NF4, "mxfp4": FLOAT, "fp8": FLOAT, "fp16": {},
}  # fmt: skip


def settings_of(scheme):
    return st.fixed_dictionaries({"scheme": st.just(scheme)}, optional=ANYWHERE | OF_SCHEME[scheme])


SETTINGS_OF_FILES = st.sampled_from([name for name in OF_SCHEME if name in AVAILABLE]).flatmap(settings_of)
CONFIGS = SETTINGS_OF_FILES.map(QuantizationConfig.from_dict)


def toml(value):
    """A value in TOML syntax, with inline tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


def without_none(value):
    """Write TOML. Settings that are None are left out, because TOML has no null."""
    if isinstance(value, dict):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return value


def toml_document(settings):
    return "".join(f"{key} = {toml(value)}\n" for key, value in without_none(settings).items())


@given(CONFIGS)
def test_a_config_survives_json(config):
    settings = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = QuantizationConfig.from_dict(settings)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_dict() == settings
    assert list(again.overrides.items()) == list(config.overrides.items())


@FEWER_EXAMPLES
@given(SETTINGS_OF_FILES)
def test_a_file_gives_the_same_config_as_its_dict(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("config")
    (folder / "c.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "c.toml").write_text(toml_document(settings), encoding="utf-8")
    expected = QuantizationConfig.from_dict(settings)
    assert QuantizationConfig.from_file(folder / "c.json") == expected
    assert QuantizationConfig.from_file(str(folder / "c.toml")) == expected


@given(CONFIGS)
def test_a_config_survives_pickle_deepcopy_and_its_own_repr(config):
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    names = {"QuantizationConfig": QuantizationConfig, "torch": torch, "QuantSpec": QuantSpec, "CastSpec": CastSpec}
    assert eval(repr(config), names) == config


@given(CONFIGS, SETTINGS_OF_FILES)
def test_replacing_every_setting_gives_a_new_config(old, settings):
    new = QuantizationConfig.from_dict(settings)
    everything = {name: value for name, value in new.to_dict().items() if name != "version"}
    assert old.replace(**everything) == new
    assert old.replace() == old


@given(CONFIGS)
def test_a_replaced_setting_is_the_only_one_that_changes(config):
    replaced = config.replace(samples=7)
    assert replaced.samples == 7
    assert {name for name in SETTINGS if getattr(replaced, name) != getattr(config, name)} <= {"samples"}


@given(CONFIGS)
def test_every_config_makes_a_quantizer_with_its_settings(config):
    quantizer = config.quantizer()
    assert type(quantizer) is SCHEMES[config.scheme]
    assert quantizer.ragged == config.ragged
    if config.group_size is not None:
        assert quantizer.spec.group_size == config.group_size
    if config.symmetric is not None:
        assert quantizer.spec.symmetric is config.symmetric
    if config.activations is not None:
        assert quantizer.spec.activations == config.activations
    if config.scale_dtype is not None:
        assert quantizer.scale_dtype == getattr(torch, config.scale_dtype)
    if config.skip_types is not None:
        assert quantizer.skip_types == tuple(config.skip_types)


@given(CONFIGS)
def test_the_changed_settings_alone_give_an_equal_config(config):
    assert QuantizationConfig(**{name: getattr(config, name) for name in config.changed()}) == config


def test_the_default_is_int8_without_changed_settings():
    assert QuantizationConfig().scheme == "int8"
    assert QuantizationConfig().changed() == ()
    assert repr(QuantizationConfig()) == "QuantizationConfig()"


def test_the_defaults_match_those_of_quantizer_selector_and_validation():
    selector, quantizer = vars(LayerSelector()), QuantizationConfig().quantizer()
    assert vars(quantizer.selector) == selector
    assert isinstance(quantizer.observer, MinMaxObserver)
    assert quantizer.skip_types == type(quantizer).default_skip


def test_a_dict_has_the_version_and_every_setting():
    assert list(QuantizationConfig().to_dict()) == ["version", *SETTINGS]
    assert QuantizationConfig().to_dict()["version"] == VERSION == 1


def test_a_config_shares_nothing_with_its_arguments_or_results():
    rule, patterns, recipe = {"scheme": "int4", "group_size": 64}, ["a"], {"name": "percentile", "percentile": 99.0}
    overrides = {"b": rule}
    config = QuantizationConfig(scheme="int4", exclude=patterns, overrides=overrides, observer=recipe)
    before = config.to_dict()
    rule["group_size"], overrides["c"], recipe["percentile"] = 1, "keep", 1.0
    patterns.append("d")
    assert config.to_dict() == before
    config.to_dict()["overrides"]["b"]["group_size"] = 2
    assert config.to_dict() == before


def test_nothing_in_a_config_can_be_assigned_to():
    config = QuantizationConfig(overrides={"a": {"scheme": "int4"}}, exclude=["b"])
    with pytest.raises(AttributeError):
        config.scheme = "int4"
    with pytest.raises(TypeError):
        config.overrides["a"] = "keep"
    with pytest.raises(TypeError):
        config.overrides["a"]["scheme"] = "keep"
    assert config.exclude == ("b",)


def test_tables_read_like_dicts():
    config = QuantizationConfig(overrides={"a": {"scheme": "int4"}, "b": "keep"})
    assert config.overrides == {"a": {"scheme": "int4"}, "b": "keep"}
    assert len(config.overrides) == 2
    assert "c" not in config.overrides


def test_the_order_of_overrides_counts():
    one, other = {"a": "keep", "b": "int8"}, {"b": "int8", "a": "keep"}
    assert QuantizationConfig(overrides=one) != QuantizationConfig(overrides=other)


def test_dtypes_and_classes_are_written_by_name():
    settings = {"scale_dtype": torch.float16, "skip_types": [nn.Embedding], "include_types": [nn.Linear, "Conv2d"]}
    config = QuantizationConfig(**settings, overrides={"a": {"scheme": "int4", "scale_dtype": torch.float16}})
    assert config.scale_dtype == "float16"
    assert config.skip_types == (nn.Embedding,)
    written = config.to_dict()
    assert (written["scale_dtype"], written["skip_types"]) == ("float16", ["Embedding"])
    assert written["include_types"] == ["Linear", "Conv2d"]
    assert written["overrides"] == {"a": {"scheme": "int4", "scale_dtype": "float16"}}
    assert json.loads(json.dumps(written)) == written


def test_a_spec_in_the_overrides_survives_a_dict():
    levels = tuple(float(level) for level in range(-8, 8))
    spec = QuantSpec(4, "group", group_size=32, levels=levels)
    config = QuantizationConfig(overrides={"a": spec, "b": CastSpec(torch.bfloat16)})
    assert config.overrides["a"] is spec
    again = QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.overrides == {"a": spec, "b": CastSpec(torch.bfloat16)}


@pytest.mark.parametrize("given", [("a", "b"), iter(["a", "b"]), {"a": 1, "b": 2}.keys()], ids=type)
def test_patterns_may_be_any_sequence(given):
    assert QuantizationConfig(exclude=given).exclude == ("a", "b")


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_by_name_is_made(name):
    quantizer = QuantizationConfig(observer=name, activation_observer={"name": name}).quantizer()
    assert type(quantizer.observer) is OBSERVERS[name]
    assert type(quantizer.activation_observer) is OBSERVERS[name]


def test_a_table_has_the_arguments_of_the_observer():
    made = QuantizationConfig(observer={"name": "percentile", "percentile": 97.5}).quantizer().observer
    assert 97.5 in vars(made).values()


def test_every_call_makes_a_new_quantizer():
    config = QuantizationConfig(observer="mse")
    one, other = config.quantizer(), config.quantizer()
    assert one is not other
    assert one.observer is not other.observer
    assert one.state is fewbits.State.CREATED


def test_strategy_objects_replace_named_ones():
    observer, selector, serializer = MinMaxObserver(), LayerSelector(), fewbits.extend.SafetensorsSerializer()
    quantizer = QuantizationConfig(observer="mse", activation_observer="histogram").quantizer(
        observer=observer, activation_observer=observer, selector=selector, serializer=serializer
    )
    assert quantizer.observer is quantizer.activation_observer is observer
    assert (quantizer.selector, quantizer.serializer) == (selector, serializer)


RULES_OF_THE_SELECTOR = {
    "include": ["a"],
    "exclude": ["a"],
    "include_types": ["Linear"],
    "exclude_types": ["Linear"],
    "modules_to_not_convert": ["a"],
    "overrides": {"a": "keep"},
    "embeddings": "int8",
    "input_axes": {"a": 0},
    "min_elements": 1,
}


@pytest.mark.parametrize("rule", RULES_OF_THE_SELECTOR)
def test_rules_and_a_selector_exclude_each_other(rule):
    config = QuantizationConfig(**{rule: RULES_OF_THE_SELECTOR[rule]})
    with pytest.raises(
        ArgumentError, match=f"^{rule}: rules of the default selector; pass them to your selector instead"
    ):
        config.quantizer(selector=LayerSelector())


@pytest.mark.parametrize("strategy", ["observer", "activation_observer", "selector", "serializer"])
@pytest.mark.parametrize("junk", [0, "", object, MinMaxObserver])
def test_a_strategy_of_another_type_is_refused(strategy, junk):
    named = junk == "" and "observer" in strategy
    with pytest.raises(ArgumentError, match=f"no {strategy} ''" if named else f"{strategy} must be an instance of"):
        QuantizationConfig().quantizer(**{strategy: junk})


# Refused settings.

WRONG = [
    ("scheme", "int44", r"there is no scheme 'int44' \(did you mean 'int4'\?\); there are 'int8-tensor', 'int8', "),
    ("scheme", "INT8", r"there is no scheme 'INT8' \(did you mean 'int8'\?\)"),
    ("scheme", None, "there is no scheme None; there are 'int8-tensor'"),
    ("scheme", ["int8"], r"there is no scheme \['int8'\]"),
    ("group_size", 0, "group_size must be a whole number from 1 up, or None, not 0"),
    ("group_size", True, "group_size must be a whole number from 1 up, or None, not True"),
    ("group_size", 64.0, r"group_size must be a whole number from 1 up, or None, not 64\.0"),
    ("group_size", "64", "group_size must be a whole number from 1 up, or None, not '64'"),
    ("symmetric", 1, "symmetric must be None, True or False, not 1"),
    ("symmetric", "yes", "symmetric must be None, True or False, not 'yes'"),
    ("activations", "dynamical", "activations must be None, 'dynamic' or 'static', not 'dynamical'"),
    ("activations", True, "activations must be None, 'dynamic' or 'static', not True"),
    ("scale_dtype", "half", "scale_dtype must be None, 'float64', 'float32', .*, not 'half'"),
    ("scale_dtype", torch.int8, "scale_dtype must be None, 'float64', .* not 'int8'"),
    ("ragged", "short", "ragged must be 'auto', 'shorter', 'fallback' or 'error', not 'short'"),
    ("ragged", None, "ragged must be 'auto', 'shorter', 'fallback' or 'error', not None"),
    ("observer", "mss", r"there is no observer 'mss' \(did you mean 'mse'\?\); there are .*'minmax'"),
    ("activation_observer", "min-max", r"there is no activation_observer 'min-max' \(did you mean 'minmax'\?\)"),
    ("observer", {"percentile": 99}, "there is no observer None; there are "),
    ("observer", {"name": ["mse"]}, r"there is no observer \('mse',\); there are "),
    ("observer", {"name": "minmax", "percent": 9}, "observer: 'minmax' does not take 'percent'; it takes no arguments"),
    (
        "observer",
        {"name": "percentile", "percentil": 99},
        r"observer: 'percentile' does not take 'percentil' \(did you mean 'percentile'\?\); it takes percentile",
    ),
    ("observer", {"name": "percentile", "percentile": 300}, "percentile"),
    ("observer", {"name": "percentile", "percentile": "99"}, "percentile"),
    (
        "observer",
        5,
        r"observer must be a name or a table .* not 5; .* quantize\(\.\.\., observer=\.\.\.\)",
    ),
    ("observer", MinMaxObserver, "observer must be a name or a table in a config"),
    ("activation_observer", MinMaxObserver(), "activation_observer must be a name or a table in a config"),
    *(
        (rule, value, rf"{rule} must be a list of name patterns, such as \['lm_head'\], not ")
        for rule in ("include", "exclude", "modules_to_not_convert")
        for value in ("lm_head", None, 5, [5], [nn.Linear], {"lm_head": "keep"}, b"lm_head")
    ),
    *(
        (rule, value, rf"{rule} must be a list of classes or their names, such as \['Embedding'\], not ")
        for rule in ("include_types", "exclude_types")
        for value in ("Embedding", nn.Embedding, None, [5], {"Embedding": 1})
    ),
    ("skip_types", "Embedding", "skip_types must be a list of classes or their names, or None, not 'Embedding'"),
    ("skip_types", [None], r"skip_types must be a list of classes or their names, or None, not \(None,\)"),
    ("overrides", ["lm_head"], r"overrides must be a table by name pattern, such as \{'lm_head': 'keep'\}, not \['lm"),
    ("overrides", "keep", "overrides must be a table by name pattern"),
    ("overrides", None, "overrides must be a table by name pattern"),
    ("overrides", {"a": {"kind": "affin"}}, "the kind of a spec must be 'affine' or 'cast', not 'affin'"),
    ("overrides", {"a": {"scheme": "int4", "scale_dtype": "half16"}}, r"overrides\['a'\]: 'half16' is not the name"),
    ("input_axes", 1, "input_axes must be a table by name pattern"),
    ("min_elements", -1, "min_elements must be a whole number from 0 up, or None, not -1"),
    ("min_elements", 1e3, r"min_elements must be a whole number from 0 up, or None, not 1000\.0"),
    ("samples", 0, "samples must be a whole number from 1 up, or None, not 0"),
    ("samples", False, "samples must be a whole number from 1 up, or None, not False"),
    ("fail_under", "10", "fail_under must be a number of dB, not '10'"),
    ("fail_under", None, "fail_under must be a number of dB, not None"),
    ("fail_under", True, "fail_under must be a number of dB, not True"),
    ("fail_under", float("nan"), "fail_under must be a number of dB, not nan"),
    ("fail_under", float("inf"), "fail_under must be a number of dB, not inf"),
    ("on_failure", "raise", "on_failure must be 'error', 'warn' or 'ignore', not 'raise'"),
]


@pytest.mark.parametrize(("setting", "value", "message"), WRONG, ids=lambda v: str(v)[:20])
def test_a_wrong_value_is_refused_with_the_allowed_values(setting, value, message):
    with pytest.raises(ArgumentError, match=message):
        QuantizationConfig(**{setting: value})


MALFORMED = [
    ("exclude", ["re:("], r"'re:\(' is not a valid regular expression"),
    ("include", ["a..b"], "'a..b' has an empty component"),
    ("overrides", {"a": "int9"}, "there is no scheme 'int9'"),
    ("overrides", {"a": 5}, r"overrides\['a'\]"),
    ("overrides", {"a": {"scheme": "int4", "group": 5}}, r"overrides\['a'\]: there is no field 'group'"),
    ("overrides", {"a": {"scheme": "int4", "group_size": 0}}, r"overrides\['a'\]: .*group_size.* not 0"),
    ("overrides", {"a": {"scheme": "fp16", "bits": 4}}, r"overrides\['a'\]: .*'bits'"),
    ("input_axes", {"a": "0"}, r"input_axes\['a'\]"),
    ("input_axes", {"a": []}, r"input_axes\['a'\]"),
]


@pytest.mark.parametrize(("setting", "value", "message"), MALFORMED, ids=str)
def test_a_malformed_rule_is_refused_when_the_config_is_made(setting, value, message):
    with pytest.raises(SelectionError, match=message):
        QuantizationConfig(**{setting: value})


@pytest.mark.parametrize(
    ("scheme", "setting", "message"),
    [
        (
            "int8",
            {"group_size": 64},
            "'int8' does not take group_size, a setting of 'int2', 'int3', 'int4', 'int5', 'int6', 'int7', 'nf4'",
        ),
        ("fp16", {"symmetric": True}, "'fp16' does not take symmetric, a setting of 'int2', 'int3', 'int4'"),
        (
            "int4",
            {"activations": "static"},
            "'int4' does not take activations, a setting of 'int8-tensor', 'int8'",
        ),
        ("fp16", {"scale_dtype": "float16"}, "fp16 has no codes"),
        ("fp16", {"rounding": "gptq"}, "fp16 has no codes"),
    ],
)
def test_a_setting_of_other_schemes_is_refused_with_their_names(scheme, setting, message):
    with pytest.raises(ArgumentError, match=message):
        QuantizationConfig(scheme=scheme, **setting)
    taken = QuantizationConfig(scheme="int4" if scheme != "int4" else "int8", **setting) if scheme != "fp16" else None
    with pytest.raises(ArgumentError, match=message):
        (taken or QuantizationConfig()).replace(scheme=scheme, **setting)


def test_replace_refuses_an_unknown_setting():
    with pytest.raises(ArgumentError, match=r"no setting 'groupsize' \(did you mean 'group_size'\?\); there are"):
        QuantizationConfig().replace(groupsize=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int8", "version": 2}, "version must be 1, not 2; .* needs a later fewbits"),
        ({"scheme": "int8", "version": "1"}, "version must be 1, not '1'"),
        ({"scheme": "int8", "version": True}, "version must be 1, not True"),
        ({"scheme": "int8", "version": None}, "version must be 1, not None"),
        ({"version": 1}, "scheme is missing; there are 'int8-tensor', 'int8', 'int2'"),
        ({}, "scheme is missing"),
        ({"scheme": "int8", "exlude": []}, r"there is no setting 'exlude' \(did you mean 'exclude'\?\); .*overrides"),
        ({"scheme": "int8", 5: 5}, "there is no setting 5; there are scheme, group_size"),
        ({"scheme": "int4", "group_size": "64"}, "group_size must be a whole number from 1 up, or None, not '64'"),
        ([("scheme", "int8")], "a config is a table of settings, not "),
        (None, "a config is a table of settings, not None"),
    ],
)
def test_an_invalid_dict_is_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        QuantizationConfig.from_dict(settings)


def test_a_missing_version_means_version_1():
    assert QuantizationConfig.from_dict({"scheme": "int4"}) == QuantizationConfig(scheme="int4")


def test_from_dict_does_not_change_its_argument():
    settings = {"version": 1, "scheme": "int4"}
    QuantizationConfig.from_dict(settings)
    assert settings == {"version": 1, "scheme": "int4"}


# Files.

HAND_WRITTEN = """
scheme = "int4"
group_size = 64
exclude = ["lm_head"]
observer = {name = "percentile", percentile = 99.5}

[overrides]
"layers.0" = "int8"
"re:.*down_proj" = {scheme = "int4", group_size = 32}

[input_axes]
experts = [1]
"""


def test_a_file_written_by_hand(tmp_path):
    path = tmp_path / "fewbits.TOML"
    path.write_text(HAND_WRITTEN)
    assert QuantizationConfig.from_file(path) == QuantizationConfig(
        scheme="int4",
        group_size=64,
        exclude=["lm_head"],
        observer={"name": "percentile", "percentile": 99.5},
        overrides={"layers.0": "int8", "re:.*down_proj": {"scheme": "int4", "group_size": 32}},
        input_axes={"experts": [1]},
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", b'{"scheme": "int9"}', "there is no scheme 'int9'"),
        ("c.json", b'{"scheme": "int8", "exclude": ["re:("]}', "not a valid regular expression"),
        ("c.json", b'{"scheme": "int8", "exclud": []}', "did you mean 'exclude'"),
        ("c.json", b'{"scheme": "int8", "fail_under": NaN}', "fail_under must be a number of dB, not nan"),
        ("c.json", b'{"scheme": "int8",', "not a valid config file: .*line 1"),
        ("c.json", b"", "not a valid config file"),
        ("c.json", b"[]", r"a config is a table of settings, not \[\]"),
        ("c.json", b'{"scheme": "int8", "overrides": {"a": "keep", "b": "int8", "a": "int4"}}', "appears twice"),
        ("c.json", b'{"scheme": "\xff"}', "not a valid config file: .*utf-8"),
        ("c.yaml", b"scheme: int8", r"ends in \.toml or \.json"),
        ("c", b"", r"ends in \.toml or \.json"),
        ("c.toml", b"scheme = int8", "not a valid config file: .*line 1"),
        ("c.toml", b'scheme = "int8"\nscheme = "int4"', "not a valid config file"),
        ("c.toml", b'scheme = "int8"\nsamples = 2026-01-01', "samples must be a whole"),
        ("c.toml", b"group_size = 64", "scheme is missing"),
    ],
)
def test_an_error_in_a_file_names_the_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ArgumentError, SelectionError), match=message) as caught:
        QuantizationConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["missing.json", "missing.toml", "folder.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ArgumentError, match=r"cannot be read: (No such file|Is a directory)") as caught:
        QuantizationConfig.from_file(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_without_a_toml_parser_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    (tmp_path / "c.toml").write_text('scheme = "int8"')
    with pytest.raises(ArgumentError, match=r"TOML needs Python 3\.11, or pip install 'fewbits\[toml\]'"):
        QuantizationConfig.from_file(tmp_path / "c.toml")
    (tmp_path / "c.json").write_text('{"scheme": "int8"}')
    assert QuantizationConfig.from_file(tmp_path / "c.json") == QuantizationConfig()


def test_before_python_3_11_tomli_reads_toml(tmp_path, monkeypatch):
    tomli = types.ModuleType("tomli")
    tomli.loads = lambda text: {"scheme": text}
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", tomli)
    (tmp_path / "c.toml").write_text("fp16")
    assert QuantizationConfig.from_file(tmp_path / "c.toml").scheme == "fp16"
