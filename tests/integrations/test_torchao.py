"""Codes in torchao's tensors: the same numbers, bit for bit."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.integrations.torchao import to_torchao
from fewbits.numerics.spec import QuantSpec
from nn.cases import same_bits
from support.lifecycle_helpers import FEWER_EXAMPLES, small


class Chosen(fewbits.Quantizer):
    """Gives every weight one spec; rows that groups do not divide have a shorter last group."""

    def __init__(self, spec, **settings):
        self.spec = spec
        super().__init__(ragged="shorter", **settings)


def quantized(model, spec, **settings):
    quantizer = small(Chosen, spec=spec, **settings)
    quantizer.prepare(model)
    return quantizer.convert()


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao.quantization")


integer_specs = st.builds(
    QuantSpec,
    st.integers(2, 8),
    st.just("group"),
    group_size=st.sampled_from([8, 16, 64, 96]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([None, torch.float32, torch.float16]),
    scale_bits=st.sampled_from([None, 6]),
) | st.builds(QuantSpec, st.integers(2, 8), st.sampled_from(["tensor", "channel"]), symmetric=st.booleans())


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@FEWER_EXAMPLES
@given(spec=integer_specs, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_torchao_dequantizes_to_the_same_numbers(torchao, spec, dtype, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 6)).to(dtype)
    model = quantized(model, spec)
    before = copy.deepcopy(model.state_dict())
    converted, floats = to_torchao(model), fewbits.dequantize(model)
    for layer, plain in zip(converted, floats, strict=True):
        assert type(layer) is type(plain)
        assert isinstance(layer.weight, torchao.IntxUnpackedToInt8Tensor)
        assert same_bits(layer.weight.dequantize(), plain.weight)
    assert all(same_bits(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_computes_with_codes_in_torchao(torchao):
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10, bias=False))
    tied[2].weight = tied[0].weight
    model = fewbits.quantize(tied, "int8").model
    converted, floats = to_torchao(model), fewbits.dequantize(model)
    tokens = torch.arange(10)
    assert converted[2].weight is converted[0].weight
    assert torch.equal(converted(tokens), floats(tokens))


def test_int8_inputs_concern_linear_layers_and_change_outputs_a_little(torchao):
    torch.manual_seed(0)
    model = fewbits.quantize(nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64)), "int8").model
    converted, tokens = to_torchao(model, int8_inputs=True), torch.arange(10)
    assert converted[0].weight.activation_quantization is None
    expected = fewbits.dequantize(model)(tokens)
    difference = (converted(tokens) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.02


def coded(layer, scheme="int8", **settings):
    return lambda: fewbits.quantize(layer, scheme, **settings).model


def largest_float16():
    return nn.Linear(128, 8, bias=False).half().requires_grad_(False).apply(lambda m: m.weight.fill_(65504.0))


REFUSED = {
    "levels": (coded(nn.Linear(128, 24), "nf4"), "weight has a table of levels"),
    "no codes": (coded(nn.Linear(128, 24), "fp16"), "weight is stored as float16, without codes"),
    "another class": (coded(nn.Conv1d(8, 64, 3)), "weight belongs to a Conv1d, not to a Linear or an Embedding"),
    "int8 inputs": (
        coded(nn.Linear(128, 24), activations="dynamic"),
        "weight rounds its inputs to int8 in another way",
    ),
    "float64": (coded(nn.Linear(128, 24).double()), "weight is float64; torchao takes float32"),
    "float16 that overflows": (coded(largest_float16(), "int4"), "weight has codes that float16 cannot hold"),
    "ragged groups": (
        lambda: quantized(nn.Linear(100, 8), QuantSpec(4, "group", group_size=32)),
        "weight has rows of 100 elements, not a multiple of the group size 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_torchao_cannot_hold_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        to_torchao(make())


def test_a_message_names_five_weights_and_counts_the_others():
    model = fewbits.quantize(nn.Sequential(*[nn.Linear(128, 24) for _ in range(7)]), "nf4").model
    with pytest.raises(ArgumentError, match=r"cannot hold 7 .*4\.weight has .*; and 2 more weights"):
        to_torchao(model)


def test_other_weights_become_float_weights_on_request(torchao):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 64, 3), nn.Flatten(), nn.Linear(128, 24))
    model = fewbits.quantize(model, "int8").model
    converted, floats = to_torchao(model, dequantize_others=True), fewbits.dequantize(model)
    assert type(converted[0].weight) is nn.Parameter
    assert isinstance(converted[2].weight, torchao.IntxUnpackedToInt8Tensor)
    x = torch.randn(2, 8, 4)
    assert torch.equal(converted(x), floats(x))


def test_a_float_model_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ArgumentError, match="no layer of this Linear is quantized"):
        to_torchao(nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match="not a dict"):
        to_torchao({})
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ArgumentError, match=r"pip install 'fewbits\[torchao\]'"):
        to_torchao(coded(nn.Linear(128, 24))())
