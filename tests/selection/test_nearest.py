"""Suggestions for misspelled names: given if a known name is near, and otherwise not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.errors import ArgumentError, SelectionError
from fewbits.observers import OBSERVERS
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.nearest import did_you_mean, nearest
from support.lifecycle_helpers import mlp

NAMES = [*SCHEMES, *OBSERVERS]


@pytest.mark.parametrize(
    ("word", "meant"),
    [("in8", "int8"), ("Int4", "int4"), ("int8_tensor", "int8-tensor"), ("percentil", "percentile"), ("MSE", "mse")],
)
def test_the_intended_name_is_suggested(word, meant):
    assert did_you_mean(word, NAMES) == f" (did you mean {meant!r}?)"


@pytest.mark.parametrize("word", ["int1", "int9", "int16", "int3-tensor", "fp5", "fp32", "nf7", "gptq", "", None, 8])
def test_no_scheme_is_suggested_if_none_is_near(word):
    assert did_you_mean(word, SCHEMES) == ""


@given(st.sampled_from(NAMES), st.data())
def test_one_letter_too_few_is_still_near(name, data):
    letters = [i for i, character in enumerate(name) if not character.isdigit()]
    at = data.draw(st.sampled_from(letters))
    assert nearest(name[:at] + name[at + 1 :], [name]) == [name]


@given(st.sampled_from(sorted(SCHEMES)), st.integers(0, 999))
def test_a_scheme_with_other_bits_is_never_suggested(name, bits):
    word = re.sub(r"\d+", str(bits), name)
    assert all(set(re.findall(r"\d", word)) == set(re.findall(r"\d", advised)) for advised in nearest(word, SCHEMES))


@pytest.mark.parametrize("refused", [lambda: fewbits.quantize(mlp(), "int9"), lambda: fewbits.plan(mlp(), "int9")])
def test_int9_is_refused_with_a_list_of_schemes_and_no_suggestion(refused):
    with pytest.raises(ArgumentError) as caught:
        refused()
    assert str(caught.value) == f"there is no scheme 'int9'; there are {', '.join(map(repr, SCHEMES))}"


def test_an_override_of_int9_is_refused_without_a_suggestion():
    with pytest.raises(SelectionError, match=r"no scheme 'int9'; there are 'int8-tensor', 'int8', 'int2'"):
        fewbits.quantize(mlp(), "int8", overrides={"0": "int9"})


def test_a_layer_with_another_number_is_not_suggested():
    with pytest.raises(SelectionError, match=r"exclude: '12' matches nothing$"):
        fewbits.quantize(mlp(), "int8", exclude=["12"])
