"""What the checks of serializers work with: files of a few tensors, written and read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fewbits.api import Result, quantize
from fewbits.checkpoint.serializer import Entry, Header, Serializer, Writer
from fewbits.testing.environment import Snapshot, snapshot
from fewbits.testing.models import SmallModel

#: One of each kind.
TENSORS = {
    "layers.0.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layers.0.bias": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "mask": torch.tensor([[True, False]]),
    "nothing": torch.empty(0, 5),
}


@attrs.frozen
class SerializerSetup:
    """A serializer to check.

    Attributes:
        recipe: the one that was given; never used itself.
        suffix: how the names of its files end.
        examples: how many a check that draws them looks at.
    """

    recipe: Serializer
    suffix: str
    examples: int

    def make(self) -> Serializer:
        """A copy."""
        return copy.deepcopy(self.recipe)

    def path(self, there: Path) -> Path:
        """Where to write a file in a folder."""
        return there / f"model{self.suffix}"

    def begin(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Writer:
        """A writer that is told of somewhat longer metadata than it will get."""
        announced = {key: value + " " * 9 for key, value in (metadata or {"key": "value"}).items()}
        return self.make().writer(path, Header(entries(stored), announced))

    def write(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Snapshot:
        """Write a whole file.

        Returns:
            what is read back of it before it is closed.
        """
        with self.begin(path, stored, metadata) as writer:
            put(writer, stored)
            reader = writer.seal(metadata or {})
            read = snapshot({name: reader.read(name) for name in reader.entries})
            writer.close()
        return read

    def read(self, path: Path) -> Snapshot:
        """Every tensor of a file."""
        reader = self.make().reader(path)
        return snapshot({name: reader.read(name) for name in reader.entries})

    def quantized(self) -> Result:
        """A model that is quantized, for this serializer."""
        return quantize(SmallModel(), "int8", serializer=self.make(), validate=False)


def entries(stored: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What a header says of these tensors."""
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}


def put(writer: Writer, stored: Mapping[str, Tensor]) -> None:
    """Write all tensors, the last one first: any order must do."""
    for name in reversed(list(stored)):
        writer.write(name, stored[name])
