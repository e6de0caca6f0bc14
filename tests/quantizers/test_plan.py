"""`plan`: decisions become a ledger, and each storage has one fate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import CastSpec, QuantSpec
from fewbits.errors import SelectionError, SourceError
from fewbits.extend import Decision
from fewbits.quantizers.plan import plan
from support.lifecycle_helpers import entry

INT8 = QuantSpec(bits=8, granularity="channel")
KEEP, TAKE = Decision(False, "kept by default"), Decision(True, "selected")
MUST_KEEP, MUST_TAKE = Decision(False, "excluded", named=True), Decision(True, "included", named=True)


def planned(infos, decisions, spec=INT8):
    """The ledger of these tensors and of one that is always quantized."""
    infos, decisions = [*infos, entry("other")], [*decisions, TAKE]
    return plan(infos, decisions, lambda info, decision: (spec, decision.reason))


def tied(*names, **fields):
    return [entry(name, storage="shared", **fields) for name in names]


@pytest.mark.parametrize(
    ("decisions", "fate", "reason"),
    [
        ([TAKE, TAKE], "quantized", "selected"),
        ([TAKE, KEEP], "kept", "kept by default"),
        ([KEEP, TAKE], "kept", "kept by default"),
        ([KEEP, MUST_TAKE], "quantized", "included"),
        ([MUST_TAKE, KEEP], "quantized", "included"),
        ([TAKE, MUST_KEEP], "kept", "excluded"),
        ([MUST_TAKE, TAKE], "quantized", "included"),
        ([MUST_TAKE, MUST_TAKE], "quantized", "included"),
    ],
)
def test_keep_wins_for_tied_tensors_unless_a_rule_says_otherwise(decisions, fate, reason):
    ledger = planned(tied("a", "b"), decisions)
    assert (ledger["a"].fate, ledger["a"].reason) == (fate, reason)
    assert (ledger["b"].fate, ledger["b"].alias_of) == ("alias", "a")


@pytest.mark.parametrize("decisions", [[MUST_KEEP, MUST_TAKE], [MUST_TAKE, MUST_KEEP], [MUST_TAKE, KEEP, MUST_KEEP]])
def test_rules_that_contradict_each_other_on_one_storage_are_refused(decisions):
    with pytest.raises(SelectionError, match=r"one storage, two fates.*(included|excluded)"):
        planned(tied("a", "b", "c")[: len(decisions)], decisions)


@given(st.lists(st.sampled_from([KEEP, TAKE, MUST_TAKE]), min_size=1, max_size=4))
def test_the_first_name_holds_the_storage_and_the_others_are_aliases(decisions):
    names = [f"tensor{i}" for i in range(len(decisions))]
    head, *aliases = list(planned(tied(*names), decisions))[:-1]
    assert head.name == names[0]
    assert (head.fate == "quantized") == (MUST_TAKE in decisions or KEEP not in decisions)
    assert {row.alias_of for row in aliases} <= {names[0]}
    assert all(row.bytes_before == row.bytes_after == 0 for row in aliases)


def test_an_obstacle_beats_a_rule_that_names_the_tensor():
    row = planned([entry("a", obstacle="it cannot be")], [MUST_TAKE])["a"]
    assert (row.fate, row.reason) == ("kept", "it cannot be")


def test_an_obstacle_of_one_name_holds_for_all_names_of_the_storage():
    infos = [*tied("a"), *tied("b", obstacle="a buffer")]
    assert planned(infos, [TAKE, TAKE])["a"].reason == "a buffer"


def test_a_tensor_that_already_has_the_dtype_of_a_cast_is_kept():
    infos = [entry("half", dtype=torch.float16), entry("brain", dtype=torch.bfloat16)]
    ledger = planned(infos, [TAKE, TAKE], CastSpec(torch.float16))
    assert (ledger["half"].fate, ledger["half"].reason) == ("kept", "it is float16 already")
    assert (ledger["brain"].fate, ledger["brain"].bytes_after) == ("cast", 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bytes_after_count_codes_scales_and_shape(dtype):
    row = planned([entry("a", (4, 8), dtype=dtype)], [TAKE])["a"]
    assert row.bytes_before == 32 * dtype.itemsize
    assert row.bytes_after == 32 + 4 * dtype.itemsize + 2 * 8


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_decisions_is_refused(count):
    with pytest.raises(SelectionError, match=f"{count} decisions for 2 tensors"):
        plan([entry("a"), entry("b")], [TAKE] * count, lambda info, decision: (INT8, ""))


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(SourceError, match="same name"):
        planned([entry("a"), entry("a")], [TAKE, TAKE])


@pytest.mark.parametrize("infos", [[], [entry("bias", (4,), obstacle="1 dimension")]])
def test_nothing_to_quantize_is_refused_with_the_summary(infos):
    with pytest.raises(SelectionError, match=f"nothing is left to quantize(?s:.*){len(infos)} tensors"):
        plan(infos, [TAKE] * len(infos), lambda info, decision: (INT8, ""))
