"""Convolutions in bfloat16 or by linear kernels: as accurate as linear layers, and exact where somebody asks for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.kernels import convolution, features
from fewbits.kernels.reference import REFERENCE
from kernels.kernel_cases import noise_db, normal

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    """Every CPU computes in bfloat16, fast or not, and small layers too."""
    monkeypatch.setattr(features, "has_bf16", lambda: True)
    monkeypatch.setattr(convolution, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(convolution, "LEAST_PLACES", 0)


def quantized(layer, scheme="int8", **settings):
    return fewbits.quantize(layer.eval(), scheme, validate=False, min_elements=0, **settings).model


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    inputs = draw(st.sampled_from([64, 67, 80, 256]))
    settings = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "replicate"])),
    }
    layer = KINDS[rank](inputs, draw(st.sampled_from([128, 130])), kernel, **settings)
    shape = [inputs, *[draw(st.integers(5, 7)) for _ in range(rank)]]
    batch = draw(st.none() | st.integers(1, 3))
    return layer, shape if batch is None else [batch, *shape]


@given(
    convolutions(),
    st.sampled_from(["int8", "int8-tensor", "int4", "nf4"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_products_have_fifty_decibels(drawn, scheme, dtype):
    layer, shape = drawn
    layer = quantized(layer, scheme)
    x = normal(*shape, dtype=dtype)
    assert None in (layer.refuses_linear(x), layer.refuses_bf16(x, layer.weight_stored.weight_layout()))
    with torch.no_grad():
        output, exact = layer(x), fewbits.dequantize(layer).double()(x.double())
    assert output.dtype == dtype
    few_bits = scheme in ("int4", "nf4")  # 10 dB more than the rounded weights have would be enough
    assert noise_db(output, exact) > (45 if few_bits or dtype == torch.bfloat16 else 50)
    channels = -len(layer.kernel_size) - 1
    last = x.movedim(channels, -1).contiguous().movedim(-1, channels)
    with torch.no_grad():
        torch.testing.assert_close(layer(last), output, rtol=0.02, atol=0.02)


def test_gradients_transforms_compilers_and_other_dtypes_use_the_dequantized_weight():
    layer = quantized(nn.Conv2d(64, 128, 3))
    exact, x = fewbits.dequantize(layer), normal(2, 64, 6, 6)
    slope = x.clone().requires_grad_()
    layer(slope).sum().backward()
    expected = x.clone().requires_grad_()
    exact(expected).sum().backward()
    torch.testing.assert_close(slope.grad, expected.grad)
    with torch.no_grad():
        assert torch.equal(layer.double()(x.double()), exact.double()(x.double()))
        layer, exact = layer.float(), exact.float()
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None]), torch.func.vmap(exact)(x[:, None]))
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), exact(x))
        with torch.autocast("cpu"):
            assert torch.equal(layer(x), exact(x))
        fewbits.set_compute(layer, "exact")
        assert torch.equal(layer(x), exact(x))


@pytest.mark.parametrize("axes", [(0, 2, 3), (0,), (1,)])
def test_a_weight_cut_along_other_axes_is_dequantized(axes):
    layer = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    layer = quantized(layer, input_axes={"0": axes}, on_failure="ignore")
    x = normal(2, 128, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), fewbits.dequantize(layer)(x))


def test_a_weight_whose_layout_was_guessed_from_its_shape_is_dequantized(tmp_path):
    layer = nn.Sequential(nn.Conv1d(64, 128, 40, stride=16)).eval()
    fewbits.quantize(layer.state_dict(), "int8", validate=False).save(tmp_path / "a.safetensors")
    loaded = fewbits.load(tmp_path / "a.safetensors", into=nn.Sequential(nn.Conv1d(64, 128, 40, stride=16)))
    x = normal(1, 64, 400)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fewbits.dequantize(loaded)(x))


def test_a_batch_of_biases_is_mapped():
    layer = quantized(nn.Sequential(nn.Conv2d(64, 128, 3)))
    x, biases = normal(2, 64, 6, 6), normal(3, 128)
    with torch.no_grad():
        found = torch.func.vmap(lambda bias: torch.func.functional_call(layer, {"0.bias": bias}, (x,)))(biases)
        layer[0].bias.copy_(biases[1])
        torch.testing.assert_close(found[1], layer(x))


def test_chosen_kernels_replace_codes_in_bfloat16():
    layer = quantized(nn.Conv2d(64, 128, 3))
    fewbits.set_compute(layer, "auto", kernels=[REFERENCE])
    x = normal(2, 64, 6, 6)
    with torch.no_grad():
        assert torch.equal(layer(x), fewbits.dequantize(layer)(x))


def test_nan_and_infinity_come_through():
    layer = quantized(nn.Conv1d(64, 128, 1))
    x = normal(1, 64, 4)
    x[0, 3, 1], x[0, 5, 2] = torch.nan, torch.inf
    with torch.no_grad():
        output, expected = layer(x), fewbits.dequantize(layer)(x)
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert torch.equal(output.isnan(), expected.isnan())


def inputs_in_any_order(channels, *places):
    """Images with the same shape and any strides."""
    x = normal(2, channels, *places)
    yield from (x, x[0], x.movedim(1, -1).contiguous().movedim(-1, 1), normal(2, 2 * channels, *places).chunk(2, 1)[0])
    yield from (x[:, :, 1:], x[:1].expand(3, *x.shape[1:]), x.movedim(1, -1).contiguous().movedim(-1, 1)[0])
    yield from [x.mT] if len(places) > 1 else []


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"padding": "same"}, {"dilation": 3}])
def test_a_convolution_of_one_place_keeps_shapes_order_of_memory_and_weight(kind, settings, monkeypatch):
    monkeypatch.setattr(convolution, "MOST_PLACES", 1000)
    layer = quantized(nn.Sequential(KINDS[kind](64, 128, 1, **settings)))
    exact = fewbits.dequantize(layer)
    with torch.no_grad():
        for x in inputs_in_any_order(64, *[5, 7, 2][:kind]):
            output, expected = layer(x), exact(x)
            assert layer[0].refuses_linear(x) is None
            assert output.shape == expected.shape
            # Torch's three-dimensional convolution does not always keep channels last.
            assert output.stride() == expected.stride() or (kind == 3 and not x.is_contiguous())
            assert noise_db(output, expected.double()) > 45
    assert torch.equal(layer[0].weight, exact[0].weight)
    assert layer[0].weight.shape == (128, 64, *[1] * kind)


class Padding(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(nn.functional.pad(input, (1, 1, 1, 1)), weight, bias)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", [Padding, Standardized])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_class_that_convolves_in_its_own_way_reads_the_dequantized_weight(kind, size, scheme):
    layer = quantized(nn.Sequential(kind(64, 128, size)), scheme)
    x = normal(2, 64, 5, 5)
    with torch.no_grad():
        assert torch.equal(layer(x), fewbits.dequantize(layer)(x))


@pytest.mark.parametrize(
    ("attribute", "value"), [("padding", (1, 1)), ("padding", 1), ("stride", 2), ("stride", (2,)), ("stride", (2, 1))]
)
def test_attributes_may_change_after_quantizing(attribute, value):
    layer, x = quantized(nn.Sequential(nn.Conv2d(64, 128, 1))), normal(2, 64, 5, 5)
    setattr(layer[0], attribute, value)
    with torch.no_grad():
        output, expected = layer(x), fewbits.dequantize(layer)(x)
    assert output.shape == expected.shape
    assert noise_db(output, expected.double()) > 45


@pytest.mark.parametrize("axes", [(0, 2, 3), (2, 3)])
@pytest.mark.parametrize("outputs", [64, 128])
def test_a_weight_of_one_place_that_is_cut_along_other_axes_is_dequantized(axes, outputs):
    layer = quantized(nn.Sequential(nn.Conv2d(64, outputs, 1)), input_axes={"0": axes}, on_failure="ignore")
    x = normal(2, 64, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), fewbits.dequantize(layer)(x))


def test_a_batch_without_samples_and_an_input_that_does_not_fit():
    layer = quantized(nn.Conv2d(64, 128, 3))
    with torch.no_grad():
        assert layer(torch.empty(0, 64, 6, 6)).shape == (0, 128, 4, 4)
        with pytest.raises(RuntimeError, match="expected input"):
            layer(normal(1, 65, 6, 6))
        for place in (normal(1, 65, 6, 6), normal(64, 6)):
            with pytest.raises(RuntimeError, match=r"expected input|Expected 3D"):
                quantized(nn.Conv2d(64, 128, 1))(place)
