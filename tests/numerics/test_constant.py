"""Rows with equal codes: which of them count as lost."""

import pytest
import torch

from fewbits import QuantizedTensor, QuantSpec, measure
from fewbits.extend import QuantParams
from fewbits.numerics.layout import Layout


def stored(codes, scale, **fields):
    spec = QuantSpec(8, **({"granularity": "channel"} | fields))
    codes = torch.tensor(codes)
    return QuantizedTensor.from_codes(
        codes, QuantParams(torch.tensor(scale)), spec=spec, layout=Layout.of(codes.shape), dtype=torch.float32
    )


@pytest.mark.parametrize("rounding", ["nearest", "free"])
@pytest.mark.parametrize("columns", [2, 15, 16, 17, 100])
@pytest.mark.parametrize("place", [0, -1])
def test_a_row_is_lost_only_if_all_its_codes_are_equal(rounding, columns, place):
    x = torch.linspace(-10, 20, 3 * columns).reshape(3, columns)
    codes = x.round().int()
    codes[1] = 5
    assert measure(x, stored(codes.tolist(), [[1.0]] * 3, rounding=rounding)).constant_rows == 1
    codes[1, place] = 6
    assert measure(x, stored(codes.tolist(), [[1.0]] * 3, rounding=rounding)).constant_rows == 0


def test_a_nearly_constant_row_with_one_code_is_not_lost():
    x = torch.tensor([[10.0, 10.8, 11.6], [1.0, 2.0, 3.0]])
    found = measure(x, stored([[10, 10, 10], [1, 2, 3]], [[1.0], [1.0]]))
    assert found.broken_at == (0, 1)
    assert found.constant_rows == 0


def test_rows_within_half_a_step_are_not_lost():
    x = torch.tensor([[100.0, -100.0], [0.3, -0.4]])
    found = measure(x, stored([[100, -100], [0, 0]], [1.0], granularity="tensor"))
    assert (found.broken_at, found.constant_rows) == (None, 0)


@pytest.mark.parametrize("magnitude", [1e-300, 1e300])
def test_rows_of_any_magnitude_are_told_apart(magnitude):
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64) * magnitude
    spec, layout = QuantSpec(8, "channel"), Layout.of((2, 2))
    scale = torch.full((2, 1), magnitude, dtype=torch.float64)
    codes = torch.tensor([[1, -2], [-5, -5]])
    lost = QuantizedTensor.from_codes(codes, QuantParams(scale), spec=spec, layout=layout, dtype=torch.float64)
    assert measure(x, lost).constant_rows == 1


def test_rows_within_a_step_are_not_lost_where_codes_are_free():
    x = torch.tensor([[100.0, -100.0], [0.3, -0.8], [0.3, -1.2]])
    codes = [[100, -100], [0, 0], [0, 0]]
    assert measure(x, stored(codes, [1.0], granularity="tensor")).constant_rows == 2
    assert measure(x, stored(codes, [1.0], granularity="tensor", rounding="free")).constant_rows == 1
