"""Put a result of fewbits into a model while ``from_pretrained`` loads it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._heap import trim
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.digests import refuse_damaged
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import MismatchError
from fewbits.formats.places import misfits, unrounded
from fewbits.formats.renamed import Renaming, has_names_of
from fewbits.nn.packed import PackedWeight, store
from fewbits.nn.swap import attach
from fewbits.nn.walk import Slot, slots
from fewbits.numerics.tensor import QuantizedTensor, in_memory, tensor_bytes

_core: Any = importlib.import_module("transformers.core_model_loading")

#: The only pattern of `_Entries`, under which transformers finds it.
_PATTERN = "fewbits"


@attrs.frozen(eq=False)
class Waiting:
    """Quantized weights that wait for the end of loading.

    Until then, the model has parameters without memory in their places. So transformers ties them, reports them, and
    leaves them alone, as it does with any loaded parameter.

    Attributes:
        held: each such parameter with its value, by the id of the parameter.
    """

    held: dict[int, tuple[nn.Parameter, Value]] = attrs.field(factory=dict)

    def add(self, value: Value, like: Tensor) -> nn.Parameter:
        """Return a parameter without memory in place of a value.

        Args:
            value: the stored form of the weight.
            like: the parameter of the model.
        """
        if isinstance(value, QuantizedTensor):
            value = attrs.evolve(value, dtype=like.dtype)
        shape = tuple(value.shape)
        place = nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=like.requires_grad)
        self.held[id(place)] = place, value
        return place

    def attach(self, model: nn.Module, *, reuse_memory: bool) -> None:
        """Put the weights into the layers, in the memory layouts of their kernels.

        Args:
            model: the model.
            reuse_memory: whether the memory of the values may be overwritten, because nothing else holds it.

        Raises:
            SourceError: if a module would not read its quantized weight.
        """
        places: dict[int, dict[tuple[int, str], Slot]] = {}
        for slot in slots(model):
            if slot.is_parameter and id(slot.tensor) in self.held:
                places.setdefault(id(slot.tensor), {})[slot.key] = slot
        for key, taken in places.items():
            place, value = self.held.pop(key)
            stored = store(value, place.dtype)
            for slot in taken.values():
                attach(slot.module, slot.local, stored)
            if isinstance(stored, PackedWeight):
                stored.prepack("auto", reuse_memory=reuse_memory)
        self.held.clear()
        trim(holes=0)


class ResultLoader:
    """Decodes the tensors that transformers reads from a result.

    Args:
        model: the model, with float parameters on the meta device.
        files: the files of the result.
        transforms: transformers' renamings and converters for the model.
        waiting: takes the quantized weights.

    Raises:
        FormatError: if the files are no result of fewbits.
        MismatchError: if the model cannot take a quantized weight.
    """

    def __init__(self, model: Any, files: Sequence[str], transforms: Sequence[Any], waiting: Waiting) -> None:
        folder = Path(files[0]).parent
        self._checkpoint = Checkpoint(folder if len(files) > 1 else files[0])
        self._checkpoint.check("header")
        self._model, self._waiting = model, waiting
        ledger = self._checkpoint.ledger
        self._renaming = Renaming(model, ledger, [] if has_names_of(model, ledger) else transforms)
        self._slots = {slot.name: slot for slot in slots(model)}
        self._refuse_misfits()
        self.targets = self._find_targets()

    def _refuse_misfits(self) -> None:
        ledger = self._renaming.ledger
        taken = {row.name: self._slots[row.name] for row in ledger.stored if row.name in self._slots}
        problems = [
            problem
            for name, slot in taken.items()
            if ledger[name].spec
            for problem in misfits(ledger[name], slot, None)
        ]
        places = {name: [slot] for name, slot in taken.items()}
        problems += [problem for row in ledger for problem in unrounded(row, places.get(row.name, ()), self._model)]
        if problems:
            raise MismatchError(
                f"{self._checkpoint.path} does not fit {type(self._model).__name__}: {'; '.join(problems)}"
            )

    def _find_targets(self) -> dict[str, str]:
        """Map the name of each tensor in the files to the first parameter that it is for."""
        renaming, source = self._renaming, self._checkpoint.ledger
        pairs = [(holder, name) for name, holder in renaming.origin.items()]
        for conversion in renaming.plan.conversions:
            pairs += [(source[name].holder, conversion.target) for name in conversion.names]
        targets = dict(pairs)
        if several := [holder for holder, target in pairs if targets[holder] != target]:
            raise MismatchError(
                f"{several[0]} is for several parameters of {type(self._model).__name__}; load the result with "
                "fewbits.load(path, into=model)"
            )
        return {entry: target for holder, target in targets.items() for entry in CODEC.entries(source[holder])}

    def convert(self, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode the tensors for a parameter, and for others that are made of the same tensors.

        Args:
            target: the name of the first parameter.
            tensors: tensors of the files, by their names there.

        Raises:
            DigestError: if a byte has changed.
        """
        digests = self._checkpoint.metadata.digests
        refuse_damaged(
            [name for name, tensor in tensors.items() if _digest(tensor) != digests[name]], self._checkpoint.path
        )
        source, renaming = self._checkpoint.ledger, self._renaming
        names = (
            [target]
            if target in renaming.origin
            else [name for name, made in renaming.made.items() if made.conversion.target == target]
        )
        loaded: dict[str, Tensor] = {}
        for name in names:
            value = renaming.value(name, lambda row: CODEC.decode(source[row], tensors.__getitem__))
            tied = [row.name for row in renaming.ledger.present if row.holder == name and row.name in self._slots]
            loaded |= dict.fromkeys(tied, self._loaded(name, value))
        return loaded

    def _loaded(self, name: str, value: Value) -> Tensor:
        slot, row = self._slots[name], self._renaming.ledger[name]
        if row.spec is not None and slot.is_parameter:
            return self._waiting.add(value, slot.tensor)
        tensor = value if isinstance(value, Tensor) else value.dequantize()
        return tensor.to(slot.tensor.dtype)

    def converter(self) -> Any:
        """Return a converter through which transformers gives all tensors of the files to this loader."""
        return _Entries(self)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(in_memory(tensor))).hexdigest()


class _Unchanged(_core.ConversionOps):  # type: ignore[misc]
    """A converter must have an operation."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return input_dict


class _Entries(_core.WeightConverter):  # type: ignore[misc]
    """Gives the tensors of a result to a `ResultLoader`, one parameter at a time."""

    def __init__(self, loader: ResultLoader) -> None:
        super().__init__([_PATTERN], [_PATTERN], [_Unchanged()])
        self.loader = loader

    def __deepcopy__(self, memo: dict[int, Any]) -> _Entries:
        return type(self)(self.loader)  # transformers makes one for each parameter

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.loader.targets.get(source_key)
        return (source_key, None) if target is None else (target, _PATTERN)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        self.collected_tensors[source_key].append(future)

    def convert(self, layer_name: str, **_: Any) -> dict[str, Tensor]:
        return self.loader.convert(layer_name, {name: found[0] for name, found in self.materialize_tensors().items()})
