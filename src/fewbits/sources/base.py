"""`Source` provides tensors by name; `Target` takes their stored forms by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


class Target(ABC):
    """Collects the stored form of each tensor into the result."""

    @abstractmethod
    def put(self, row: LedgerRow, value: Value) -> None:
        """Add the stored form of one row; the row is not an alias."""

    @abstractmethod
    def finish(self) -> object:
        """Return the result: a module or a mapping."""

    @abstractmethod
    def value(self, name: str) -> Value:
        """Return the stored form of one tensor of the finished result."""

    def tuned(self) -> Mapping[str, int]:
        """Return how often each tensor of the result was tuned, by name; only a model can be tuned."""
        return {}


class Source(ABC):
    """A model, state dict or checkpoint to quantize.

    Attributes:
        infos: one entry per tensor, in the source's order.
        inplace: whether the result replaces the source.
        architecture: the class of the model; None if unknown.
        extra: strings to copy into the metadata of the result's file.
    """

    infos: tuple[TensorInfo, ...]
    inplace: bool = False
    architecture: str | None = None
    extra: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return the current value of one tensor."""

    @abstractmethod
    def prepared(self) -> object:
        """Return the object that `Quantizer.prepare` returns."""

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Return a chunk of one tensor, in the shape of `Chunk.described`."""
        tensor = self.read(name)
        if chunk.is_whole:
            return tensor
        matrix = WeightMatrix(tensor, chunk.row.layout or Layout.of(tensor.shape, inputs=()))
        return matrix.read(*chunk.rows).reshape(chunk.described().shape)

    def module(self) -> nn.Module | None:
        """Return the model to run for calibration; None if the source is not a model."""
        prepared = self.prepared()
        return prepared if isinstance(prepared, nn.Module) else None


class LiveSource(Source):
    """A source in memory (a model or a state dict), whose result is also in memory.

    Attributes:
        unstorable: descriptions of state in the source that a fewbits file cannot store.
    """

    unstorable: Sequence[str] = ()

    @abstractmethod
    def target(self, ledger: Ledger) -> Target:
        """Create the target that collects the result."""
