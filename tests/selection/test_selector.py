"""`LayerSelector`: which rule wins, types, and rules that fit nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits import LayerSelector, SelectionError
from lifecycle_helpers import entry


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


def chosen(**rules):
    decisions = LayerSelector(**rules).select(INFOS)
    return [info.module for info, decision in zip(INFOS, decisions, strict=True) if decision.quantize]


@given(subsets, subsets, subsets)
def test_exclude_beats_include_and_include_beats_what_the_scheme_skips(include, exclude, not_convert):
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
    decision = LayerSelector(**rules).select(INFOS)[MODULES.index(module)]
    assert (decision.reason, decision.named) == (reason, named)


@pytest.mark.parametrize("rule", ["include_types", "exclude_types"])
@pytest.mark.parametrize("single", ["Linear", nn.Linear])
def test_one_type_in_place_of_a_list_is_refused(rule, single):
    with pytest.raises(SelectionError, match=rf"{rule} is a sequence .*\[Linear\]"):
        LayerSelector(**{rule: single})


@pytest.mark.parametrize("junk", [3, None, nn.Linear(1, 1), b"Linear"])
def test_something_that_is_no_type_is_refused(junk):
    with pytest.raises(SelectionError, match="include_types holds classes or their names"):
        LayerSelector(include_types=[junk])


@pytest.mark.parametrize("rule", ["include_types", "exclude_types"])
@pytest.mark.parametrize("unused", [nn.Conv2d, "Conv2d"])
def test_a_type_that_owns_nothing_is_refused_with_the_types_there_are(rule, unused):
    with pytest.raises(SelectionError, match=f"{rule}.*Conv2d.*Embedding, Linear, Projection"):
        LayerSelector(**{rule: [unused]}).select(INFOS)


def test_a_type_rule_on_tensors_without_classes_says_so():
    with pytest.raises(SelectionError, match="knows no classes"):
        LayerSelector(include_types=[nn.Linear]).select([entry("weight")])


@pytest.mark.parametrize("rule", ["include", "exclude", "modules_to_not_convert"])
def test_a_pattern_that_names_nothing_is_refused(rule):
    with pytest.raises(SelectionError, match=r"'layer' matches nothing.*layers"):
        LayerSelector(**{rule: ["head", "layer"]}).select(INFOS)


def test_one_selector_serves_many_models():
    selector = LayerSelector(exclude=["head"])
    first = selector.select(INFOS)
    assert selector.select([entry("head.weight", dtype=torch.float16)])[0].quantize is False
    assert selector.select(INFOS) == first
