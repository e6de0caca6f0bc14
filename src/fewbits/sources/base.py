"""`Source` and `Target`: tensors come out of the one by name and go into the other by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import Measurement
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger, LedgerRow


class Target(ABC):
    """Takes the stored form of each tensor and ends up as the result."""

    @abstractmethod
    def put(self, row: LedgerRow, value: Value, measurement: Measurement | None) -> None:
        """Take the stored form of one row, which is not an alias."""

    @abstractmethod
    def finish(self) -> object:
        """The result: a module, or a mapping."""

    @abstractmethod
    def value(self, name: str) -> Value:
        """The stored form of one tensor of the finished result."""


class Source(ABC):
    """Something to quantize.

    Attributes:
        infos: one for every tensor in it, in its own order.
        architecture: the class of the model; None if unknown.
        extra: strings to carry over into the result's file.
    """

    infos: tuple[TensorInfo, ...]
    architecture: str | None = None
    extra: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor in its current state."""

    @abstractmethod
    def prepared(self) -> object:
        """The return value of `Quantizer.prepare`."""

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Read one chunk of a tensor, in the shape that `Chunk.described` gives."""
        tensor = self.read(name)
        if chunk.is_whole:
            return tensor
        matrix = WeightMatrix(tensor, chunk.row.layout or Layout.of(tensor.shape, inputs=()))
        return matrix.read(*chunk.rows).reshape(chunk.described().shape)

    def module(self) -> nn.Module | None:
        """The model to run for calibration; None if the source has no model."""
        return None


class LiveSource(Source):
    """A model or a state dict: it is in memory, and so is its result.

    Attributes:
        inplace: whether the result replaces it.
        unstorable: state of the source that a file of fewbits cannot hold, in words.
    """

    inplace: bool = False
    unstorable: Sequence[str] = ()

    @abstractmethod
    def target(self, ledger: Ledger) -> Target:
        """Begin a result."""
