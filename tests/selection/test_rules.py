"""Overrides and input axes: their forms, which rule wins, and which rules are refused."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits import CastSpec, LayerSelector, QuantSpec
from fewbits.errors import SelectionError
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.spec import SPECS
from fewbits.selection.rules import parse_override
from support.lifecycle_helpers import entry
from support.strategies import FLOATS, specs

OWN = QuantSpec(bits=4, granularity="group", group_size=128, symmetric=False, scale_dtype=torch.float32)
INFOS = [
    entry("embed.weight", owner=nn.Embedding, skip="an embedding"),
    entry("layers.0.mlp.weight", owner=nn.Linear),
    entry("layers.1.mlp.weight", owner=nn.Linear),
    entry("layers.1.mlp.bias", (4,), owner=nn.Linear, obstacle="a bias is never quantized"),
    entry("head.weight", owner=nn.Linear),
]
AVAILABLE = {name: spec for name, spec in SPECS.items() if name != "mxfp4" or POWERS_OF_TWO}
TERNARY = (-1.0, 0.0, 1.0, 2.0)


def select(**rules):
    decisions = LayerSelector(min_elements=1, **rules).select(INFOS)
    return {info.name: decision for info, decision in zip(INFOS, decisions, strict=True)}


def spec_of(rule, own=OWN):
    """Apply a rule to a quantizer's own spec."""
    return parse_override("w", rule).spec(own)


# Overrides.


@pytest.mark.parametrize(
    ("rule", "spec"),
    [
        *AVAILABLE.items(),
        *(({"scheme": name}, spec) for name, spec in AVAILABLE.items()),
        (QuantSpec(bits=3, granularity="tensor"), QuantSpec(bits=3, granularity="tensor")),
        (CastSpec(torch.bfloat16), CastSpec(torch.bfloat16)),
        ({"group_size": 32}, attrs.evolve(OWN, group_size=32)),
        ({"bits": 3}, attrs.evolve(OWN, bits=3)),
        ({"symmetric": True}, attrs.evolve(OWN, symmetric=True)),
        ({"bits": 8, "symmetric": True}, attrs.evolve(OWN, bits=8, symmetric=True)),
        ({"scale_dtype": "float16"}, attrs.evolve(OWN, scale_dtype=torch.float16)),
        ({"scale_dtype": torch.float16}, attrs.evolve(OWN, scale_dtype=torch.float16)),
        ({"scale_dtype": None}, attrs.evolve(OWN, scale_dtype=None)),
        ({"granularity": "channel", "group_size": None}, attrs.evolve(OWN, granularity="channel", group_size=None)),
        ({"scheme": "int4", "group_size": 32}, QuantSpec(bits=4, granularity="group", group_size=32)),
        ({"scheme": "int8", "group_size": 64}, QuantSpec(bits=8, granularity="group", group_size=64)),
        ({"scheme": "int8-tensor", "bits": 6}, QuantSpec(bits=6, granularity="tensor")),
        ({"scheme": "int8", "activations": "static"}, attrs.evolve(SPECS["int8"], activations="static")),
        (
            {"scheme": "int8-tensor", "bits": 2, "levels": [*TERNARY]},
            QuantSpec(bits=2, granularity="tensor", levels=TERNARY),
        ),
    ],
    ids=str,
)
def test_every_form_of_an_override(rule, spec):
    assert spec_of(rule) == spec


@given(specs(), specs())
def test_the_fields_of_any_spec_turn_any_other_into_it(spec, own):
    assert spec_of(attrs.asdict(spec), own) == spec
    assert spec_of(spec, own) == spec


@given(specs(scale_dtypes=(None, *FLOATS)), specs())
def test_fields_that_are_not_named_stay_the_quantizer_s_own(spec, own):
    changes = {name: value for name, value in attrs.asdict(spec).items() if name in ("bits", "scale_dtype")}
    assert spec_of(changes, own) == attrs.evolve(own, **changes)


@given(st.integers(1, 300), specs())
def test_a_group_size_alone_makes_groups(size, own):
    assert spec_of({"group_size": size}, own) == attrs.evolve(own, granularity="group", group_size=size)


PATTERNS = ["*", "layers", "layers.1", "head", "re:.*weight"]


@given(st.lists(st.sampled_from(PATTERNS), unique=True, min_size=1), st.data())
def test_the_last_matching_pattern_wins(patterns, data):
    rules = st.sampled_from(["keep", "int8", "int4", "fp16", QuantSpec(bits=3, granularity="channel")])
    overrides = {pattern: data.draw(rules) for pattern in patterns}
    decisions = select(overrides=overrides)
    for name, decision in decisions.items():
        wild = {"*": True, "re:.*weight": name.endswith("weight")}
        matching = [pattern for pattern in patterns if wild.get(pattern, name.startswith(pattern))]
        if not matching:
            assert decision.override is None
            continue
        rule = overrides[matching[-1]]
        assert (decision.reason, decision.named) == (f"override {matching[-1]!r}", True)
        assert decision.quantize == (rule != "keep")
        assert decision.override == parse_override("w", rule)


@pytest.mark.parametrize(
    ("scheme", "hint"),
    [
        ("int4s", "did you mean 'int4'"),
        ("int8_tensor", "did you mean 'int8-tensor'"),
        ("keeps", "did you mean 'keep'"),
        ("nothing like it", "there are 'int8-tensor', 'int8', .*'mxfp4', 'fp8', 'fp16', 'keep'"),
        ("", "there are 'int8-tensor'"),
    ],
)
def test_a_scheme_that_does_not_exist_is_refused_with_the_nearest_one(scheme, hint):
    for rule in (scheme, {"scheme": scheme}):
        with pytest.raises(SelectionError, match=rf"overrides\['head'\]: there is no scheme {scheme!r}.*{hint}"):
            LayerSelector(overrides={"head": rule})


