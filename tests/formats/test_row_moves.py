"""Rows of quantized weights move into another weight, with codes and scales unchanged."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewbits.formats.row_moves import RowMoves, collapsed, common_spec, is_movable, numbered, row_numbers
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.quantize import min_max, quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.row import LedgerRow
from support.strategies import layouts, seeds, shapes, specs


def weight(rows: int, columns: int, spec: QuantSpec, seed: int):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize(WeightMatrix(values, Layout.of((rows, columns))), spec, min_max)


@st.composite
def moves(draw):
    """Weights of one scheme, and rows of them in any order, some left out, some repeated."""
    spec = draw(specs(activations=None)).for_dtype(torch.float32)
    columns, sizes = draw(st.integers(1, 80)), draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    values = [weight(rows, columns, spec, draw(seeds)) for rows in sizes]
    index = draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=100))
    return values, torch.tensor(index)


@given(moves())
def test_moved_rows_decode_to_the_same_numbers(drawn):
    values, index = drawn
    row = [LedgerRow(f"{n}", v.shape, v.dtype, "quantized", "", 0, 0, v.spec, v.layout) for n, v in enumerate(values)]
    layout = Layout.of((len(index), values[0].layout.columns))
    moved = RowMoves(common_spec(row), layout, index).apply(values)
    assert torch.equal(moved.codes(), torch.cat([value.codes() for value in values])[index])
    assert torch.equal(moved.dequantize(), torch.cat([value.dequantize() for value in values])[index])


@given(
    shapes(min_dims=2, max_dims=4).flatmap(lambda shape: st.tuples(st.just(shape), layouts(shape))), st.integers(0, 99)
)
def test_numbered_rows_are_read_back_in_order(drawn, start):
    _, layout = drawn
    assume(is_movable(layout))
    found = row_numbers(numbered(layout, start), layout)
    assert torch.equal(found, torch.arange(start, start + layout.rows))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.flip(1), lambda x: x.reshape(2, -1), lambda x: torch.cat([x[:1, :2], x[1:2, 2:]], 1), lambda x: x + 1],
    ids=["order of columns", "shape", "rows in parts", "other numbers"],
)
def test_a_change_within_rows_is_noticed(change):
    layout = Layout.of((8, 64))
    assert row_numbers(change(numbered(layout, 0)), layout) is None
    assert collapsed(layout).shape == (8, 4)


def test_weights_of_different_schemes_have_no_common_spec():
    def row(spec: QuantSpec, dtype: torch.dtype = torch.float32) -> LedgerRow:
        return LedgerRow("weight", (8, 64), dtype, "quantized", "", 0, 0, spec, Layout.of((8, 64)))

    channel, free = QuantSpec(8, "channel"), QuantSpec(8, "channel", rounding="free")
    assert common_spec([row(channel), row(free)]) == free.for_dtype(torch.float32)
    assert common_spec([row(channel), row(QuantSpec(4, "channel"))]) is None
    assert common_spec([row(channel), row(channel, torch.float16)]) is None
    static = QuantSpec(8, "channel", activations="static")
    assert common_spec([row(static), row(static)]) is None
    assert common_spec([row(static)]) == static.for_dtype(torch.float32)
    assert common_spec([row(QuantSpec(8, "tensor"))] * 2).granularity == "channel"
