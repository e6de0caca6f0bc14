"""Models for the checks: one that runs, and a Hypothesis strategy for any structure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.testing.strategies import FLOATS, OTHER_DTYPES

#: Number of different ids of `SmallModel`.
VOCABULARY = 40


class SmallModel(nn.Module):
    """A model that runs on ids of any shape (samples, length) and gives (samples, length, 40).

    It has an embedding tied to the output layer, two layers with one weight, one layer at two paths, a convolution, a
    layer in bfloat16, a normalization and a buffer.

    Args:
        seed: The seed of its weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 32)
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.again = self.up
        self.narrow = nn.Linear(32, 32, dtype=torch.bfloat16)
        self.lm_head = nn.Linear(32, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("position_ids", torch.arange(8))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if not parameter.is_meta:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits of every position."""
        x = self.norm(self.embed_tokens(ids))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.down(torch.relu(self.up(x)) + torch.tanh(self.again(x)))
        x = self.second(torch.relu(self.first(x)))
        x = self.narrow(x.to(torch.bfloat16)).to(torch.float32)
        logits: Tensor = self.lm_head(x)
        return logits


def ids(seed: int = 0, samples: int = 3) -> Tensor:
    """Draw one batch for `SmallModel`: (samples, 6), int64."""
    return torch.randint(VOCABULARY, (samples, 6), generator=torch.Generator().manual_seed(seed))


_SIZES = st.integers(1, 4)
_SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def _bags(draw: st.DrawFn) -> nn.Module:
    """Draw parameters and buffers without a forward."""
    bag = nn.Module()
    for index in range(draw(st.integers(0, 3))):
        tensor = torch.ones(draw(_SHAPES), dtype=draw(st.sampled_from([*FLOATS, *OTHER_DTYPES])))
        if draw(st.booleans()):
            bag.register_parameter(f"p{index}", nn.Parameter(tensor, requires_grad=False))
        else:
            bag.register_buffer(f"b{index}", tensor, persistent=draw(st.booleans()))
    return bag


_LEAVES: st.SearchStrategy[nn.Module] = st.one_of(
    st.builds(nn.Linear, _SIZES, _SIZES, bias=st.booleans()),
    st.builds(nn.Conv1d, _SIZES, _SIZES, _SIZES),
    st.builds(nn.Embedding, _SIZES, _SIZES),
    st.builds(nn.LayerNorm, _SIZES),
    st.builds(nn.BatchNorm1d, _SIZES),
    _bags(),
)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw nested modules of many kinds and dtypes, with tied tensors, shared modules, and at least one Linear.

    They hold tensors and cannot be run. Most tensors are tiny: ``LayerSelector(min_elements=1)`` quantizes them.
    """
    leaves = [leaf.to(draw(st.sampled_from(FLOATS))) for leaf in draw(st.lists(_LEAVES, max_size=5))]
    root = nn.Module()
    root.add_module("always", nn.Linear(3, 5))
    containers = [root]
    for index, leaf in enumerate(leaves):
        parent = draw(st.sampled_from(containers))
        if draw(st.booleans()):
            containers.append(nn.Module())
            parent.add_module(f"block{index}", containers[-1])
            parent = containers[-1]
        parent.add_module(f"leaf{index}", leaf)
        if draw(st.booleans()):
            draw(st.sampled_from(containers)).add_module(f"again{index}", draw(st.sampled_from(leaves)))
    _tie(draw, leaves)
    return root


def _tie(draw: st.DrawFn, leaves: Sequence[nn.Module]) -> None:
    """Let some layers share a weight: the same parameter, or another parameter over the same memory."""
    holders = [leaf for leaf in leaves if isinstance(getattr(leaf, "weight", None), nn.Parameter)]
    for one, other in itertools.permutations(holders, 2):
        weight, replaced = one.get_parameter("weight"), other.get_parameter("weight")
        alike = (weight.shape, weight.dtype) == (replaced.shape, replaced.dtype)
        if alike and draw(st.booleans()):
            other.register_parameter("weight", draw(st.sampled_from([weight, nn.Parameter(weight.data)])))
