"""Validation finds any change to a result, down to a single bit."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor
from fewbits.errors import ValidationError
from fewbits.validation.checks import same_bits
from support.lifecycle_helpers import TiedLM, mlp, quantize_small, read_header, small

pytestmark = pytest.mark.usefixtures("reference_only")

ROWS, COLUMNS = 3, 7


def exact_weights():
    """Weights that are multiples of their scale, so that any other code exceeds the error bound."""
    return {"w": torch.arange(-10.0, 11.0).reshape(ROWS, COLUMNS).index_fill(1, torch.tensor([0]), 127.0)}


def converted(source, quantizer=None, **options):
    quantizer = quantizer or small()
    quantizer.prepare(source)
    return quantizer, quantizer.convert(**options)


def assert_found(quantizer, *names):
    with pytest.raises(ValidationError) as caught:
        quantizer.validate()
    failing = {t.name for t in caught.value.report.tensors if t.failures}
    assert failing == set(names)
    assert all(name in str(caught.value) for name in names)


@given(st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1), st.integers(0, 7))
def test_any_flipped_bit_of_any_code_is_found(row, column, bit):
    quantizer, result = converted(exact_weights())
    quantizer.validate()
    result["w"].packed.view(torch.uint8)[row, column] ^= 1 << bit
    assert_found(quantizer, "w")


@pytest.mark.parametrize("measure", [None, True, False])
def test_a_flipped_code_is_found_whether_or_not_convert_measured_the_tensor(measure):
    quantizer, result = converted(mlp(), compare=measure)
    result[2].weight_stored.packed[1, 2] ^= 0x80
    assert_found(quantizer, "2.weight")


@pytest.mark.parametrize("quantizer", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8)])
@pytest.mark.parametrize("scale", [math.nan, 0.0, math.inf, -math.inf])
def test_a_zero_nan_or_infinite_scale_is_found(quantizer, scale):
    quantizer, result = converted(mlp(), small(quantizer))
    result[0].weight_stored.scale.view(-1)[0] = scale
    assert_found(quantizer, "0.weight")


@pytest.mark.parametrize("quantizer", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8)])
@pytest.mark.parametrize("scale", [math.nan, 0.0, math.inf])
def test_scales_that_are_all_zero_nan_or_infinite_are_found(quantizer, scale):
    quantizer, result = converted(mlp(), small(quantizer))
    result[0].weight_stored.scale.fill_(scale)
    assert_found(quantizer, "0.weight")


@pytest.mark.parametrize("quantizer", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8, symmetric=False)])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda packed: packed.fill_(0), "all of its codes are "),
        (lambda packed: packed[3:5].fill_(0), "one code throughout in 2 of its rows"),
        (lambda packed: packed.copy_(packed[:1].clone().expand_as(packed)), "SQNR .* is below 10 dB"),
    ],
)
def test_constant_codes_are_reported_as_such(quantizer, damage, said):
    quantizer, result = converted(mlp(), small(quantizer))
    damage(result[0].weight_stored.packed)
    with pytest.raises(ValidationError, match=said):
        quantizer.validate()


@pytest.mark.parametrize("quantizer", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8)])
@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(8, 16),
        torch.zeros(8, 16),
        torch.arange(1.0, 9.0).unsqueeze(1).expand(8, 16),
        torch.arange(1.0, 17.0).expand(8, 16),
        torch.arange(1.0, 9.0).unsqueeze(1) * torch.arange(1.0, 17.0),
        torch.cat([torch.full((1, 16), 1e4), torch.arange(1.0, 17.0).expand(7, 16) * 1e-3]),
        torch.tensor([[1.0, 1.0001]]),
        torch.tensor([[3.0], [4.0]]),
        torch.tensor([[5.0]]),
    ],
    ids=["ones", "zeros", "constant rows", "equal rows", "multiples", "small rows", "a row", "a column", "an element"],
)
def test_a_constant_source_passes(quantizer, weight):
    assert quantize_small({"w": weight.contiguous()}, small(quantizer), fail_under=-1000).report.ok


def test_a_slightly_larger_scale_is_found():
    quantizer, result = converted(mlp())
    result[0].weight_stored.scale.mul_(1.1)
    assert_found(quantizer, "0.weight")


def test_a_changed_zero_point_is_found():
    quantizer, result = converted(mlp(), small(Int4Grouped, 8, symmetric=False))
    result[0].weight_stored.zero_point.bitwise_xor_(1)
    assert_found(quantizer, "0.weight")


@pytest.mark.parametrize(("where", "value"), [("bias", 1e-7), ("bias", math.nan)])
def test_a_changed_kept_tensor_is_found(where, value):
    quantizer, result = converted(mlp())
    with torch.no_grad():
        getattr(result[2], where)[0] += value
    assert_found(quantizer, "2.bias")


def test_a_changed_buffer_is_found():
    quantizer, result = converted(TiedLM())
    result.position_ids[3] = 7
    assert_found(quantizer, "position_ids")


def test_a_changed_cast_tensor_is_found():
    quantizer, result = converted(mlp(), small(FP16Cast))
    result[0].weight_stored.narrow[4, 4] *= 1.01
    assert_found(quantizer, "0.weight")


@pytest.mark.parametrize("quantizer", [Int8PerChannel, partial(Int4Grouped, 8), FP16Cast])
def test_a_mapping_is_checked_like_a_model(quantizer):
    quantizer, result = converted(dict(mlp().state_dict()), small(quantizer))
    value = result["2.weight"]
    (value if isinstance(value, torch.Tensor) else value.scale).mul_(2)
    result["0.bias"][0] = 3
    assert_found(quantizer, "2.weight", "0.bias")


@pytest.mark.parametrize("name", ["0.weight_packed", "2.weight_scale", "2.bias"])
def test_a_changed_byte_of_a_file_is_found(tmp_path, name):
    save_file(mlp().state_dict(), tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    quantizer = small()
    quantizer.prepare(tmp_path / "in.safetensors")
    quantizer.convert(output=output)
    entries, _, payload = read_header(output)
    data = bytearray(output.read_bytes())
    data[len(data) - payload + entries[name]["data_offsets"][0]] ^= 1
    output.write_bytes(data)
    assert_found(quantizer, name.removesuffix("_packed").removesuffix("_scale"))


def test_a_changed_source_is_found():
    model = mlp()
    quantizer, _ = converted(model)
    with torch.no_grad():
        model[2].bias[0] += 1
        model[0].weight[0, 0] += 1
    assert_found(quantizer, "0.weight", "2.bias")


def test_a_result_converted_to_another_dtype_is_found():
    quantizer, result = converted(mlp())
    result[0].half()
    with pytest.raises(ValidationError, match=r"0\.bias"):
        quantizer.validate()


def test_a_failed_validation_can_be_repeated_after_the_repair():
    quantizer, result = converted(mlp())
    good = result[0].weight_stored.packed.clone()
    result[0].weight_stored.packed[0, 0] ^= 0x80
    with pytest.raises(ValidationError):
        quantizer.validate()
    assert quantizer.state is fewbits.State.CONVERTED
    result[0].weight_stored.packed.copy_(good)
    assert quantizer.validate().ok
    assert quantizer.state is fewbits.State.VALIDATED


def test_the_report_names_the_checks():
    quantizer, _ = converted(mlp())
    assert quantizer.validate().checks == (
        "size",
        "scales",
        "SQNR",
        "error bound of every element",
        "constant rows",
        "reload, bit for bit",
    )


def test_validation_leaves_no_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quantize_small(mlp(), "int8")
    assert not list(tmp_path.iterdir())


def test_validation_does_not_change_the_result():
    quantizer, result = converted(mlp().train())
    before = {name: t.clone() for name, t in result.state_dict().items()}
    quantizer.validate()
    assert all(torch.equal(t, before[name]) for name, t in result.state_dict().items())
    assert result.training


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, 1), torch.ones(1, 2), False),
        (torch.ones(0, 3), torch.ones(0, 3), True),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous(), True),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.tensor([True]), torch.tensor([True]), True),
    ],
)
def test_bits_are_compared_not_values(a, b, same):
    assert same_bits(a, b) is same


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8)])
def test_a_model_in_any_dtype_passes(dtype, make):
    assert quantize_small(mlp().to(dtype), small(make)).report.ok


@pytest.mark.parametrize("exponent", [-300, -160, 160, 300])
def test_very_small_and_very_large_doubles_pass(exponent):
    weights = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = quantize_small({"w": weights * 10.0**exponent}, "int8").report
    assert report.ok
    assert report.sqnr_db > 30


def test_a_dtype_that_files_cannot_store_is_an_error_that_names_the_tensor():
    model = nn.Linear(4, 4)
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(fewbits.FewbitsError, match="phase has dtype complex128"):
        quantize_small(model, "int8")
