"""How close a quantized model stays to the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Figures by name; names with "KL" are nats per token or image, lower is better.
Scores = Mapping[str, float]


def divergence(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Mean over positions of KL(reference || output), from log-probabilities (positions, classes)."""
    sums = [float((r.exp() * (r - o)).sum(-1).double().sum()) for o, r in zip(outputs, reference, strict=True)]
    return sum(sums) / sum(len(r) for r in reference)


def perplexity(outputs: Sequence[Tensor], tokens: Sequence[Tensor]) -> float:
    losses = [F.nll_loss(o[:-1], t[1:], reduction="sum") for o, t in zip(outputs, tokens, strict=True)]
    return float((torch.stack(losses).double().sum() / sum(len(t) - 1 for t in tokens)).exp())


def cosine(x: Tensor, reference: Tensor) -> float:
    return float(F.cosine_similarity(x.double(), reference.double(), dim=-1).mean())


def ranking(x: Tensor, reference: Tensor) -> float:
    """Spearman's correlation of all pairs' similarities with those of the float model."""
    upper = torch.triu_indices(len(x), len(x), 1)
    similar = [F.normalize(e.double(), dim=-1) for e in (x, reference)]
    ranks = [(e @ e.T)[upper[0], upper[1]].argsort().argsort().double() for e in similar]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
