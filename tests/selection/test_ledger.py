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
from lifecycle_helpers import (
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
    # The forms that kernels read are filled up to whole rows of bytes and tiles.
    held = distinct_bytes(named_tensors(quantizer.convert(compute="exact")).values())
    shapes = sum(8 * len(row.shape) for row in quantizer.ledger if row.fate == "quantized")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        quantizer.save(path)
        entries, _, payload = read_header(path)
    assert quantizer.ledger.bytes_after == payload == held + shapes
    assert payload == sum(stop - start for start, stop in (entry["data_offsets"] for entry in entries.values()))


@given(random_models(), SCHEMES)
def test_an_alias_points_to_a_row_that_is_none_and_shares_its_storage(model, quantizer):
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
    total = quantizer.ledger.summary().splitlines()[-1]
    assert all(
        f"{count} {fate}" in total
        for count, fate in zip(counts, ("quantized", "cast", "kept", "alias"), strict=True)
        if count
    )


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
    with pytest.raises(fewbits.ArgumentError, match=r"no tensor named 'wieght'"):
        ledger["wieght"]


@pytest.mark.parametrize("shape", [(4, 0), (0, 5), (0,)])
def test_a_tensor_without_elements_is_never_quantized(shape):
    """Whatever a file says: chunks are cut by columns, and there would be none."""
    spec, layout = fewbits.QuantSpec(8, "channel"), fewbits.Layout.of(shape)
    with pytest.raises(fewbits.ArgumentError, match="has no elements, and is never quantized"):
        LedgerRow("a", shape, torch.float32, "quantized", "why", 0, 0, spec, layout)


def test_an_empty_ledger_prints_and_turns_into_json():
    ledger = Ledger(())
    assert "0 tensors" in str(ledger)
    assert "0 tensors" in ledger.summary()
    assert json.loads(ledger.to_json())["rows"] == []
