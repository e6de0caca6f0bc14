"""Put the tensors of a file into a model, and find values for buffers that the file lacks.

Until all tensors are known to fit, the model does not change: it is tried with weights that take no memory, and buffers
are initialized in copies whose parameters have no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.errors import ArgumentError, SourceError
from fewbits.kernels.base import Compute
from fewbits.nn.packed import PackedWeight, store
from fewbits.nn.swap import attach, attached
from fewbits.nn.walk import Slot, deep_copy, slots
from fewbits.numerics.tensor import same_bits
from fewbits.selection.row import LedgerRow

#: A device, as torch takes it.
Device = str | torch.device | int

#: Returns the stored form of a tensor, by its name.
ReadValue = Callable[[str], Value]

#: Sets the buffers of a module.
InitBuffers = Callable[[nn.Module], object]

_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Place:
    """The place of one tensor of a file in a model.

    Attributes:
        row: the tensor's row in the ledger.
        slots: all slots that take the tensor, at least one. They share it from then on.
        device: the device that the tensor goes to.
        in_place: whether the tensor is written into the memory of the parameter, because others hold that memory too.
    """

    row: LedgerRow
    slots: Sequence[Slot]
    device: torch.device
    in_place: bool

    @classmethod
    def of(cls, row: LedgerRow, taken: Sequence[Slot], device: torch.device | None, *, held_elsewhere: bool) -> Place:
        """The place of a row.

        Args:
            row: the tensor's row in the ledger.
            taken: the slots.
            device: the device; None means that of the first slot, or the CPU if that is the meta device.
            held_elsewhere: whether others hold the memory of one of the slots.
        """
        there = taken[0].tensor.device
        device = device or (_CPU if there.type == "meta" else there)
        held = [(slot.tensor.device, slot.tensor.dtype) for slot in taken if slot.is_parameter]
        return cls(row, taken, device, held_elsewhere and held[:1] == [(device, row.dtype)])

    def may_alias(self, compute: Compute) -> bool:
        """Whether a value put here may alias a mapped file: on the CPU, in the weight layout of files.

        To ask the layers for their weight layout, a weight without memory is put into the slots and taken out again.

        Raises:
            SourceError: if a module would not read its quantized weight.
        """
        if self.row.spec is None:
            return self.device == _CPU
        weight = store(CODEC.without_memory(self.row), self.row.dtype)
        with attached(self._parameters, weight):
            return self.device == _CPU and (not isinstance(weight, PackedWeight) or weight.stays(compute))

    def put(self, value: Value, compute: Compute, *, reuse_memory: bool) -> None:
        """Put a value into all slots, on their device and in the weight layout of their layers.

        Args:
            value: A value in the CPU's memory.
            compute: how the layers may compute; see `fewbits.set_compute`.
            reuse_memory: whether the value's memory may be written to, because nothing else holds it.
        """
        if self.row.spec is not None:
            weight = store(value, self.row.dtype).to(self.device)
            buffers = [slot for slot in self.slots if not slot.is_parameter]  # a file may hold buffers as codes
            tensor = weight.dequantize() if buffers else None
            for slot in buffers:
                setattr(slot.module, slot.local, tensor)
            for slot in self._parameters:
                attach(slot.module, slot.local, weight)
            if self._parameters and isinstance(weight, PackedWeight):
                weight.prepack(compute, reuse_memory=reuse_memory)
        elif isinstance(value, Tensor):
            self._keep(value.to(self.device))

    @property
    def _parameters(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.is_parameter]

    def _keep(self, tensor: Tensor) -> None:
        held = [slot.tensor for slot in self._parameters]
        if held and not held[0].is_meta:
            # Keep the parameter object, and its memory if others hold that, so that their references stay valid.
            parameter = held[0]
            if self.in_place:
                parameter.data.copy_(tensor)
            else:
                parameter.data = tensor
        else:
            parameter = nn.Parameter(tensor, requires_grad=any(tensor.requires_grad for tensor in held))
        for slot in self.slots:
            setattr(slot.module, slot.local, parameter if slot.is_parameter else tensor)


def fill(value: ReadValue, read: ReadValue, places: Sequence[Place], compute: Compute) -> None:
    """Put the tensors of a file into a model.

    If every tensor may stay in the mapped file, all alias it, except those copied into memory that the model has. If
    not, nothing is mapped: each tensor is read into memory of its own, moved to its device and prepacked before the
    next one is read.

    Args:
        value: returns the stored form of a tensor by its name; it may alias the mapped file.
        read: returns the same in memory of its own.
        places: the place of each tensor of the file.
        compute: how the layers may compute; see `fewbits.set_compute`.

    Raises:
        SourceError: if a module would not read its quantized weight. The model is unchanged then.
        CheckpointError: if the file cannot be read any more.
    """
    # Every place is tried before the first is filled, so that an error leaves the model unchanged.
    able = [place.may_alias(compute) for place in places]
    aliasing = all(able)
    # Tensors that are only copied are read by position too: pages of a mapped file would stay in memory.
    mapped = {place.row.name: value(place.row.name) for place in places if aliasing and not place.in_place}
    for place in places:
        if (found := mapped.pop(place.row.name, None)) is not None:
            place.put(found, compute, reuse_memory=False)
        else:
            place.put(read(place.row.name), compute, reuse_memory=True)


def usable(device: object) -> torch.device:
    """The device of this name, as tensors name it.

    Raises:
        ArgumentError: if torch knows none of that name, has none here, or it is the meta device.
    """
    try:
        found: torch.device = torch.empty(0, device=device).device  # type: ignore[call-overload]
    except Exception as error:  # a missing backend may raise anything
        why = str(error).strip().split("\n")[0]
        raise ArgumentError(f"device={device!r} cannot be used here ({why}); give another, such as 'cpu'") from error
    if found.type == "meta":
        raise ArgumentError("device='meta' would hold no numbers; `into` may be there, a loaded model may not")
    return found


def move_others(model: nn.Module, device: torch.device) -> None:
    """Move non-persistent buffers to the device; no file has filled them."""
    moved: dict[int, Tensor] = {}
    for slot in slots(model):
        tensor = slot.tensor
        if tensor.device != device:
            slot.module._buffers[slot.local] = moved.setdefault(id(tensor), tensor.to(device))


def initial_values(
    model: nn.Module, buffers: Sequence[Slot], init_buffers: InitBuffers | None
) -> tuple[dict[tuple[int, str], Tensor], list[str]]:
    """Find values for buffers on the meta device, as `_init_weights` of the model and then `init_buffers` set them.

    Two copies of the model are initialized, one with zeros in these buffers and one with ones. If a buffer is not the
    same in both, nothing has set it, or only a part of it, or its values are random.

    Args:
        model: the model, which does not change.
        buffers: buffers of the model; all are on the meta device.
        init_buffers: called with the copy of each module that holds some of the buffers.

    Returns:
        the values by `Slot.key`, and a problem for each buffer that got none.
    """
    if not buffers:
        return {}, []
    try:
        runs = [_initialized(model, buffers, init_buffers, fill) for fill in (0, 1)]
    except SourceError as error:
        runs = [({}, {_path(slot): f" ({error})" for slot in buffers})] * 2
    (first, why), (second, _) = runs
    values = {}
    problems = []
    for slot in buffers:
        value, other = first.get(slot.name), second.get(slot.name)
        if value is not None and other is not None and not value.is_meta and same_bits(value, other):
            values[slot.key] = value
        else:
            problems.append(
                f"{slot.name} is a buffer that no state dict holds, and is on the meta device"
                f"{why.get(_path(slot), '')}; build the model on the CPU, or give a function that sets it as "
                "init_buffers="
            )
    return values, problems


def _initialized(
    model: nn.Module, buffers: Sequence[Slot], init_buffers: InitBuffers | None, fill: int
) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """The buffers of an initialized copy by name, and the reasons for which `_init_weights` failed, by module."""
    memory = {id(slot.tensor): torch.full_like(slot.tensor, fill, device="cpu") for slot in buffers}
    failures = {}
    with torch.no_grad(), torch.device("cpu"):
        copied = _copy_without_memory(model, memory)
        modules = {path: copied.get_submodule(path) for path in map(_path, buffers)}
        for path, module in modules.items():
            try:
                _init_weights_around(copied, path)(module)
            except Exception as error:  # another library's code may raise anything for a model without memory
                failures[path] = f" ({type(error).__name__} in its _init_weights: {error})"
            if init_buffers is not None:
                init_buffers(module)
    return {slot.name: modules[_path(slot)]._buffers.get(slot.local) for slot in buffers}, failures


def _init_weights_around(model: nn.Module, path: str) -> Callable[[nn.Module], object]:
    """`_init_weights` of the nearest module around this one that has it, as all models of transformers do."""
    while True:
        method = getattr(model.get_submodule(path), "_init_weights", None)
        if callable(method):
            return method  # type: ignore[no-any-return]
        if not path:
            return lambda module: None
        path = path.rpartition(".")[0]


def ties(model: nn.Module, names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Which of these names `tie_weights` of the model would tie to which of the others."""
    with contextlib.suppress(Exception):  # another library's code may raise anything; then there is no advice
        copied: Any = _copy_without_memory(model, {})
        copied.tie_weights()
        held = {slot.name: id(slot.tensor) for slot in slots(copied)}
        known = {held[name]: name for name in others if name in held}
        return {name: known[held[name]] for name in names if held.get(name) in known}
    return {}


def _copy_without_memory(model: nn.Module, memory: dict[int, Tensor]) -> nn.Module:
    """Copy a model to the meta device, except the tensors for which `memory` has one, by the id of the original."""
    memo: dict[int, Any] = {}
    for slot in slots(model):
        tensor = slot.tensor
        if not nn.parameter.is_lazy(tensor):
            empty = memory.get(id(tensor), torch.empty_like(tensor, device="meta"))
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if slot.is_parameter else empty
    return deep_copy(model, memo, otherwise="build it on the CPU")


def _path(slot: Slot) -> str:
    return slot.name.rpartition(".")[0]
