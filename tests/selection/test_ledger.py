"""The ledger of any model: complete, with reasons, and exact to the byte."""

import json
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor, Ledger, LedgerRow
from support.lifecycle_helpers import (
    FEWER_EXAMPLES,
    TiedLM,
    distinct_bytes,
    mlp,
    named_tensors,
    quantize_small,
    random_models,
    read_header,
    small,
)

SCHEMES = st.sampled_from(
    [Int8PerTensor, Int8PerChannel, FP16Cast, partial(Int4Grouped, 2), partial(Int4Grouped, 3, symmetric=False)]
).map(small)


@given(random_models(), SCHEMES)
def test_every_parameter_and_buffer_has_one_row_with_a_fate_and_a_reason(model, quantizer):
    quantizer.prepare(model)
    described = {row.name: (row.shape, row.dtype) for row in quantizer.ledger}
    assert described == {name: (tuple(t.shape), t.dtype) for name, t in named_tensors(model).items()}
    assert len(quantizer.ledger) == len(described)
    for row in quantizer.ledger:
        assert row.fate in ("quantized", "cast", "kept", "alias")
        assert row.reason
        assert (row.spec is not None) == (row.fate in ("quantized", "cast")) == bool(row.scheme)
        assert (row.alias_of is not None) == (row.fate == "alias")


@given(random_models(), SCHEMES, st.booleans())
def test_bytes_before_are_those_of_the_distinct_storages(model, quantizer, inplace):
    held = distinct_bytes(named_tensors(model).values())
    quantizer.prepare(model, inplace=inplace)
    assert quantizer.ledger.bytes_before == held


@FEWER_EXAMPLES
@given(random_models(), SCHEMES, st.booleans())
def test_bytes_after_are_those_of_the_result_and_of_the_file(model, quantizer, inplace):
    quantizer.prepare(model, inplace=inplace)
    # The layouts that kernels read are padded to whole bytes and tiles.
    held = distinct_bytes(named_tensors(quantizer.convert(compute="exact")).values())
    shapes = sum(8 * len(row.shape) for row in quantizer.ledger if row.fate == "quantized")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        quantizer.save(path)
        entries, _, payload = read_header(path)
    assert quantizer.ledger.bytes_after == payload == held + shapes
    assert payload == sum(stop - start for start, stop in (entry["data_offsets"] for entry in entries.values()))


@given(random_models(), SCHEMES)
def test_an_alias_refers_to_a_stored_row_that_shares_its_storage(model, quantizer):
    quantizer.prepare(model)
    tensors = named_tensors(model)
    for row in quantizer.ledger:
        if row.fate == "alias":
            assert quantizer.ledger[row.alias_of].fate != "alias"
            assert (row.bytes_before, row.bytes_after) == (0, 0)
            assert tensors[row.name].data_ptr() == tensors[row.alias_of].data_ptr()


@given(random_models(), SCHEMES)
def test_rows_survive_json(model, quantizer):
    quantizer.prepare(model)
    document = json.loads(quantizer.ledger.to_json())
    assert Ledger(map(LedgerRow.from_dict, document["rows"])) == quantizer.ledger
    assert document["bytes_after"] == sum(row["bytes_after"] for row in document["rows"])
    assert json.loads(quantizer.ledger.to_json(indent=None)) == document


@given(random_models(), SCHEMES)
def test_the_table_prints_every_row_with_its_reason(model, quantizer):
    quantizer.prepare(model)
    _, rule, *lines, total = str(quantizer.ledger).splitlines()
    assert set(rule) == {"-", " "}
    for row, line in zip(quantizer.ledger, lines, strict=True):
        assert line.startswith(row.name)
        assert line.endswith(row.reason)
    assert f"{len(quantizer.ledger)} tensors" in total


