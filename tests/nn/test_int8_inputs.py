"""Layers that round their inputs to int8, against sums of products in 64-bit integers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.kernels import features
from nn.cases import same_bits
from support.lifecycle_helpers import FEWER_EXAMPLES, small

TINY = torch.finfo(torch.float32).tiny


def rounded(layer, activations, x):
    """The layer with int8 inputs; static scales are taken from `x`."""
    quantizer = small(fewbits.Int8PerChannel, activations=activations)
    quantizer.prepare(layer)
    if activations == "static":
        quantizer.observe([x])
    return quantizer.convert()


def by_the_book(layer, x, samples, product):
    """docs/format.md, in plain steps: ``sum(q_x * q) * s_x * s + bias``."""
    stored = layer.weight_stored.value()
    s_x = stored.input_scale
    if s_x is None:
        s_x = (x.abs().amax(samples, keepdim=True) / 127).clamp(min=TINY)
    q_x = (x / s_x).round().clamp(-128, 127).to(torch.int64)
    q = stored.layout.from_matrix(stored.codes().to(torch.int64))
    per_channel = (-1, *[1] * (x.dim() - 2)) if product is not _linear else (-1,)
    total = product(layer, q_x, q)
    assert total.dtype == torch.int64
    return total.float() * s_x * stored.scale.reshape(per_channel) + layer.bias.reshape(per_channel)


def _linear(_, q_x, q):
    return (q_x.unsqueeze(-2) * q).sum(-1)


def _conv(layer, q_x, q):
    """A convolution as sums over unfolded patches, in integers."""
    k, (n, _, h, w) = layer.kernel_size, q_x.shape
    patches = F.unfold(q_x.double(), k).long()  # unfold only copies, and whole numbers below 2**53 are exact
    out = (patches.transpose(1, 2).unsqueeze(-2) * q.flatten(1)).sum(-1).transpose(1, 2)
    return out.reshape(n, len(q), h - k[0] + 1, w - k[1] + 1)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("columns", [1, 64, 1025, 5000])
@torch.no_grad()
def test_a_linear_layer_is_exact_with_codes_at_their_extremes(activations, columns):
    layer = nn.Linear(columns, 6)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0]).unsqueeze(1)
    layer.weight.copy_(signs.expand(6, columns))  # every code is 127 or -127
    x = torch.stack([torch.full((columns,), 3.0), torch.full((columns,), -7.0), torch.linspace(-1, 1, columns)])
    module = rounded(layer, activations, x)
    assert same_bits(module(x), by_the_book(module, x, -1, _linear))


@given(st.data())
@torch.no_grad()
def test_a_linear_layer_of_any_size_is_the_sum_of_integer_products(data):
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9)))
    x = torch.randn(data.draw(st.integers(1, 4)), 3, layer.in_features, generator=generator)
    x = x * torch.logspace(-3, 3, x.shape[0]).reshape(-1, 1, 1)  # rows of very different sizes
    module = rounded(layer, data.draw(st.sampled_from(["dynamic", "static"])), x)
    assert same_bits(module(x), by_the_book(module, x, -1, _linear))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@torch.no_grad()
def test_a_convolution_is_the_sum_of_integer_products_with_a_scale_for_every_sample(activations):
    layer = nn.Conv2d(40, 5, 3)
    layer.weight.fill_(1.0)
    x = torch.randn(3, 40, 7, 6) * torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1, 1)
    module = rounded(layer, activations, x)
    assert same_bits(module(x), by_the_book(module, x, (1, 2, 3), _conv))


CONVOLUTIONS = {
    "dense": lambda: nn.Conv2d(16, 16, 3),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "grouped": lambda: nn.Conv1d(16, 16, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(16, 16, 3, groups=2),
    "circular": lambda: nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular"),
}
every_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)
either_way = pytest.mark.parametrize("activations", ["dynamic", "static"])


def inputs_of(layer, batch=2):
    generator = torch.Generator().manual_seed(batch)
    return 10 * torch.randn(batch, layer.in_channels, *[9] * len(layer.kernel_size), generator=generator)


def of_extremes(layer):
    """Codes at their extremes, so that sums are as large as they can be."""
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight > 0.9 * layer.weight.mean(), 1.0, -1.0))
    return layer


@every_convolution
@either_way
@torch.no_grad()
def test_every_convolution_gives_the_bits_of_the_reference(name, activations):
    layer = of_extremes(CONVOLUTIONS[name]())
    x = inputs_of(layer)
    module = rounded(layer, activations, x)
    output = module(x)
    fewbits.set_compute(module, "exact")
    assert same_bits(output, module(x))


@every_convolution
@torch.no_grad()
def test_autocast_rounds_no_sum_of_a_convolution(name):
    layer = of_extremes(CONVOLUTIONS[name]())
    x = inputs_of(layer)
    module = rounded(layer, "dynamic", x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
    assert same_bits(output, module(x))


@torch.no_grad()
def test_outputs_of_padding_alone_are_positive_zeros():
    layer = nn.Conv1d(1, 2, 1, padding=1, bias=False)
    layer.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1))
    module = rounded(layer, "dynamic", torch.ones(1, 1, 9))
    for compute in ("auto", "exact"):
        fewbits.set_compute(module, compute)
        assert not module(torch.ones(1, 1, 9))[..., [0, -1]].signbit().any()


@FEWER_EXAMPLES
@given(st.data())
@torch.no_grad()
def test_a_convolution_with_any_options_gives_the_bits_of_the_reference(data):
    draw, small_number = data.draw, st.integers(1, 3)
    rank, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 5))
    layer = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")(
        groups * draw(small_number),
        groups * draw(small_number),
        tuple(draw(small_number) for _ in range(rank)),
        stride=draw(small_number),
        padding=draw(st.integers(0, 1)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    x = inputs_of(layer, draw(st.integers(0, 3)))
    module = rounded(of_extremes(layer), "dynamic", x)
    output = module(x)
    fewbits.set_compute(module, "exact")
    assert same_bits(output, module(x))


@pytest.mark.parametrize("batch", [1, 2, 100])
@torch.no_grad()
def test_a_convolution_of_a_single_number_is_right(batch):
    layer = nn.Conv1d(1, 2, 1)
    x = inputs_of(layer, batch)
    module = rounded(layer, "dynamic", x)
    output = module(x)
    fewbits.set_compute(module, "exact")
    assert same_bits(output, module(x))


@torch.no_grad()
def test_sums_are_taken_in_float32_up_to_the_largest_whole_number_it_holds(monkeypatch):
    monkeypatch.setattr(features, "convolution_is_exact", lambda: True)
    summed = []
    original = nn.Conv1d._conv_forward
    monkeypatch.setattr(
        nn.Conv1d, "_conv_forward", lambda self, x, *rest: (summed.append(x.dtype), original(self, x, *rest))[1]
    )
    for columns, dtype in ((1024, torch.float32), (1025, torch.float64)):
        layer = nn.Conv1d(2 * columns, 2, 1, groups=2)
        layer.weight.fill_(1.0)
        x = torch.full((1, 2 * columns, 1), -1.0)
        x[:, ::2, :] = 127 / 128  # odd sums
        module = rounded(layer, "dynamic", x)
        output = module(x)
        assert summed.pop() == dtype
        fewbits.set_compute(module, "exact")
        assert same_bits(output, module(x))


@every_convolution
@either_way
def test_an_empty_batch_gives_an_empty_output(name, activations):
    layer = CONVOLUTIONS[name]()
    module = rounded(layer, activations, inputs_of(layer))
    assert module(inputs_of(layer, 0)).shape == layer(inputs_of(layer, 0)).shape


@every_convolution
@torch.no_grad()
def test_a_sample_with_nan_is_nan_and_others_are_not(name):
    layer = CONVOLUTIONS[name]()
    x = inputs_of(layer, 3)
    module = rounded(layer, "dynamic", x)
    expected = module(x)
    x[1] = torch.nan
    output = module(x)
    assert output[1].isnan().all()
    assert same_bits(output[::2], expected[::2])


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["linear", *CONVOLUTIONS])
def test_inputs_that_are_not_floating_are_refused_by_name(name, dtype, activations):
    layer = CONVOLUTIONS[name]() if name != "linear" else nn.Linear(9, 9)
    x = inputs_of(layer) if name != "linear" else torch.ones(2, 9)
    quantizer = small(fewbits.Int8PerChannel, activations=activations)
    quantizer.prepare(layer)
    module = quantizer.convert()
    with pytest.raises(ArgumentError, match=rf"takes floating inputs, not {str(dtype)[6:]} of shape \(2, .*x\.to\("):
        module(x.to(dtype))
