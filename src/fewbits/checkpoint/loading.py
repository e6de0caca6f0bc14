"""`load`: a fewbits file as a mapping, or into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from fewbits._heap import trim
from fewbits.checkpoint.reading import Check, Checkpoint
from fewbits.checkpoint.saving import Value
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, MismatchError
from fewbits.kernels.base import Compute
from fewbits.kernels.choose import check_compute
from fewbits.kernels.forms import Words
from fewbits.nn.classes import rounds_inputs
from fewbits.nn.compute import set_compute
from fewbits.nn.layouts import layout_of
from fewbits.nn.obstacles import held_beside, obstacle_to
from fewbits.nn.stored import PackedWeight, StoredWeight, store
from fewbits.nn.swap import attach, refuse_quantized
from fewbits.nn.walk import Slot, parent_of, slots
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import LedgerRow

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def load(
    path: str | os.PathLike[str], *, into: None = None, check: Check = "digests", serializer: Serializer | None = None
) -> dict[str, Value]: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: _Model,
    check: Check = "digests",
    serializer: Serializer | None = None,
    compute: Compute = "auto",
) -> _Model: ...
def load(
    path: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    check: Check = "digests",
    serializer: Serializer | None = None,
    compute: Compute = "auto",
) -> dict[str, Value] | nn.Module:
    """Load what fewbits wrote. Nothing is ever unpickled.

    Codes alias the mapped file until a layer's kernels ask for another form; where any does, the file is let go of.

    Args:
        path: the file, or the directory of several, or the index in it.
        into: a float model of the same architecture, which may live on the meta device; its layers become quantized
            in place. None loads a mapping from name to `QuantizedTensor` or `torch.Tensor`.
        check: ``"digests"`` compares the SHA-256 of every tensor; ``"header"`` trusts the payload.
        serializer: reads the file; None stands for safetensors.
        compute: what the layers of `into` may do to be fast; see `fewbits.set_compute`.

    Returns:
        `into`, or the mapping.

    Raises:
        FormatError: if the file was not written by fewbits, or its parts contradict one another.
        DigestError: if a byte of it has changed; the message names the tensors.
        ArgumentError: if `into` is not a model, or `compute` no setting.
        MismatchError: if file and model do not fit; the message names every tensor. The model is unchanged then.
        CheckpointError: if the file cannot be opened.
    """
    check_compute(compute)
    checkpoint = Checkpoint(path, serializer)
    if into is None:
        checkpoint.check(check)
        return checkpoint.values()
    if not isinstance(into, nn.Module):
        raise ArgumentError(f"into= takes a model, not a {type(into).__name__}; without it a mapping is returned")
    refuse_quantized(into, MismatchError)
    checkpoint.check(check)
    beside = held_beside(into)
    places = _places(checkpoint, into, beside)
    # All are read before the first is put: a file that fails here leaves the model as it was.
    values = [(row, checkpoint.value(row.name)) for row in checkpoint.ledger.stored]
    for row, value in values:
        if taken := places[row.name]:
            _put(row, value, taken, held_elsewhere=any(slot.name in beside for slot in taken))
    set_compute(into, compute)
    _let_go(into, [value for _, value in values])
    trim(holes=0)
    return into


def _let_go(model: nn.Module, values: Sequence[Value]) -> None:
    """Copy what still aliases the file if some weights do not any more: the whole file would stay in memory for it."""
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    if all(isinstance(weight.form(), Words) for weight in weights):
        return
    parts = [value.parts().values() if isinstance(value, QuantizedTensor) else [value] for value in values]
    mapped = {tensor.untyped_storage().data_ptr() for tensors in parts for tensor in tensors}

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in mapped else tensor

    for module in model.modules():
        if isinstance(module, StoredWeight):
            module._apply(own)
    copies: dict[int, Tensor] = {}
    for slot in slots(model):
        if slot.is_parameter:
            slot.tensor.data = own(slot.tensor.data)
        elif not isinstance(slot.module, StoredWeight):
            slot.module._buffers[slot.local] = copies.setdefault(id(slot.tensor), own(slot.tensor))


def _places(checkpoint: Checkpoint, model: nn.Module, beside: Mapping[str, str]) -> dict[str, list[Slot]]:
    """Where each stored row goes: the slots of its own name, of its aliases, and of what the model ties to them."""
    rows = {row.name: row for row in checkpoint.ledger.present}
    by_name = {slot.name: slot for slot in slots(model)}
    places: dict[str, list[Slot]] = {row.name: [] for row in checkpoint.ledger.stored}
    home = {id(by_name[name].tensor): row.holder for name, row in rows.items() if name in by_name}
    problems = [f"{name} is in the file, not in the model" for name in rows if name not in by_name]
    takers: dict[tuple[int, str], str] = {}
    for name, slot in by_name.items():
        row = rows.get(name)
        # A name that the file lacks is filled all the same if the model ties it to one that the file has.
        stored = home.get(id(slot.tensor)) if row is None else row.holder
        if stored is not None:
            first = takers.get(slot.key)
            if first is None:  # a module at two paths is filled once
                takers[slot.key] = stored
                places[stored].append(slot)
            elif first != stored and not same_bits(checkpoint.value(first), checkpoint.value(stored)):
                problems.append(f"{first} and {name} are one tensor in the model, two different ones in the file")
            problems += _misfits(rows[stored], slot, beside.get(name))
        elif slot.persistent:
            problems.append(f"{name} is in the model, not in the file")
        elif slot.tensor.is_meta:
            problems.append(
                f"{name} is a buffer that no state dict holds, and is on the meta device; build the model on the CPU"
            )
    problems += [problem for row in checkpoint.ledger for problem in _unrounded(row, places.get(row.name, ()), model)]
    if problems:
        raise MismatchError(f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    return places


def _misfits(row: LedgerRow, slot: Slot, beside: str | None) -> list[str]:
    if nn.parameter.is_lazy(slot.tensor):
        return [f"{slot.name} is not initialized in the model; run it once before loading"]
    if tuple(slot.tensor.shape) != row.shape:
        return [f"{slot.name} has shape {row.shape} in the file, {tuple(slot.tensor.shape)} in the model"]
    if slot.tensor.is_floating_point() != row.dtype.is_floating_point:
        return [f"{slot.name} is {dtype_name(row.dtype)} in the file, {dtype_name(slot.tensor.dtype)} in the model"]
    obstacle = None if row.spec is None else beside or obstacle_to(slot.module, slot.local)
    return (
        [f"{slot.name} is {row.scheme} in the file, but {obstacle}: exclude it, or load without into="]
        if obstacle
        else []
    )


def _unrounded(row: LedgerRow, places: Sequence[Slot], model: nn.Module) -> list[str]:
    """Whether the file says that a layer rounds its inputs, and none of those that take the weight does."""
    if row.spec is None or row.spec.activations is None or not places:
        return []
    rounding = [slot for slot in places if rounds_inputs(slot.module, slot.local, parent_of(model, slot))]
    if rounding and all(layout_of(slot.module, slot.local, slot.tensor)[0] == row.layout for slot in rounding):
        return []
    why = "is cut along other inputs" if rounding else "does not round its inputs"
    return [
        f"{row.name} is {row.scheme} in the file, but {type(places[0].module).__name__} {why}: "
        f"quantize it with overrides={{{row.name!r}: {{'activations': None}}}}"
    ]


def _put(row: LedgerRow, value: Value, places: Sequence[Slot], *, held_elsewhere: bool) -> None:
    """Put one value into all its places; they share it from then on."""
    device = places[0].tensor.device if not places[0].tensor.is_meta else torch.device("cpu")
    if row.spec is not None:
        stored = store(value, row.dtype).to(device)
        for slot in places:
            attach(slot.module, slot.local, stored)
    elif isinstance(value, Tensor):
        value = value.to(device)
        held = [slot.tensor for slot in places if slot.is_parameter]
        if held and not held[0].is_meta:
            # The same object, and where others hold its memory the same memory: they stay true.
            if held_elsewhere and held[0].dtype == value.dtype:
                held[0].data.copy_(value)
            else:
                held[0].data = value
            parameter = held[0]
        else:
            parameter = nn.Parameter(value, requires_grad=any(tensor.requires_grad for tensor in held))
        for slot in places:
            setattr(slot.module, slot.local, parameter if slot.is_parameter else value)