@given(random_models(), SCHEMES)
def test_the_summary_counts_every_tensor(model, quantizer):
    quantizer.prepare(model)
    counts = [quantizer.ledger.count(fate) for fate in ("quantized", "cast", "kept", "alias")]
    assert sum(counts) == len(quantizer.ledger)
    summary = quantizer.ledger.summary()
    assert all(
        f"{count} {fate}" in summary
        for count, fate in zip(counts, ("quantized", "cast", "kept", "alias"), strict=True)
        if count
    )


reasons = st.text("abc ,;é", max_size=200) | st.lists(st.text("abc_", min_size=1, max_size=40), max_size=9).map(
    ".".join
)
sizes = st.integers(0, 10**13)
part = st.text("abc_0123456789", min_size=1, max_size=20)
dotted = st.lists(part, min_size=1, max_size=9).map(".".join)


@st.composite
def any_row(draw):
    spec = draw(
        st.none()
        | st.sampled_from([fewbits.QuantSpec(8, "channel", activations="dynamic"), fewbits.CastSpec(torch.float16)])
    )
    fate = {type(None): "kept", fewbits.QuantSpec: "quantized", fewbits.CastSpec: "cast"}[type(spec)]
    shape = tuple(draw(st.lists(st.integers(1, 10**5), min_size=2, max_size=2)))
    layout = fewbits.extend.Layout.of(shape) if fate == "quantized" else None
    return LedgerRow(draw(dotted), shape, torch.bfloat16, fate, draw(reasons), draw(sizes), draw(sizes), spec, layout)


ledgers = st.lists(any_row(), max_size=8, unique_by=lambda row: row.name).map(Ledger)


@given(ledgers, st.integers(80, 200))
def test_no_line_of_a_summary_is_longer_than_the_width(ledger, width):
    assert all(len(line) <= width for line in ledger.summary(width).splitlines())
    assert f"{ledger.bytes_before:,} -> {ledger.bytes_after:,} bytes" in ledger.summary(width)


@given(ledgers)
def test_a_table_fits_a_terminal_and_otherwise_has_whole_names(ledger):
    lines = ledger.table(80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) == len(ledger) + 2
    assert ledger.table(10**6) == ledger.table()
    assert all(line.startswith(row.name) for row, line in zip(ledger, ledger.table().splitlines()[2:], strict=False))


def with_embeddings(share):
    """Make a model of an embedding, with this share of the elements, and a linear layer."""
    rows = round(1000 * share)
    return nn.ModuleDict({"embed": nn.Embedding(rows, 64), "linear": nn.Linear(64, 1000 - rows, bias=False)})


@pytest.mark.parametrize("source", [dict, nn.Module], ids=["file", "model"])
@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.02, False)])
def test_a_summary_reports_kept_embeddings_that_take_much_of_the_result(share, told, source):
    model = with_embeddings(share)
    given = (
        model
        if source is nn.Module
        else {"embed_tokens.weight": model.embed.weight.data} | {"linear.weight": model.linear.weight.data}
    )
    ledger = quantize_small(given, "int4").ledger
    assert ("are embeddings" in ledger.summary()) is told
    assert ("--embeddings int8" in ledger.summary()) is told
    assert "are embeddings" not in quantize_small(given, "int8").ledger.summary()
    assert "are embeddings" not in quantize_small(given, "int4", skip_types=()).ledger.summary()
    if told:
        share_of_result = (
            ledger["embed.weight" if given is model else "embed_tokens.weight"].bytes_after / ledger.bytes_after
        )
        assert f"{100 * share_of_result:.0f} % of these bytes are embeddings" in ledger.summary()


def test_a_result_that_is_larger_is_not_called_smaller():
    ledger = quantize_small({"w": torch.rand(64, 2, dtype=torch.float16)}, "int8").ledger
    assert ledger.bytes_after > ledger.bytes_before
    assert "larger)" in ledger.summary()
    assert "smaller)" not in ledger.summary()


