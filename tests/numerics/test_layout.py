"""Cutting tensors of any shape into rows and columns."""

import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits.errors import ArgumentError
from fewbits.extend import Layout, WeightMatrix
from fewbits.nn.eligibility import layout_of
from support.strategies import as_matrix, layouts, problems, shapes

shaped_layouts = shapes(1, 5).flatmap(layouts)


def ravel(index: list[int], sizes: list[int]) -> int:
    place = 0
    for i, size in zip(index, sizes, strict=True):
        place = place * size + i
    return place


@given(shaped_layouts)
def test_an_element_goes_to_the_row_of_its_row_axes_and_the_column_of_its_input_axes(layout):
    rows, columns = layout.permutation[: layout.row_axes], layout.permutation[layout.row_axes :]
    matrix = WeightMatrix(torch.arange(math.prod(layout.shape)).reshape(layout.shape), layout).whole()
    assert tuple(matrix.shape) == layout.matrix_shape
    for flat, index in enumerate(product(*map(range, layout.view))):
        row, column = (ravel([index[a] for a in axes], [layout.view[a] for a in axes]) for axes in (rows, columns))
        assert matrix[row, column] == flat


@given(shaped_layouts)
def test_from_matrix_undoes_the_cut(layout):
    tensor = torch.arange(math.prod(layout.shape)).reshape(layout.shape)
    assert torch.equal(layout.from_matrix(WeightMatrix(tensor, layout).whole()), tensor)


@given(problems(), st.data())
def test_reading_rows_is_slicing_the_matrix(problem, data):
    weight, _, layout = problem
    start = data.draw(st.integers(0, layout.rows))
    stop = data.draw(st.integers(start, layout.rows))
    matrix = WeightMatrix(weight, layout)
    assert torch.equal(matrix.whole(), as_matrix(weight, layout))
    assert torch.equal(matrix.read(start, stop), as_matrix(weight, layout)[start:stop])


@given(problems(), st.sampled_from([1, 7, 50, 10**6]), st.integers(1, 3))
def test_blocks_are_whole_rows_in_order(problem, elements, size):
    weight, _, layout = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", elements)
        blocks = list(WeightMatrix(weight, layout).blocks(size))
    assert [start for start, _, _ in blocks] == [0, *(stop for _, stop, _ in blocks[:-1])]
    assert all(rows.numel() <= size * max(elements, layout.columns) for _, _, rows in blocks)
    assert all(stop - start == len(rows) for start, stop, rows in blocks)
    assert torch.equal(torch.cat([rows for _, _, rows in blocks]), as_matrix(weight, layout))


@given(shaped_layouts)
def test_a_layout_survives_json(layout):
    assert Layout(**json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("layout", "matrix_shape"),
    [
        (Layout.of((7,)), (1, 7)),
        (Layout.of((64, 32)), (64, 32)),
        (Layout.of((64, 3, 7, 7), inputs=(1, 2, 3)), (64, 147)),
        (Layout.of((32, 8, 5), inputs=(0, 2)), (8, 160)),
        (Layout.of((8, 64, 128)), (512, 128)),
        (Layout.of((8, 128, 64), inputs=(1,)), (512, 128)),
        (Layout.of((6, 4, 3), view=(2, 3, 4, 3), inputs=(1, 3)), (8, 9)),
    ],
)
def test_rows_and_columns(layout, matrix_shape):
    assert layout.matrix_shape == matrix_shape


def test_a_scalar_is_a_matrix_of_one_element():
    layout = Layout.of(())
    assert layout.matrix_shape == (1, 1)
    assert WeightMatrix(torch.tensor(3.0), layout).whole().tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("module", "input_shape"),
    [
        (nn.Linear(5, 4), (5,)),
        (nn.Conv1d(6, 4, 3), (6, 3)),
        (nn.Conv2d(6, 4, (2, 3), groups=2), (6, 2, 3)),
        (nn.Conv3d(2, 4, 2), (2, 2, 2, 2)),
        (nn.ConvTranspose1d(6, 4, 3), (6, 1)),
        (nn.ConvTranspose2d(6, 4, (2, 3), groups=2), (6, 1, 1)),
        (nn.ConvTranspose2d(4, 4, 2, groups=4), (4, 1, 1)),
        (nn.ConvTranspose3d(6, 9, 2, groups=3), (6, 1, 1, 1)),
    ],
    ids=str,
)
def test_a_row_holds_the_weights_of_one_output(module, input_shape):
    outputs = module(torch.ones(1, *input_shape)).flatten(2) if len(input_shape) > 1 else module(torch.ones(1, 5))
    layout, declared = layout_of(module, "weight", module.weight)
    assert declared
    for row in range(outputs.shape[1]):
        (touched,) = torch.autograd.grad(outputs[0, row].sum(), module.weight, retain_graph=True)
        expected = torch.zeros(layout.matrix_shape)
        expected[row] = 1
        assert torch.equal(WeightMatrix(touched.ne(0).float(), layout).whole(), expected)


def test_a_row_of_an_embedding_is_one_vector():
    embedding = nn.Embedding(10, 6)
    layout, declared = layout_of(embedding, "weight", embedding.weight)
    assert declared
    assert torch.equal(WeightMatrix(embedding.weight, layout).whole(), embedding.weight)


def test_rows_of_a_contiguous_tensor_are_not_copied():
    tensor = torch.zeros(6, 8)
    assert WeightMatrix(tensor, Layout.of((6, 8))).read(2, 4).data_ptr() == tensor[2:4].data_ptr()
    assert WeightMatrix(tensor.view(2, 3, 8), Layout.of((2, 3, 8))).whole().data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Layout((4, 6), (4, 5), (0, 1), 1),
        lambda: Layout((4, 6), (-4, -6), (0, 1), 1),
        lambda: Layout((4, 6), (4, 6), (0, 0), 1),
        lambda: Layout((4, 6), (4, 6), (0, 1, 2), 1),
        lambda: Layout((4, 6), (4, 6), (1,), 1),
        lambda: Layout((4, 6), (4, 6), (0, 1), 3),
        lambda: Layout((4, 6), (4, 6), (0, 1), -1),
        lambda: Layout.of((4, 6), inputs=(1, -1)),
        lambda: Layout.of((4, 6), inputs=(2,)),
        lambda: Layout.of((4, 6), inputs=(-3,)),
        lambda: Layout.of((4, 6), view=(5, 5)),
    ],
    ids=range(11),
)
def test_a_cut_that_does_not_fit_the_shape_is_refused(make):
    with pytest.raises(ArgumentError):
        make()


@pytest.mark.parametrize("shape", [(6, 4), (24,), (4, 6, 1)])
def test_a_layout_is_for_one_shape(shape):
    with pytest.raises(ArgumentError, match=r"this layout is for shape \(4, 6\)"):
        WeightMatrix(torch.zeros(shape), Layout.of((4, 6))).read(0, 1)
