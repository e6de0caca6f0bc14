"""FP8 weights with ``weight_scale_inv`` are read with their codes: as a mapping, into a model, and by `convert`."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import FormatError
from fewbits.nn.base import QuantizedModule
from fewbits.sources.open import open_source
from support.fp8 import codes, scales
from support.qweight import write

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8") / "model"


def checkpoint(path, shape, scale_shape, dtype=torch.float8_e4m3fn, scale_dtype=torch.float32, block=None):
    tensors = {
        "l.weight": codes(shape, dtype),
        "l.weight_scale_inv": scales(scale_shape).to(scale_dtype),
        "l.bias": torch.ones(shape[0], dtype=torch.bfloat16),
    }
    return write(path, tensors, {"quant_method": "fp8", "weight_block_size": block} if block else None)


@given(
    st.sampled_from([((70, 50), (5, 4), [16, 16]), ((130, 200), (2, 2), None), ((6, 40), (6, 1), None),
                     ((6, 40), (), None), ((3, 20, 40), (3, 2, 3), [16, 16]), ((3, 20, 40), (3, 1, 1), None)]),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_codes_decode_as_when_the_checkpoint_is_quantized(scratch, shapes, dtype, scale_dtype):
    path = checkpoint(scratch, *shapes[:2], dtype, scale_dtype, shapes[2])
    loaded = fewbits.load(path)
    assert sorted(loaded) == ["l.bias", "l.weight"]
    assert isinstance(loaded["l.weight"], fewbits.QuantizedTensor)
    assert torch.equal(fewbits.load(path, dequantize=True)["l.weight"], open_source(path).read("l.weight"))


def test_scales_that_are_powers_of_two_are_read(scratch):
    tensors = {
        "l.weight": codes((32, 32)),
        "l.weight_scale_inv": torch.tensor([[118, 120], [119, 125]], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    path = write(scratch, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    expected = open_source(path).read("l.weight")
    assert torch.equal(fewbits.load(path, dequantize=True)["l.weight"], expected)


def test_a_checkpoint_is_loaded_into_a_model_and_converted(scratch, tmp_path):
    path = checkpoint(scratch, (64, 48), (4, 3), block=[16, 16])
    model = fewbits.load(path, into=nn.ModuleDict({"l": nn.Linear(48, 64)}))
    expected = open_source(path).read("l.weight")
    assert isinstance(model["l"], QuantizedModule)
    assert torch.equal(model["l"].weight, expected)
    fewbits.convert(path, tmp_path / "out")
    assert fewbits.load(tmp_path / "out")["l.weight"].equal(fewbits.load(path)["l.weight"])
    assert fewbits.verify(tmp_path / "out", path).ok
    assert fewbits.verify(path, path).ok
    # The float source of a checkpoint stays what it was.
    assert fewbits.plan(path, "int8", min_elements=0).ledger["l.weight"].dtype == torch.bfloat16


def test_block_sizes_of_a_nested_configuration_count(scratch):
    path = checkpoint(scratch, (64, 48), (4, 3), block=[16, 16])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"text_config": config}))
    expected = open_source(path).read("l.weight")
    assert torch.equal(fewbits.load(path, dequantize=True)["l.weight"], expected)


def test_scales_of_activations_are_left_out(scratch, events):
    tensors = {"l.weight": codes((64, 48)), "l.weight_scale_inv": scales((4, 3)), "l.activation_scale": torch.ones(1)}
    path = write(scratch, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16]})
    model = fewbits.load(path, into=nn.ModuleDict({"l": nn.Linear(48, 64, bias=False)}))
    assert isinstance(model["l"], QuantizedModule)
    (left,) = [event for event in events if event["event"] == "tensors_left_out"]
    assert left["tensors"] == ["l.activation_scale"]


def test_a_default_device_does_not_change_what_is_read(scratch):
    path = checkpoint(scratch, (64, 48), (4, 3), block=[16, 16])
    with torch.device("meta"):
        found = fewbits.load(path)["l.weight"]
    assert found.equal(fewbits.load(path)["l.weight"])


def test_damage_is_refused_with_the_name_of_the_tensor(scratch):
    with pytest.raises(FormatError, match=r"l\.weight_scale_inv .*does not fit l\.weight"):
        fewbits.load(checkpoint(scratch, (64, 48), (4, 4), block=[16, 16]))
    with pytest.raises(FormatError, match=r"weight_block_size is \[16, 0\]; it must be two positive integers"):
        fewbits.load(checkpoint(scratch, (64, 48), (4, 3), block=[16, 0]))
    tensors = {"l.weight": codes((64, 48)), "l.weight_scale_inv": torch.ones(64, 1)}
    tensors["l.weight"].view(torch.uint8)[1, 1] = 0x7F
    with pytest.raises(FormatError, match=r"l\.weight holds NaN or Inf"):
        fewbits.load(write(scratch, tensors, None))
    tensors = {"l.weight": codes((64, 48)), "l.weight_scale_inv": torch.full((64, 1), torch.inf)}
    with pytest.raises(FormatError, match=r"l\.weight: a scale is NaN or Inf"):
        fewbits.load(write(scratch, tensors, None))
