"""`load`: read a quantized checkpoint, of fewbits or of another tool, as a mapping or into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar, overload

from torch import Tensor, nn

from fewbits._heap import trim
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.filling import Device, InitBuffers, Place, fill, initial_values, move_others, ties, usable
from fewbits.checkpoint.reading import Check, Checkpoint, check_check
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, MismatchError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.registry import open_quantized
from fewbits.formats.renamed import RenamedCheckpoint, named_as_in
from fewbits.kernels.base import Compute
from fewbits.kernels.choose import check_compute
from fewbits.nn.eligibility import compiled_hint, held_beside, layout_of, obstacle_to, refuse_unfit, rounds_inputs
from fewbits.nn.swap import refuse_save_pretrained
from fewbits.nn.walk import Slot, parent_of, slots
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.patterns import Pattern, check_all_used, parse_patterns
from fewbits.selection.row import LedgerRow

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: None = None,
    check: Check = "digests",
    serializer: Serializer | None = None,
    dequantize: bool = False,
) -> dict[str, Value]: ...
@overload
def load(
    path: str | os.PathLike[str],
    *,
    into: _Model,
    check: Check = "digests",
    serializer: Serializer | None = None,
    compute: Compute = "auto",
    device: Device | None = None,
    ignore: Sequence[str] = (),
    init_buffers: InitBuffers | None = None,
) -> _Model: ...
def load(
    path: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    check: Check = "digests",
    serializer: Serializer | None = None,
    dequantize: bool = False,
    compute: Compute = "auto",
    device: Device | None = None,
    ignore: Sequence[str] = (),
    init_buffers: InitBuffers | None = None,
) -> dict[str, Value] | nn.Module:
    """Load a checkpoint of fewbits, compressed-tensors, GPTQ, AWQ, GGUF or block FP8. Nothing is ever unpickled.

    Tensors of a fewbits checkpoint alias the mapped file. There are two exceptions: the kernels of a layer need another
    weight layout than the file's, or a tensor goes to another device than the CPU. Then all tensors are read in the
    order of the files, and each is put into the model before the next one is read. In all cases, memory holds at most
    `into`, the result and one further tensor.

    All checks run before `into` is changed. Reading can still fail later, if the file disappears or memory runs out.
    The model is then partly loaded and must be built again.

    The codes of other tools stay as they are. Their checkpoints have no digests, and their tensors are read into new
    memory. A weight whose columns are in another order (``g_idx``) is dequantized, with its columns in the original
    order.

    Args:
        path: the file, the directory of several files, or the index in it.
        into: a float model of the same architecture, which may be on the meta device; its layers become quantized
            in place. None loads a mapping from name to `QuantizedTensor` or `torch.Tensor`.
        check: ``"digests"`` compares the SHA-256 of every tensor; ``"header"`` checks the header only. In place of
            digests, tensors of another tool are read once before they are loaded into a model.
        serializer: reads a file of fewbits. None means safetensors, and allows checkpoints of other tools.
        dequantize: whether to return a float tensor for each `QuantizedTensor`, for example to quantize it again.
            Needs ``into=None``.
        compute: whether the layers of `into` may trade exactness for speed; see `fewbits.set_compute`.
        device: the device for all tensors of `into`, also for tensors that are not in the file, such as ``"cuda"``.
            None keeps each tensor's device, and moves tensors of the meta device to the CPU.
        ignore: name patterns, as for `LayerSelector`, of tensors in the file that the model may lack. Matching
            non-persistent buffers of the model are not loaded either. All other tensors of the model are loaded.
        init_buffers: called with each module that has non-persistent buffers on the meta device that the file lacks, to
            set them, for example ``lambda module: module.reset_buffers()``. The module is a copy whose parameters have
            no memory. `_init_weights` of a transformers model is called first, and is often enough.

    Returns:
        `into`, or the mapping.

    Raises:
        FormatError: if the checkpoint has no known format, its parts contradict each other, or a weight cannot be read.
        DigestError: if a byte has changed; the message names the tensors.
        ArgumentError: if `into` is not a model; if `compute`, `device` or `init_buffers` is invalid; if `device`,
            `ignore` or `init_buffers` is given without a model; or if a model is given with `dequantize`.
        SelectionError: if a pattern of `ignore` matches no tensor that may stay in the file.
        SourceError: if a module of `into` would not read a quantized weight. The model is unchanged.
        MismatchError: if file and model do not match, or if the model has a quantized module or a tensor that is not
            plain (a DTensor, a sparse tensor). The message names every such tensor. The model is unchanged.
        CheckpointError: if the file cannot be opened.
    """
    check_compute(compute)
    ignored = parse_patterns("ignore", ignore)
    target = None if device is None else usable(device)
    if into is None and target is not None:
        raise ArgumentError("device= says where a model is to be; without into= tensors alias the file, on the CPU")
    if into is None and compute != "auto":
        raise ArgumentError("compute= chooses the kernels of a model; without into= there is no model")
    if into is None and ignored:
        raise ArgumentError("ignore= names tensors that a model may lack; without into= the mapping has every tensor")
    if into is None and init_buffers is not None:
        raise ArgumentError("init_buffers= sets buffers of a model; without into= there is no model")
    if not (init_buffers is None or callable(init_buffers)):
        raise ArgumentError(f"init_buffers= takes a function of a module, not a {type(init_buffers).__name__}")
    if into is not None and dequantize:
        raise ArgumentError("dequantize=True loads a mapping of float tensors; give it without into=")
    check_check(check)
    checkpoint = open_quantized(path, serializer)
    if into is None:
        if isinstance(checkpoint, Checkpoint):  # `values` checks the tensors of another tool
            checkpoint.check(check)
        values = checkpoint.values()
        # Tied names still share one tensor.
        coded = {id(value): value for value in values.values() if dequantize and isinstance(value, QuantizedTensor)}
        floats = {key: value.dequantize() for key, value in coded.items()}
        return {name: floats.get(id(value), value) for name, value in values.items()}
    if not isinstance(into, nn.Module):
        raise ArgumentError(f"into= takes a model, not a {type(into).__name__}; without it a mapping is returned")
    refuse_unfit(into, MismatchError)
    checkpoint.check(check)
    named = named_as_in(into, checkpoint)
    beside = held_beside(into)
    places, buffers = _places(named, into, beside, ignored, init_buffers)
    filled = [
        Place.of(row, taken, target, held_elsewhere=any(slot.name in beside for slot in taken))
        for row in named.ledger.stored
        if (taken := places[row.name])
    ]
    try:
        fill(named.value, named.read, filled, compute)
    finally:  # also if loading failed: a partly loaded model must not be saved
        refuse_save_pretrained(into)
    for slot, value in buffers:
        slot.module._buffers[slot.local] = value
    if target is not None:
        move_others(into, target)
    trim(holes=0)
    return into


def _places(
    checkpoint: Checkpoint | ForeignCheckpoint | RenamedCheckpoint,
    model: nn.Module,
    beside: Mapping[str, str],
    ignored: Sequence[Pattern],
    init_buffers: InitBuffers | None,
) -> tuple[dict[str, list[Slot]], list[tuple[Slot, Tensor]]]:
    """Find the slots of each stored row, and values for buffers that the file lacks.

    A row goes to the slots of its own name, of its aliases, and of names that the model ties to them.
    """
    rows = {row.name: row for row in checkpoint.ledger.present}
    by_name = {slot.name: slot for slot in slots(model)}
    places: dict[str, list[Slot]] = {row.name: [] for row in checkpoint.ledger.stored}
    # Tensors in the file that the model may lack or leave out.
    needless = [name for name in rows if name not in by_name or not by_name[name].persistent]
    check_all_used(ignored, needless, f"ignore, among tensors that {checkpoint.path} has and the model lacks")
    left = {name for name in needless if any(pattern.matches(name) for pattern in ignored)}
    missed = [name for name, row in rows.items() if name not in by_name and row.persistent and name not in left]
    problems = [f"{name} is in the file, not in the model" for name in missed]
    if missed:
        problems[-1] += f" (with ignore=[...] such tensors stay in the file){compiled_hint(model, missed)}"
    left |= {name for name in needless if name in by_name and _stays(by_name[name], rows[name])}
    taken = {name: row for name, row in rows.items() if name in by_name and name not in left}
    home = {id(by_name[name].tensor): row.holder for name, row in taken.items()}
    takers: dict[tuple[int, str], str] = {}
    absent: list[str] = []
    bare: list[Slot] = []
    for name, slot in by_name.items():
        row = taken.get(name)
        # A name that the file lacks is still filled if the model ties it to a name that the file has.
        stored = home.get(id(slot.tensor)) if row is None else row.holder
        if stored is not None:
            first = takers.get(slot.key)
            if first is None:  # a module at two paths is filled once
                takers[slot.key] = stored
                places[stored].append(slot)
            elif first != stored and not checkpoint.same(first, stored):
                problems.append(f"{first} and {name} are one tensor in the model, but two different ones in the file")
            problems += misfits(rows[stored], slot, beside.get(name))
            problems += _turned(checkpoint, rows[stored], slot)
        elif slot.persistent:
            absent.append(name)
        elif slot.tensor.is_meta:
            bare.append(slot)
    tied = ties(model, absent, taken) if absent else {}
    for name in absent:
        advice = f" (call the model's tie_weights() first, which ties it to {tied[name]})" if name in tied else ""
        problems.append(f"{name} is in the model, not in the file{advice}")
    problems += [problem for row in checkpoint.ledger for problem in unrounded(row, places.get(row.name, ()), model)]
    values, without = initial_values(model, bare, init_buffers)
    problems += without
    if problems:
        raise MismatchError(f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    return places, [(slot, values[slot.key]) for slot in bare]


def _stays(slot: Slot, row: LedgerRow) -> bool:
    """Whether a non-persistent buffer keeps the model's value although the file has a tensor of its name.

    As in torch, loading need not restore such a buffer. Its shape may have changed in a forward pass before saving, and
    its values may be rounded in a file made from a checkpoint.
    """
    if nn.parameter.is_lazy(slot.tensor) or slot.tensor.is_floating_point() != row.dtype.is_floating_point:
        return True
    return not slot.tensor.is_meta and (tuple(slot.tensor.shape) != row.shape or row.spec is not None)


def misfits(row: LedgerRow, slot: Slot, beside: str | None) -> list[str]:
    """List the reasons why a tensor of a file cannot go to a slot; `beside` is one that the model gives."""
    if nn.parameter.is_lazy(slot.tensor):
        return [f"{slot.name} is not initialized in the model; run it once before loading"]
    if tuple(slot.tensor.shape) != row.shape and slot.persistent:
        return [f"{slot.name} has shape {row.shape} in the file, {tuple(slot.tensor.shape)} in the model"]
    if slot.tensor.is_floating_point() != row.dtype.is_floating_point:
        return [f"{slot.name} is {dtype_name(row.dtype)} in the file, {dtype_name(slot.tensor.dtype)} in the model"]
    if row.spec is None or not slot.is_parameter:  # a buffer takes the dequantized tensor
        return []
    obstacle = beside or obstacle_to(slot.module, slot.local)
    problem = f"{slot.name} is {row.scheme} in the file, but {obstacle}: exclude it, or load without into="
    return [problem] if obstacle else []


def _turned(checkpoint: Checkpoint | ForeignCheckpoint | RenamedCheckpoint, row: LedgerRow, slot: Slot) -> list[str]:
    """Problems of a layer that has inputs as rows, with a weight that another tool stored for a Linear layer."""
    of_linear = not isinstance(checkpoint, Checkpoint) and row.name in checkpoint.of_linear
    if not of_linear or layout_of(slot.module, slot.local, slot.tensor)[0] == Layout.of(slot.tensor.shape):
        return []
    kind = type(slot.module).__name__
    return [f"{row.name} has one row per output in the file, but {kind} has one column per output: load without into="]


def unrounded(row: LedgerRow, places: Sequence[Slot], model: nn.Module) -> list[str]:
    """List problems of a weight with quantized inputs that goes to layers which do not quantize inputs that way."""
    places = [slot for slot in places if slot.is_parameter]
    if row.spec is None or row.spec.activations is None or not places:
        return []
    if any(nn.parameter.is_lazy(slot.tensor) for slot in places):
        return []  # without a shape it has no layout; `misfits` names it
    rounding = [slot for slot in places if rounds_inputs(slot.module, slot.local, parent_of(model, slot))]
    if rounding and all(layout_of(slot.module, slot.local, slot.tensor)[0] == row.layout for slot in rounding):
        return []
    why = "has its inputs on other axes" if rounding else "does not quantize its inputs"
    return [
        f"{row.name} is {row.scheme} in the file, but {type(places[0].module).__name__} {why}: "
        f"quantize it with overrides={{{row.name!r}: {{'activations': None}}}}"
    ]
