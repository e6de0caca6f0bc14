"""Float8 as codes with levels: every finite byte decodes to its own number."""

import pytest
import torch

from fewbits.numerics.affine import decode
from fewbits.numerics.float8 import FLOAT8_DTYPES, float8_codes, float8_spec
from fewbits.numerics.params import QuantParams


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_every_finite_number_is_a_code(dtype):
    values = torch.arange(256).to(torch.uint8).view(dtype)
    values = values[torch.isfinite(values.float())].reshape(1, -1)
    spec = float8_spec(dtype, "tensor", None, torch.float32)
    decoded = decode(float8_codes(values), QuantParams(torch.tensor([2.0])), spec, torch.float32)
    assert torch.equal(decoded, 2 * values.float())


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_nan_and_inf_have_no_code(dtype):
    values = torch.arange(256).to(torch.uint8).view(dtype)
    for value in values[~torch.isfinite(values.float())]:
        assert float8_codes(torch.stack([values[0], value])) is None
