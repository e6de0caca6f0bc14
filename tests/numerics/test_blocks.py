"""Weights of several blocks: working block by block, in reused memory, gives the result of the plain formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits import QuantSpec
from fewbits.errors import NonFiniteError
from fewbits.extend import Layout
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import BLOCK_ELEMENTS
from fewbits.numerics.quantize import cast, check_finite, quantize
from support.strategies import FLOATS

SCHEMES = {
    "int8": QuantSpec(bits=8, granularity="channel"),
    "int4 in groups of 128": QuantSpec(bits=4, granularity="group", group_size=128),
    "int4 in groups of 32": QuantSpec(bits=4, granularity="group", group_size=32),
    "int3 in groups of 50": QuantSpec(bits=3, granularity="group", group_size=50),
    "int2": QuantSpec(bits=2, granularity="channel"),
}
#: Rows of the last shape are longer than a block.
SHAPES = [(600, 1024), (500, 1100), (3, BLOCK_ELEMENTS + 7)]


def by_formula(matrix: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Compute signed codes and scales of a symmetric spec that rounds to nearest, for all rows at once."""
    x, width = matrix.to(compute_dtype(matrix.dtype)), spec.group_size or matrix.shape[1]
    groups = F.pad(x, (0, -matrix.shape[1] % width)).reshape(len(x), -1, width)
    exact = groups.abs().amax(-1).double() / (2 ** (spec.bits - 1) - 1)
    scale = exact.clamp(min=torch.finfo(matrix.dtype).tiny).to(matrix.dtype)
    codes = (groups / scale.to(x.dtype).unsqueeze(-1)).round().clamp(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1)
    return codes.flatten(1)[:, : matrix.shape[1]].to(torch.int8), scale


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SCHEMES.values(), ids=SCHEMES)
def test_codes_and_scales_are_those_of_the_plain_formula(spec, shape, dtype, threads):
    weight = normal(shape, dtype)
    codes, scale = by_formula(weight, spec)
    for count in (1, 2):
        threads(count)
        q = quantize(weight, spec)
        assert torch.equal(q.codes(), codes)
        assert torch.equal(q.scale, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_number_of_threads_changes_no_bit_of_any_width(bits, symmetric, dtype, threads):
    spec = QuantSpec(bits=bits, granularity="group", group_size=96, symmetric=symmetric)
    weight = normal((570, 1000), dtype)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(quantize(weight, spec))
    assert results[0].equal(results[1])


@pytest.mark.parametrize("spec", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (normal((1024, 600), torch.float32).T, None),
        (normal((1024, 600), torch.float32), Layout.of((1024, 600), inputs=(0,))),
        (normal((1024, 600), torch.float16).T, None),
        (normal((600, 2048), torch.float32)[:, ::2], None),
        (normal((2 * 600, 1024), torch.bfloat16)[1::2], None),
        (normal((1, 1024), torch.float32).expand(600, -1), None),
        (normal((6, 1024, 200), torch.float32), Layout.of((6, 1024, 200), inputs=(1,))),
    ],
    ids=[
        "transposed",
        "inputs first",
        "half, transposed",
        "every other column",
        "every other row",
        "repeated",
        "stack",
    ],
)
def test_the_memory_layout_of_a_weight_changes_nothing(tensor, layout, spec):
    layout = layout or Layout.of(tensor.shape)
    matrix = tensor.permute(layout.permutation).reshape(layout.matrix_shape).contiguous()
    codes, scale = by_formula(matrix, spec)
    q = quantize(tensor, spec, layout=layout)
    assert torch.equal(q.codes(), codes)
    assert torch.equal(q.scale, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_finite_numbers_with_an_infinite_sum_are_quantized(granularity, dtype):
    weight = torch.full((5, 64), torch.finfo(dtype).max, dtype=dtype)
    weight[3] *= -1
    codes = quantize(weight, QuantSpec(bits=8, granularity=granularity)).codes()
    assert codes.abs().eq(codes[0, 0]).all()
    check_finite(weight)
    assert torch.equal(cast(weight, torch.float64), weight.double())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bad", [(math.inf,), (-math.inf,), (math.nan,), (math.inf, -math.inf), (-math.inf, math.nan)])
def test_one_bad_number_in_the_last_of_many_blocks_is_found(bad, granularity):
    weight = normal((600, 1024), torch.float32)
    weight[598, 5 : 5 + len(bad)] = torch.tensor(bad)
    with pytest.raises(NonFiniteError, match=rf"index \(598, 5\) is {bad[0]};"):
        quantize(weight, QuantSpec(bits=8, granularity=granularity))
    with pytest.raises(NonFiniteError, match=rf"index \(598, 5\) is {bad[0]};"):
        cast(weight, torch.float16)


def test_a_weight_that_wants_gradients_is_checked_without_a_warning():
    check_finite(torch.nn.Parameter(torch.ones(3, 4)))
