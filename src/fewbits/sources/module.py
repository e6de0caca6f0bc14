"""`ModuleSource`: a model as source. Its result is a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.saving import plain_value
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import SourceError
from fewbits.formats.foreign import refuse_foreign
from fewbits.formats.fp8 import scaled_weights
from fewbits.nn.eligibility import held_beside, layout_of, obstacle_to, refuse_unfit, rounds_inputs
from fewbits.nn.packed import store
from fewbits.nn.storage import View, overlaps
from fewbits.nn.stored import stored_weights
from fewbits.nn.swap import attach, refuse_save_pretrained
from fewbits.nn.walk import Slot, find, parent_of, slots, structural_copy, tuned_tensors
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.plain import plain
from fewbits.selection.info import TensorInfo, numeric_obstacle
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import LiveSource, Target


class ModuleSource(LiveSource):
    """A model. Unless `inplace`, the prepared model is a copy of its modules that shares the parameters' memory."""

    def __init__(self, model: nn.Module, *, inplace: bool) -> None:
        refuse_unfit(model, SourceError)
        found = list(slots(model))
        for slot in found:
            plain(slot.tensor, slot.name)
        _refuse_scaled({slot.name: Entry(tuple(slot.tensor.shape), slot.tensor.dtype) for slot in found})
        self.inplace = inplace
        self.architecture = f"{type(model).__module__}.{type(model).__qualname__}"
        # Look for ties in the given model: in a copy, buffers have their own memory.
        self.infos = describe(model)
        self.unstorable = [
            f"{name or 'the root module'} has extra state (get_extra_state)"
            for name, module in model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        # Keep non-persistent buffers that share no memory with a tensor of the state dict: a forward pass may replace,
        # grow or remove them, as caches do.
        lasting = {info.storage for info in self.infos if info.persistent}
        transient = {info.name for info in self.infos if info.storage not in lasting}
        self._transient = {slot.name: slot.tensor.detach() for slot in found if slot.name in transient}
        self._model = model if inplace else structural_copy(model)

    def read(self, name: str) -> Tensor:
        """Return a tensor of the prepared model: its current value, or a non-persistent buffer's value at `prepare`."""
        transient = self._transient.get(name)
        return plain(find(self._model, name).tensor, name) if transient is None else transient

    def prepared(self) -> nn.Module:
        """Return the model to run and to observe."""
        return self._model

    def target(self, ledger: Ledger) -> Target:
        """Create the target: the prepared model if in place, else a structural copy.

        Raises:
            SourceError: if tensors were added or removed since it was prepared, or are not plain, or copying fails.
        """
        for slot in slots(self._model):
            plain(slot.tensor, slot.name)
        model = self._model if self.inplace else structural_copy(self._model)
        return _ModuleTarget(model, ledger, self._transient, self.inplace)


def describe(model: nn.Module) -> tuple[TensorInfo, ...]:
    """Describe all tensors of a model, which may be on the meta device."""
    found = list(slots(model))
    shared = overlaps({slot.name: View.of(slot.tensor) for slot in found}) | held_beside(model)
    return tuple(_describe(model, slot, shared.get(slot.name)) for slot in found)


def _refuse_scaled(entries: Mapping[str, Entry]) -> None:
    """Refuse a model that holds codes and scales, in FP8 or in a format that fewbits cannot read."""
    refuse_foreign(entries)
    for weight in scaled_weights(entries).values():
        raise SourceError(
            f"{weight.name} is quantized already, in {dtype_name(weight.entry.dtype)} with {weight.scale}, which "
            "the model multiplies by itself; quantize its checkpoint or state dict and load that into a float model"
        )


def _describe(model: nn.Module, slot: Slot, shared: str | None) -> TensorInfo:
    tensor, shape = slot.tensor, tuple(slot.tensor.shape)
    obstacle = "a buffer" if not slot.is_parameter else numeric_obstacle(slot.name, shape, tensor.dtype)
    obstacle = obstacle or shared or obstacle_to(slot.module, slot.local)
    layout, declared = (None, True) if obstacle else layout_of(slot.module, slot.local, tensor)
    return TensorInfo(
        name=slot.name,
        shape=shape,
        dtype=tensor.dtype,
        kind="parameter" if slot.is_parameter else "buffer",
        owner=type(slot.module),
        storage=View.of(tensor),
        layout=layout,
        declared=declared,
        obstacle=obstacle,
        persistent=slot.persistent,
        rounds_inputs=rounds_inputs(slot.module, slot.local, parent_of(model, slot)),
    )


class _ModuleTarget(Target):
    def __init__(self, model: nn.Module, ledger: Ledger, transient: Mapping[str, Tensor], inplace: bool) -> None:
        self._model, self._transient, self._inplace, self._guarded = model, transient, inplace, False
        self._slots = {slot.name: slot for slot in slots(model)}
        self._names = ledger.names_by_holder()
        expected = {row.name for row in ledger} - transient.keys()
        changed = sorted({name for name, slot in self._slots.items() if slot.persistent or name in expected} ^ expected)
        if changed:
            raise SourceError(
                f"the model has gained or lost {', '.join(changed)} since it was prepared; prepare it again"
            )

    def put(self, row: LedgerRow, value: Value) -> None:
        if row.name in self._transient:
            return
        places = {slot.key: slot for slot in (self._slots[name] for name in self._names[row.name])}.values()
        if row.spec is not None:
            stored = store(value, row.dtype)
            floats = [weakref.ref(slot.tensor) for slot in places]
            for slot in places:
                attach(slot.module, slot.local, stored)
            if self._inplace and not self._guarded:  # an interruption leaves a partly quantized model with the user
                refuse_save_pretrained(self._model)
                self._guarded = True
            if not self._inplace and any(weight() is not None for weight in floats):
                raise SourceError(
                    f"something in the model refers to {row.name} besides the module that holds it (a list, another "
                    "attribute), and would go on using the float weight; exclude it, or read it from its module"
                )
        elif not self._inplace and isinstance(value, Tensor) and any(slot.is_parameter for slot in places):
            # Give the same parameter objects new memory, so that other references to them stay valid.
            copy = value.clone()
            for slot in places:
                slot.tensor.data = copy

    def finish(self) -> nn.Module:
        refuse_save_pretrained(self._model)
        return self._model

    def tuned(self) -> Mapping[str, int]:
        return tuned_tensors(self._model)

    def value(self, name: str) -> Value:
        if name in self._transient:
            return self._transient[name]
        slot = find(self._model, name)
        stored = stored_weights(slot.module).get(slot.local)
        return plain_value(name, slot.tensor if stored is None else stored.value())
