"""`LayerSelector`: which rule wins, types, sizes, and rules that match nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits import LayerSelector
from fewbits.errors import SelectionError
from support.lifecycle_helpers import entry


class Projection(nn.Linear):
    pass


INFOS = [
    entry("embed.weight", owner=nn.Embedding, skip="an embedding"),
    entry("layers.0.weight", owner=nn.Linear),
    entry("layers.1.weight", owner=Projection),
    entry("layers.10.weight", owner=nn.Linear),
    entry("head.weight", owner=nn.Linear),
]
MODULES = [info.module for info in INFOS]
subsets = st.lists(st.sampled_from(MODULES), unique=True, max_size=3)


def select(infos=INFOS, **rules):
    """Return one decision per tensor, by default without a limit on the size."""
    return LayerSelector(**{"min_elements": 1} | rules).select(infos)


def chosen(**rules):
    decisions = select(**rules)
    return [info.module for info, decision in zip(INFOS, decisions, strict=True) if decision.quantize]


@given(subsets, subsets, subsets)
def test_exclude_beats_include_and_include_beats_the_scheme(include, exclude, not_convert):
    def is_chosen(info):
        if info.module in exclude + not_convert:
            return False
        return info.module in include if include else info.skip is None

    rules = {"include": include, "exclude": exclude, "modules_to_not_convert": not_convert}
    assert chosen(**rules) == [info.module for info in INFOS if is_chosen(info)]


@pytest.mark.parametrize(
    ("rules", "quantized"),
    [
        ({"include_types": [nn.Embedding]}, ["embed"]),
        ({"include_types": ["Embedding"]}, ["embed"]),
        ({"include_types": [Projection]}, ["layers.1"]),
        ({"include_types": ["Projection"], "include": ["head"]}, ["layers.1", "head"]),
        ({"exclude_types": ["Linear"], "include": ["embed"]}, ["embed"]),
        ({"include_types": [nn.Linear], "exclude_types": [Projection]}, ["layers.0", "layers.10", "head"]),
        ({"include_types": [nn.Module], "exclude": ["layers.*"]}, ["embed", "head"]),
        ({"include_types": ["Module"], "exclude": ["re:layers.*"]}, ["embed", "head"]),
        ({"exclude_types": [Projection, "Embedding"]}, ["layers.0", "layers.10", "head"]),
        ({"exclude": ["layers.1"]}, ["layers.0", "layers.10", "head"]),
    ],
)
def test_types_are_given_by_class_by_name_or_by_base_class(rules, quantized):
    assert chosen(**rules) == quantized


@pytest.mark.parametrize(
    ("rules", "module", "reason", "named"),
    [
        ({}, "head", "selected", False),
        ({}, "embed", "an embedding", False),
        ({"exclude": ["head"]}, "head", "excluded by 'head'", True),
        ({"modules_to_not_convert": ["head"]}, "head", "excluded by 'head'", True),
        ({"exclude_types": ["Linear"]}, "head", "excluded by type Linear", True),
        ({"include": ["embed"]}, "embed", "included by 'embed'", True),
        ({"include_types": [nn.Embedding]}, "embed", "included by type Embedding", True),
        ({"include": ["embed"]}, "head", "no include rule names it", False),
    ],
)
def test_the_reason_names_the_rule(rules, module, reason, named):
    decision = select(**rules)[MODULES.index(module)]
    assert (decision.reason, decision.named) == (reason, named)


@pytest.mark.parametrize("rule", ["include_types", "exclude_types"])
@pytest.mark.parametrize("single", ["Linear", nn.Linear])
def test_one_type_in_place_of_a_list_is_refused(rule, single):
    with pytest.raises(SelectionError, match=rf"{rule} must be a sequence .*\[Linear\]"):
        LayerSelector(**{rule: single})


@pytest.mark.parametrize("junk", [3, None, nn.Linear(1, 1), b"Linear"])
def test_a_value_that_is_not_a_type_is_refused(junk):
    with pytest.raises(SelectionError, match="include_types must be a sequence of classes or their names"):
        LayerSelector(include_types=[junk])


@pytest.mark.parametrize("rule", ["include_types", "exclude_types"])
@pytest.mark.parametrize("unused", [nn.Conv2d, "Conv2d"])
def test_a_type_without_tensors_is_refused_with_a_list_of_types(rule, unused):
    with pytest.raises(SelectionError, match=f"{rule}.*Conv2d.*Embedding, Linear, Projection"):
        LayerSelector(**{rule: [unused]}).select(INFOS)


def test_a_type_rule_for_tensors_without_classes_is_refused():
    with pytest.raises(SelectionError, match="has no classes"):
        LayerSelector(include_types=[nn.Linear]).select([entry("weight")])


@pytest.mark.parametrize("rule", ["include", "exclude", "modules_to_not_convert"])
def test_a_pattern_that_names_nothing_is_refused(rule):
    with pytest.raises(SelectionError, match=r"'layer' matches nothing.*layers"):
        LayerSelector(**{rule: ["head", "layer"]}).select(INFOS)


def test_one_selector_serves_many_models():
    selector = LayerSelector(exclude=["head"], min_elements=1)
    first = selector.select(INFOS)
    assert [decision.quantize for decision in first] == [False, True, True, True, False]
    assert selector.select([entry("head.weight", dtype=torch.float16)])[0].quantize is False
    assert selector.select(INFOS) == first


@pytest.mark.parametrize("rule", [{"exclude_types": ["Embedding"]}, {"exclude_types": [nn.Embedding]}])
def test_a_state_dict_knows_embeddings_by_name(rule):
    infos = [entry("wte.weight"), entry("head.weight")]
    assert [decision.quantize for decision in select(infos, **rule)] == [False, True]
    assert [decision.quantize for decision in select(infos, include_types=rule["exclude_types"])] == [True, False]


# Sizes.


@given(st.integers(0, 50), st.none() | st.integers(0, 50), st.integers(0, 9), st.integers(0, 9))
def test_min_elements_of_a_selector_overrides_that_of_the_scheme(scheme_s, selector_s, rows, columns):
    (decision,) = LayerSelector(min_elements=selector_s).select([entry("w", (rows, columns), min_elements=scheme_s)])
    least = scheme_s if selector_s is None else selector_s
    assert decision.quantize == (rows * columns >= least)
    assert decision.reason == ("selected" if decision.quantize else f"fewer than {least} elements")


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_exactly_the_tensors_with_fewer_elements_are_kept(min_elements, shapes):
    decisions = select([entry(f"w{i}", shape) for i, shape in enumerate(shapes)], min_elements=min_elements)
    assert [decision.quantize for decision in decisions] == [a * b >= min_elements for a, b in shapes]
    assert not any(decision.named for decision in decisions)


@pytest.mark.parametrize(
    "rules",
    [
        {"include": ["head"]},
        {"include": ["head.weight"]},
        {"include_types": [nn.Linear]},
        {"overrides": {"head": "int8"}},
        {"overrides": {"head": {"group_size": 8}}},
    ],
    ids=str,
)
def test_a_rule_that_names_a_small_tensor_overrides_min_elements(rules):
    decision = select(**rules, min_elements=10**9)[-1]
    assert (decision.quantize, decision.named) == (True, True)


@pytest.mark.parametrize("junk", [-1, 1.0, "512", True, [512]])
def test_a_malformed_min_elements_is_refused(junk):
    with pytest.raises(SelectionError, match="min_elements must be an integer from 0 up"):
        LayerSelector(min_elements=junk)


# The order of the rules: the first row that applies decides.

RANKS = {
    "exclude": ({"exclude": ["layer"]}, False, "excluded by 'layer'"),
    "modules_to_not_convert": ({"modules_to_not_convert": ["layer.weight"]}, False, "excluded by 'layer.weight'"),
    "exclude_types": ({"exclude_types": [nn.Linear]}, False, "excluded by type Linear"),
    "keep": ({"overrides": {"layer": "keep"}}, False, "override 'layer'"),
    "override": ({"overrides": {"layer.*": "int8-tensor"}}, True, "override 'layer.*'"),
    "include": ({"include": ["layer"]}, True, "included by 'layer'"),
    "include_types": ({"include_types": ["Linear"]}, True, "included by type Linear"),
    "include others": ({"include": ["other"]}, False, "no include rule names it"),
    "small": ({}, False, "fewer than 512 elements"),
    "skip": ({}, False, "the scheme keeps it"),
    "nothing": ({}, True, "selected"),
}
#: These two are rules of one mapping, in which the last match wins; another test covers that.
TOGETHER = {"keep", "override"}


def decided(holding):
    """Decide about a tensor to which these rows of the table apply."""
    rules = {}
    for row in holding:
        for rule, value in RANKS[row][0].items():
            rules[rule] = (
                rules[rule] | value
                if isinstance(value, dict) and rule in rules
                else ([*rules.get(rule, []), *value] if isinstance(value, list) else value)
            )
    shape = (16, 31) if "small" in holding else (64, 64)
    skip = "the scheme keeps it" if "skip" in holding else None
    layer = entry("layer.weight", shape, owner=nn.Linear, skip=skip, min_elements=512)
    infos = [layer, entry("other.weight", owner=nn.Conv1d)]
    return LayerSelector(**rules).select(infos)[0]


@pytest.mark.parametrize("first", RANKS)
@pytest.mark.parametrize("second", RANKS)
def test_the_first_of_two_rules_in_the_table_decides(first, second):
    ranked = sorted({first, second}, key=[*RANKS].index)
    if ranked == sorted(TOGETHER, key=[*RANKS].index):
        ranked = ["override"]
    decision = decided(ranked)
    assert (decision.quantize, decision.reason) == RANKS[ranked[0]][1:]


@given(st.sets(st.sampled_from([row for row in RANKS if row != "nothing"])))
def test_the_first_of_any_rules_in_the_table_decides(holding):
    ranked = sorted(holding - {"keep"} if holding >= TOGETHER else holding, key=[*RANKS].index)
    decision = decided(ranked)
    assert (decision.quantize, decision.reason) == RANKS[[*ranked, "nothing"][0]][1:]
    assert decision.named == ([*ranked, "nothing"][0] not in ("include others", "small", "skip", "nothing"))
    assert (decision.override is not None) == (bool(ranked) and ranked[0] == "override")