@pytest.mark.parametrize(("field", "hint"), [("groupsize", "group_size"), ("bit", "bits"), ("sheme", "scheme")])
def test_a_field_that_does_not_exist_is_refused_with_the_nearest_one(field, hint):
    message = rf"overrides\['head'\]: there is no field '{field}' \(did you mean '{hint}'\?\)"
    with pytest.raises(SelectionError, match=message):
        LayerSelector(overrides={"head": {field: 4}})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        (None, "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        (8, "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        (["int8"], "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        (torch.float16, "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        (QuantSpec, "must be a scheme's name, 'keep', 'quantize', a spec, or fields"),
        ({"scheme": "keep", "bits": 4}, "takes no other settings"),
        ({"scheme": None}, "there is no scheme None"),
        ({"scheme": ["int8"]}, r"there is no scheme \['int8'\]"),
        ({4: "bits"}, "there is no field 4"),
    ],
    ids=str,
)
def test_a_malformed_override_is_refused_with_its_pattern(rule, message):
    with pytest.raises(SelectionError, match=rf"overrides\['head'\]: .*{message}"):
        LayerSelector(overrides={"head": rule})


@pytest.mark.parametrize(
    "rule", [{"bits": 9}, {"group_size": 0}, {"granularity": "row"}, {"scheme": "int8", "levels": [0.0, 1.0]},
             {"granularity": "channel"}, {"activations": "dynamic"}, {"scale_dtype": torch.int8}],
    ids=str,
)  # fmt: skip
def test_fields_that_do_not_fit_the_spec_are_refused(rule):
    with pytest.raises(SelectionError, match=r"overrides\['w'\].* does not fit int"):
        spec_of(rule)


@pytest.mark.parametrize("own", [OWN, CastSpec(torch.float16)], ids=str)
def test_fields_of_codes_cannot_be_changed_in_a_cast(own):
    with pytest.raises(SelectionError, match=r"overrides\['w'\].*bits.* cannot be changed in a cast to float16"):
        spec_of({"scheme": "fp16", "bits": 4} if own is OWN else {"bits": 4}, own)


@pytest.mark.parametrize("junk", [["head"], "head", 3, [("head", "int8")]])
@pytest.mark.parametrize("rule", ["overrides", "input_axes"])
def test_rules_that_are_not_a_mapping_are_refused(rule, junk):
    with pytest.raises(SelectionError, match=f"{rule} must be a mapping from name patterns to settings"):
        LayerSelector(**{rule: junk})


@pytest.mark.parametrize("rule", [{"overrides": {"layer": "int8"}}, {"overrides": {"layer": "keep"}},
                                  {"input_axes": {"layer": 0}}], ids=str)  # fmt: skip
def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names(rule):
    with pytest.raises(
        SelectionError, match=rf"{next(iter(rule))}: 'layer' matches nothing \(did you mean 'layers'\?\)"
    ):
        select(**rule)


@pytest.mark.parametrize("pattern", ["bias", "layers.1.mlp.bias", "re:.*bias"])
@pytest.mark.parametrize("rule", [{"include": []}, {"overrides": "int8"}, {"input_axes": 0}], ids=str)
def test_a_pattern_that_names_only_tensors_that_cannot_be_quantized_is_refused(rule, pattern):
    ((name, value),) = rule.items()
    with pytest.raises(
        SelectionError, match=r"names nothing that can be quantized: layers\.1\.mlp\.bias, a bias is never"
    ):
        select(**{name: [pattern] if value == [] else {pattern: value}})


@pytest.mark.parametrize("rules", [{"exclude": ["bias"]}, {"overrides": {"bias": "keep"}}], ids=str)
def test_tensors_that_cannot_be_quantized_may_be_kept_by_name(rules):
    assert not select(**rules)["layers.1.mlp.bias"].quantize


def test_an_override_quantizes_tensors_that_the_scheme_skips():
    decision = select(overrides={"embed": "int8"})["embed.weight"]
    assert (decision.quantize, decision.reason) == (True, "override 'embed'")


def test_keep_excludes_a_tensor():
    decision = select(overrides={"head": "keep"})["head.weight"]
    assert (decision.quantize, decision.reason, decision.named) == (False, "override 'head'", True)


def test_overrides_do_not_exclude_other_tensors():
    assert [name for name, decision in select(overrides={"head": "int8"}).items() if decision.reason == "selected"] == [
        "layers.0.mlp.weight",
        "layers.1.mlp.weight",
        "layers.1.mlp.bias",
    ]


# Input axes.


@pytest.mark.parametrize(("axes", "tuple_of_them"), [(0, (0,)), (-1, (-1,)), ([0, 1], (0, 1)), ((1,), (1,))])
def test_input_axes_are_one_axis_or_several(axes, tuple_of_them):
    decisions = select(input_axes={"head": axes})
    assert {name: d.input_axes for name, d in decisions.items() if d.input_axes} == {"head.weight": tuple_of_them}


def test_the_last_matching_input_axes_win_and_do_not_include_a_tensor():
    decisions = select(input_axes={"*": 0, "head": 1}, exclude=["head"])
    assert [d.input_axes for d in decisions.values()] == [(0,), (0,), (0,), (0,), (1,)]
    assert [d.quantize for d in decisions.values()] == [False, True, True, True, False]
    assert not decisions["layers.0.mlp.weight"].named


@pytest.mark.parametrize("junk", ["0", [], (), 1.0, None, True, [True], [0, "1"], {0}])
def test_axes_that_are_not_integers_are_refused(junk):
    with pytest.raises(SelectionError, match=r"input_axes\['head'\] must be an axis or a sequence of axes"):
        LayerSelector(input_axes={"head": junk})
