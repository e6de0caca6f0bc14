"""Name patterns, compared with a matcher that uses no regular expressions."""

import re
from contextlib import nullcontext

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fewbits import LayerSelector
from fewbits.errors import SelectionError
from fewbits.selection.patterns import Pattern, Patterns, check_all_used

# Few letters, so that matches are frequent, and characters that are operators in regular expressions.
COMPONENT = st.text("ab1[]^$+(|\\\n", min_size=1, max_size=3)
NAMES = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)
PATTERNS = st.lists(st.text("ab1[]^$+(|\\\n*?", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)


def component_matches(pattern, text):
    if not pattern:
        return not text
    if pattern[0] == "*":
        return component_matches(pattern[1:], text) or (bool(text) and component_matches(pattern, text[1:]))
    return bool(text) and pattern[0] in ("?", text[0]) and component_matches(pattern[1:], text[1:])


def expected(pattern, name):
    wanted, parts = pattern.split("."), name.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return any(all(map(component_matches, wanted, run)) for run in runs)


@given(PATTERNS, NAMES)
@example("a.b", "a.b.a.b")
@example("*", "a")
@example("a*b", "a.b")
@example("[ab]", "a")
def test_a_pattern_matches_a_run_of_whole_components(pattern, name):
    assert Pattern(pattern).matches(name) == expected(pattern, name)


@given(st.lists(PATTERNS | NAMES | NAMES.map(lambda name: "re:" + re.escape(name)), max_size=6), NAMES)
def test_patterns_are_found_as_if_each_were_tried(texts, name):
    patterns = [Pattern(text) for text in texts]
    found = Patterns(patterns)
    assert list(found) == patterns
    assert found.matching(name) == [pattern for pattern in patterns if pattern.matches(name)]


@given(NAMES, st.data())
def test_every_run_of_components_of_a_name_matches_it(name, data):
    parts = name.split(".")
    start = data.draw(st.integers(0, len(parts) - 1))
    stop = data.draw(st.integers(start + 1, len(parts)))
    assert Pattern(".".join(parts[start:stop])).matches(name)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("layers.1", "model.layers.1.mlp.weight", True),
        ("layers.1", "model.layers.10.mlp.weight", False),
        ("layers.1", "layers.1", True),
        ("gate", "mlp.gate.weight", True),
        ("gate", "mlp.gate_proj.weight", False),
        ("proj", "mlp.gate_proj.weight", False),
        ("weight", "mlp.gate.weight", True),
        ("layers.*.mlp", "layers.7.mlp.weight", True),
        ("layers.*.mlp", "layers.7.attention.mlp.weight", False),
        ("layers.?", "layers.10.weight", False),
        ("*_proj", "mlp.gate_proj.weight", True),
        ("a", "A.weight", False),
        ("a[0-9]", "a1.weight", False),
        ("a[0-9]", "a[0-9].weight", True),
    ],
)
def test_examples(pattern, name, matches):
    assert Pattern(pattern).matches(name) is matches


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("re:mlp.gate", "mlp.gate.weight", True),
        (r"re:mlp\.gate\.weight", "mlp.gate.weight", True),
        ("re:gate", "mlp.gate.weight", False),
        ("re:mlp", "mlp.gate.weight", False),
        (r"re:.*\.gate", "mlp.gate_proj.weight", False),
        ("re:a|b", "b.weight", True),
        ("re:weight", "weight", True),
        (r"re:layers\.[01]", "layers.1.weight", True),
        (r"re:layers\.[01]", "layers.10.weight", False),
    ],
)
def test_a_regular_expression_matches_the_whole_module_path_or_tensor_name(pattern, name, matches):
    assert Pattern(pattern).matches(name) is matches


@given(NAMES, NAMES)
def test_an_escaped_name_as_regular_expression_matches_itself_and_its_tensors(text, name):
    assert Pattern("re:" + re.escape(text)).matches(name) == (text in (name, name.rpartition(".")[0]))


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", "re:(", "re:[", "re:*", 3, None, b"a", ["a"], int])
def test_a_malformed_pattern_is_refused_by_its_name(text):
    with pytest.raises(SelectionError, match=re.escape(repr(text))):
        Pattern(text)


NAMES_OF_A_MODEL = ["model.layers.0.gate_proj.weight", "model.layers.10.up_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("unused", "suggested"),
    [
        ("gate", "gate_proj"),
        ("lm_haed", "lm_head"),
        ("layer.0", "layers.0"),
        ("layers.1", "layers.10"),
        ("re:lm_hea", "lm_head"),
    ],
)
def test_an_unused_pattern_is_refused_with_the_nearest_names(unused, suggested):
    with pytest.raises(SelectionError) as caught:
        check_all_used([Pattern("lm_head"), Pattern(unused)], NAMES_OF_A_MODEL, "exclude")
    assert re.search(rf"exclude: '{re.escape(unused)}' matches nothing .*'{re.escape(suggested)}'", str(caught.value))
    assert "'lm_head' matches" not in str(caught.value)


def test_all_unused_patterns_are_named_at_once():
    with pytest.raises(SelectionError, match=r"'zzz' matches nothing; 'qqq' matches nothing"):
        check_all_used([Pattern("zzz"), Pattern("qqq")], NAMES_OF_A_MODEL, "include")


def test_a_pattern_with_more_components_than_any_name_is_refused_too():
    with pytest.raises(SelectionError, match=r"a\.b\.c\.d\.e\.f\.g"):
        check_all_used([Pattern("a.b.c.d.e.f.g")], NAMES_OF_A_MODEL, "include")


@given(st.lists(PATTERNS, max_size=3), st.lists(NAMES, min_size=1, max_size=4))
def test_patterns_are_refused_exactly_if_one_names_nothing(patterns, names):
    unused = [p for p in patterns if not any(expected(p, name) for name in names)]
    with pytest.raises(SelectionError) if unused else nullcontext() as caught:
        check_all_used([Pattern(p) for p in patterns], names, "include")
    assert all(repr(p) in str(caught.value) for p in unused)


@pytest.mark.parametrize("rule", ["include", "exclude", "modules_to_not_convert"])
def test_one_string_in_place_of_a_list_is_refused_with_the_list_to_write(rule):
    with pytest.raises(SelectionError, match=rf"{rule} must be a sequence .*\['lm_head'\]"):
        LayerSelector(**{rule: "lm_head"})
