"""`MappingSource`: a state dict as source. Its result is a mapping."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.saving import plain_value
from fewbits.checkpoint.serializer import Entry
from fewbits.checkpoint.state_dicts import advice
from fewbits.errors import ArgumentError, SourceError
from fewbits.formats.foreign import refuse_foreign
from fewbits.formats.fp8 import ScaledWeight, scaled_weights
from fewbits.nn.eligibility import quantized_elsewhere
from fewbits.nn.storage import View, overlaps
from fewbits.numerics.plain import plain
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import LiveSource, Target
from fewbits.sources.entries import entry_infos


class MappingSource(LiveSource):
    """A state dict, or any mapping from name to tensor.

    Tensors are described without module classes, so a file with the same tensors gives the same result.
    """

    def __init__(self, tensors: Mapping[str, object], *, inplace: bool) -> None:
        if inplace and not isinstance(tensors, MutableMapping):
            raise ArgumentError(f"inplace=True needs a mapping that can be changed, not {type(tensors).__name__}")
        self.inplace = inplace
        self._given = tensors
        checked = _checked(tensors)
        entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in checked.items()}
        refuse_foreign(entries)
        self._scaled = scaled_weights(entries)
        storages = {name: View.of(tensor) for name, tensor in checked.items()}
        overlapping = overlaps(storages)
        self.infos = tuple(entry_infos(entries, self._scaled, storages, overlapping))

    def read(self, name: str) -> Tensor:
        """Return the mapping's current tensor of this name. FP8 weights with scales are dequantized to bfloat16.

        Raises:
            SourceError: if the tensor has been removed from the mapping.
            NumericsError: if its codes and scales cannot be dequantized.
        """
        weight = self._scaled.get(name)
        return self._tensor(name) if weight is None else self._dequantized(weight, 0, weight.entry.shape)

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Return a chunk of one tensor; of an FP8 weight with scales, only this chunk is dequantized."""
        weight = self._scaled.get(name)
        if weight is None:
            return super().read_chunk(name, chunk)
        return self._dequantized(weight, chunk.start, chunk.described().shape)

    def _dequantized(self, weight: ScaledWeight, first: int, shape: tuple[int, ...]) -> Tensor:
        flat = {}
        for name, entry in ((weight.name, weight.entry), (weight.scale, weight.scale_entry)):
            tensor = self._tensor(name)
            if Entry(tuple(tensor.shape), tensor.dtype) != entry:
                raise SourceError(f"{name} has another shape or dtype than when it was prepared; prepare it again")
            flat[name] = tensor.reshape(-1)
        device = flat[weight.name].device

        def elements(name: str, start: int, size: tuple[int, ...]) -> Tensor:
            return flat[name][start : start + size[0]].to(device)

        return weight.read(elements, first, shape, device)

    def _tensor(self, name: str) -> Tensor:
        tensor = self._given.get(name)
        if not isinstance(tensor, Tensor):
            raise SourceError(f"{name} has been removed from the mapping since it was prepared; prepare it again")
        return plain(tensor, name)

    def prepared(self) -> Mapping[str, object]:
        """Return the given mapping; a mapping cannot be run."""
        return self._given

    def target(self, ledger: Ledger) -> Target:
        """Create the target: a new dict, or the mapping itself if in place.

        Raises:
            SourceError: if the mapping has gained tensors since it was prepared.
        """
        added = sorted(map(str, self._given.keys() - {row.name for row in ledger}))
        if added:
            raise SourceError(f"the mapping has gained {', '.join(added)} since it was prepared; prepare it again")
        return _MappingTarget(self._given, ledger, inplace=self.inplace)


class _MappingTarget(Target):
    def __init__(self, given: Mapping[str, object], ledger: Ledger, *, inplace: bool) -> None:
        self._given, self._inplace = given, inplace
        self._values: MutableMapping[str, object] = given if inplace and isinstance(given, MutableMapping) else {}
        self._names = ledger.names_by_holder()
        self._merged = {row.merged_into: row.name for row in ledger if row.merged_into is not None}

    def put(self, row: LedgerRow, value: Value) -> None:
        as_it_was = row.fate == "kept" and row.dequantized_from is None
        if self._inplace and as_it_was:
            return
        if isinstance(value, Tensor) and as_it_was:
            value = value.clone()
        for name in self._names[row.name]:
            self._values[name] = value
            if name in self._merged:
                # In place, the old scale beside the new value would be misread as part of it.
                self._values.pop(self._merged[name], None)

    def finish(self) -> object:
        if not self._inplace:  # put the names in their order
            gone = set(self._merged.values())
            self._values = {name: self._values[name] for name in self._given if name not in gone}
        return self._values

    def value(self, name: str) -> Value:
        value = self._values.get(name)
        if not isinstance(value, (QuantizedTensor, Tensor)):
            raise SourceError(f"{name} has been removed from the quantized mapping")
        return plain_value(name, value)


def _checked(tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """The mapping's entries as plain tensors, by name. A tensor that has two names is one object here too.

    Raises:
        SourceError: if an entry is not a plain tensor, or its key is not a string; the message names the entry.
    """
    checked: dict[str, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            raise SourceError(f"{name} is quantized already; dequantize() it first")
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            hint = advice(tensors, Tensor)
            raise SourceError(
                f"the entry {name!r} is a {type(tensor).__name__}; a state dict maps names to tensors{hint}"
            )
        if problem := quantized_elsewhere(name, tensor):
            raise SourceError(problem)
        # `seen` also holds the given tensor. A mapping may create tensors on access, and Python reuses a freed id.
        _, checked[name] = seen.setdefault(id(tensor), (tensor, plain(tensor, name)))
    return checked
