"""What the checks of quantizers work with: copies of the scheme, sources, and data to show it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.numerics.spec import QuantSpec
from fewbits.quantizers.base import Quantizer
from fewbits.selection.selector import LayerSelector
from fewbits.testing.models import SmallModel, ids


@attrs.frozen(slots=False)
class QuantizerSetup:
    """A scheme to check.

    Attributes:
        recipe: the quantizer that was given; never used itself.
        examples: how many a check that draws them looks at.
    """

    recipe: Quantizer
    examples: int

    def make(self) -> Quantizer:
        """A quantizer that takes every tensor; only those of Linear layers if its observer needs data."""
        quantizer = copy.deepcopy(self.recipe)
        types = ["Linear"] if quantizer.observer.needs_data else []
        quantizer.selector = LayerSelector(include_types=types, min_elements=1)
        return quantizer

    def make_for_tensors(self) -> Quantizer:
        """A quantizer for sources without classes."""
        quantizer = copy.deepcopy(self.recipe)
        quantizer.selector = LayerSelector(min_elements=1)
        return quantizer

    @cached_property
    def needs_forward(self) -> bool:
        """Whether it takes only models, because it has to see the inputs of layers."""
        quantizer = self.make()
        quantizer.prepare(SmallModel())
        specs = [row.spec for row in quantizer.ledger]
        static = any(isinstance(spec, QuantSpec) and spec.activations == "static" for spec in specs)
        return static or quantizer.observer.needs_data

    def prepared(self, model: nn.Module, *, inplace: bool = False) -> Quantizer:
        """A quantizer that is ready to convert a model and has seen two batches."""
        quantizer = self.make()
        quantizer.prepare(model, inplace=inplace)
        quantizer.observe(batches(model))
        return quantizer

    def converted(self, model: nn.Module, *, inplace: bool = False) -> tuple[Quantizer, Any]:
        """A quantizer and the model that it has quantized."""
        quantizer = self.prepared(model, inplace=inplace)
        return quantizer, quantizer.convert()

    def of_weight(self, weight: Tensor) -> Quantizer:
        """A quantizer that is ready to convert a source with this weight, which it calls ``"weight"``."""
        if self.needs_forward:
            return self.prepared(linear(weight))
        quantizer = self.make_for_tensors()
        # A cast to the weight's own dtype leaves nothing to do, which is an error: hence the other one.
        quantizer.prepare({"weight": weight, "other": torch.ones(2, 32, dtype=torch.float64)})
        return quantizer


def linear(weight: Tensor) -> nn.Linear:
    """A Linear layer with this weight, (outputs, inputs)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def batches(model: nn.Module) -> list[Tensor]:
    """Two batches that a model of the kit takes."""
    if isinstance(model, nn.Linear):
        generator = torch.Generator().manual_seed(1)
        shape = (4, model.in_features)
        return [torch.randn(shape, generator=generator).to(model.weight.dtype) for _ in range(2)]
    return [ids(seed) for seed in range(2)]


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder that goes away at the end."""
    with tempfile.TemporaryDirectory(prefix="fewbits-") as name:
        yield Path(name)