def test_a_scheme_fits_in_one_readable_table():
    quantizer = small(Int4Grouped, 16)
    quantizer.prepare(TiedLM())
    rows = {row.name: (row.fate, row.reason) for row in quantizer.ledger}
    assert rows == {
        "embed_tokens.weight": ("kept", "Embedding is kept by int4 unless asked for"),
        "norm.weight": ("kept", "1 dimension; two are needed"),
        "norm.bias": ("kept", "a bias is never quantized"),
        "gate_proj.weight": ("quantized", "selected"),
        "gate_proj.bias": ("kept", "a bias is never quantized"),
        "lm_head.weight": ("alias", "shares its storage with embed_tokens.weight"),
        "position_ids": ("kept", "a buffer"),
        "inv_freq": ("kept", "a buffer"),
    }


@pytest.mark.parametrize("inplace", [False, True])
def test_buffers_over_one_storage_are_one_tensor(inplace):
    model = mlp()
    model.register_buffer("table", torch.ones(10))
    model.register_buffer("again", model.table.view(10))
    quantizer = small()
    quantizer.prepare(model, inplace=inplace)
    assert quantizer.ledger["again"].alias_of == "table"
    assert quantizer.ledger.bytes_before == distinct_bytes(named_tensors(model).values())


def test_buffers_outside_the_state_dict_are_marked():
    quantizer = small()
    quantizer.prepare(TiedLM())
    assert [row.name for row in quantizer.ledger if not row.persistent] == ["inv_freq"]


def test_a_row_that_does_not_exist_is_a_named_error():
    ledger = quantize_small(nn.Linear(4, 4), "int8", validate=False).ledger
    with pytest.raises(fewbits.errors.ArgumentError, match=r"no tensor named 'wieght'"):
        ledger["wieght"]


@pytest.mark.parametrize("shape", [(4, 0), (0, 5), (0,)])
def test_a_tensor_without_elements_is_never_quantized(shape):
    """Also if a file says otherwise: chunks are cut by columns, and the tensor would have none."""
    spec, layout = fewbits.QuantSpec(8, "channel"), fewbits.extend.Layout.of(shape)
    with pytest.raises(fewbits.errors.ArgumentError, match="has no elements, and is never quantized"):
        LedgerRow("a", shape, torch.float32, "quantized", "why", 0, 0, spec, layout)


def test_an_empty_ledger_prints_and_turns_into_json():
    ledger = Ledger(())
    assert "0 tensors" in str(ledger)
    assert "0 tensors" in ledger.summary()
    assert json.loads(ledger.to_json())["rows"] == []


def test_a_summary_counts_overrides_with_one_outcome_and_names_a_single_one():
    rules = {f"{i}.weight": {"scheme": "int4", "group_size": 32} for i in range(3)} | {"3.weight": "keep"}
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    ledger = fewbits.plan(model, "int8", overrides=rules).ledger
    text = " ".join(ledger.summary(200).split())
    assert "3 49,152" in text
    assert "quantized to int4 group 32: 3 overrides" in text
    assert "kept: override '3.weight'" in text
    assert ledger["0.weight"].reason == "override '0.weight'"


def test_overrides_whose_reasons_differ_are_counted_apart():
    source = {"a": torch.ones(8, 128), "b": torch.ones(8, 128)}
    ledger = fewbits.plan(source, "int8", overrides={"a": "int4", "b": "int4"}).ledger
    told = ledger.with_remarks({"b": "seen"}).summary(200)
    assert "int4 group 128: override 'a'" in told
    assert "int4 group 128: override 'b'; seen" in told


def test_a_summary_of_overrides_says_how_codes_were_chosen():
    rules = {f"{i}.weight": "int4" for i in range(2)}
    model = nn.Sequential(*(nn.Linear(128, 64) for _ in range(2)))
    ledger = fewbits.plan(model, "int8", overrides=rules, rounding="scale-search").ledger
    assert "2 overrides; codes by ScaleSearch(" in " ".join(ledger.summary(200).split())
