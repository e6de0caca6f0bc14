"""Small models with logits, and their data, for tests that compare outputs."""

from __future__ import annotations

import types

import torch
from torch import nn

import fewbits

VOCABULARY = 40


class Blocks(nn.Module):
    """A chain of three blocks and a head; its output is a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class TinyLM(nn.Module):
    """Gives an object with `logits` for token ids, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.body = Blocks()
        self.body.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.body(self.embed(input_ids)))


def blocks(seed: int = 0) -> Blocks:
    torch.manual_seed(seed)
    return Blocks().eval()


def tiny_lm(seed: int = 0) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM().eval()


def inputs(count: int = 4, seed: int = 1, size: int = 24) -> list[torch.Tensor]:
    """Batches of correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0.5, 32)
    return [torch.randn(size, 32, generator=generator) @ mix for _ in range(count)]


def tokens(count: int = 3, seed: int = 1, size: int = 4, length: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (size, length), generator=generator) for _ in range(count)]


class Int3(fewbits.Quantizer):
    spec = fewbits.QuantSpec(bits=3, granularity="group", group_size=32)

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"selector": fewbits.LayerSelector(min_elements=1)} | settings)
