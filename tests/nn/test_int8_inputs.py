"""Layers that round their inputs to int8, against sums of products in 64-bit integers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from lifecycle_helpers import small
from nn.cases import same_bits

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
