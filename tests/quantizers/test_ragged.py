"""Rows that groups do not divide: four policies, for every scheme with groups."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import Int4Grouped, Int8PerChannel, Int8PerTensor, QuantSpec, State
from fewbits.errors import ArgumentError, SelectionError
from support.lifecycle_helpers import quantize_small, small

TERNARY = (-1.0, 0.0, 1.0, 2.0)
POLICIES = ["auto", "shorter", "fallback", "error"]


class Grouped(fewbits.Quantizer):
    """Groups of any size, with any codes."""

    def __init__(self, group_size, bits=3, levels=None, **strategies):
        self.spec = QuantSpec(bits=bits, granularity="group", group_size=group_size, levels=levels)
        super().__init__(**strategies)


SCHEMES = {
    "int4": Int4Grouped,
    "asymmetric": partial(Int4Grouped, symmetric=False),
    "own": Grouped,
    "levels": partial(Grouped, bits=2, levels=TERNARY),
}
schemes = st.sampled_from(sorted(SCHEMES)).map(SCHEMES.get)


def weight(columns, rows=3):
    return torch.linspace(-1, 1, rows * columns).reshape(rows, columns)


def prepared(source, scheme, *args, **options):
    quantizer = small(scheme, *args, **options)
    quantizer.prepare(source)
    return quantizer.ledger


def expected(ragged, columns, size):
    """Whether the groups stay, and the reason; None for an error."""
    if ragged == "auto" and columns < size:
        return False, f"rows of {columns} are shorter than one group of {size}"
    if ragged == "fallback" and columns % size:
        return False, f"groups of {size} do not divide rows of {columns}"
    return None if ragged == "error" and columns % size else (True, "selected")


@given(st.sampled_from(POLICIES), schemes, st.integers(1, 40), st.integers(1, 40))
def test_every_policy_on_rows_of_any_length(ragged, scheme, columns, size):
    fate = expected(ragged, columns, size)
    if fate is None:
        with pytest.raises(SelectionError, match=rf"w, shape \(3, {columns}\), rows of {columns} in groups of {size}"):
            prepared({"w": weight(columns)}, scheme, size, ragged=ragged)
        return
    row = prepared({"w": weight(columns)}, scheme, size, ragged=ragged)["w"]
    own = small(scheme, size).spec
    fallback = QuantSpec(bits=8, granularity="channel")
    assert row.spec == (own if fate[0] else fallback).for_dtype(torch.float32)
    assert row.reason == fate[1]


@pytest.mark.parametrize(
    ("columns", "kind"), [(12, "shorter"), (16, "equal"), (48, "a multiple"), (40, "ragged"), (17, "one more")]
)
@pytest.mark.parametrize("ragged", POLICIES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_policy_stays_within_the_error_bound(scheme, ragged, columns, kind, tmp_path):
    if ragged == "error" and kind in ("shorter", "ragged", "one more"):
        with pytest.raises(SelectionError, match="groups do not divide the rows of 1 tensors"):
            prepared({"w": weight(columns)}, scheme, 16, ragged=ragged)
        return
    result = quantize_small({"w": weight(columns)}, small(scheme, 16, ragged=ragged), fail_under=0)
    assert result.report.ok
    groups = expected(ragged, columns, 16)[0]
    assert result.model["w"].scale.shape == (3, -(-columns // 16) if groups else 1)
    result.save(tmp_path / "f")
    assert fewbits.load(tmp_path / "f")["w"].equal(result.model["w"])


@given(st.sampled_from(["auto", "shorter"]), st.integers(1, 24), st.integers(1, 60))
def test_a_shorter_last_group_has_the_scale_of_its_own_elements(ragged, size, columns):
    result = quantize_small({"w": weight(columns)}, small(Int4Grouped, size, ragged=ragged), validate=False).model["w"]
    if ragged == "auto" and columns < size:
        assert result.spec.bits == 8
        return
    last = weight(columns)[:, size * ((columns - 1) // size) :]
    assert torch.allclose(result.scale[:, -1], (last.abs().amax(1) / 7).clamp(min=torch.finfo().tiny))


def test_auto_is_the_default():
    row = prepared({"w": weight(100)}, Int4Grouped)["w"]
    assert (row.reason, str(row.spec)) == ("rows of 100 are shorter than one group of 128", "int8 channel")


@pytest.mark.parametrize("as_module", [True, False])
def test_an_error_names_every_tensor_with_its_shape_and_what_to_do(as_module):
    model = nn.ModuleDict({"a": nn.Linear(20, 4), "fits": nn.Linear(32, 4), "b": nn.Conv1d(5, 6, 3)})
    quantizer = small(Int4Grouped, 16, ragged="error")
    with pytest.raises(SelectionError) as caught:
        quantizer.prepare(model if as_module else model.state_dict())
    message = str(caught.value)
    assert "groups do not divide the rows of 2 tensors" in message
    assert "a.weight, shape (4, 20), rows of 20 in groups of 16" in message
    assert "b.weight, shape (6, 5, 3), rows of 15 in groups of 16" in message
    assert "fits" not in message
    assert all(way_out in message for way_out in ("group_size", "exclude", "'auto', 'shorter' or 'fallback'"))
    assert quantizer.state is State.CREATED


@pytest.mark.parametrize(
    "rules",
    [
        {"exclude": ["a"]},
        {"overrides": {"a": "keep"}},
        {"overrides": {"a": {"group_size": 5}}},
        {"overrides": {"a": "int8"}},
        {"overrides": {"a": "fp16"}},
        {"input_axes": {"a": 0}},
    ],
    ids=str,
)
def test_an_error_counts_only_tensors_whose_rows_the_groups_do_not_divide(rules):
    ledger = prepared({"a": weight(20, 16), "b": weight(32)}, Int4Grouped, 16, ragged="error", **rules)
    assert str(ledger["b"].spec) == "int4 group 16"


@pytest.mark.parametrize("ragged", POLICIES)
@pytest.mark.parametrize("scheme", [Int8PerTensor, Int8PerChannel, fewbits.FP16Cast])
def test_schemes_without_groups_take_any_rows(scheme, ragged):
    row = prepared({"w": weight(17)}, scheme, ragged=ragged)["w"]
    assert (row.fate != "kept", row.reason) == (True, "selected")


@given(st.sampled_from(POLICIES), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_the_policy_applies_to_the_group_size_of_an_override(ragged, columns, size, named_scheme):
    rule = {"group_size": size} | ({"scheme": "int4"} if named_scheme else {})
    fate = expected(ragged, columns, size)
    if fate is None:
        with pytest.raises(SelectionError, match=rf"rows of {columns} in groups of {size}"):
            prepared({"w": weight(columns)}, Int4Grouped, 7, ragged=ragged, overrides={"w": rule})
        return
    row = prepared({"w": weight(columns)}, Int4Grouped, 7, ragged=ragged, overrides={"w": rule})["w"]
    assert (row.spec.group_size, row.spec.bits) == ((size, 4) if fate[0] else (None, 8))
    assert row.reason == ("override 'w'" if fate[0] else fate[1])


def test_the_policy_applies_to_the_group_size_that_a_scheme_chooses():
    class Chooses(Grouped):
        def spec_for(self, info):
            return QuantSpec(bits=5, granularity="group", group_size=10)

    rows = {c: prepared({"w": weight(c)}, Chooses, 7, ragged="fallback")["w"] for c in (20, 21)}
    assert rows[20].reason == "Chooses chose int5 group 10 for it"
    assert (rows[21].reason, rows[21].spec.bits) == ("groups of 10 do not divide rows of 21", 8)


@pytest.mark.parametrize(("ragged", "columns"), [("auto", 9), ("fallback", 11)])
def test_the_fallback_keeps_the_scale_dtype(ragged, columns):
    row = prepared({"w": weight(columns)}, Int4Grouped, 10, ragged=ragged, scale_dtype=torch.float16)["w"]
    assert row.spec == QuantSpec(bits=8, granularity="channel", scale_dtype=torch.float16)


@pytest.mark.parametrize("junk", ["longer", None, "", True, "AUTO", ["auto"]])
def test_an_unknown_policy_is_refused_with_the_known_ones(junk):
    with pytest.raises(ArgumentError, match="ragged must be 'auto', 'shorter', 'fallback' or 'error', not "):
        Int4Grouped(ragged=junk)


@pytest.mark.parametrize("ragged", ["shorter", "fallback"])
def test_a_policy_is_a_setting(ragged):
    result = fewbits.quantize({"w": weight(20)}, "int4", group_size=16, min_elements=1, ragged=ragged, fail_under=0)
    assert str(result.ledger["w"].spec) == {"shorter": "int4 group 16", "fallback": "int8 channel"}[ragged]
