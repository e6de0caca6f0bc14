"""`load`: read a quantized checkpoint, of fewbits or of another tool, as a mapping or into a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar, overload

from torch import nn

from fewbits._heap import trim
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.filling import Device, InitBuffers, Place, fill, move_others, usable
from fewbits.checkpoint.reading import Check, Checkpoint, check_check
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, MismatchError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.places import find_places
from fewbits.formats.registry import open_quantized
from fewbits.formats.renamed import named_as_in
from fewbits.kernels.base import Compute
from fewbits.kernels.choose import check_compute
from fewbits.nn.eligibility import held_beside, refuse_unfit
from fewbits.nn.swap import refuse_save_pretrained
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.patterns import parse_patterns

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
    ignored, target = parse_patterns("ignore", ignore), None if device is None else usable(device)
    _check_arguments(into, dequantize, compute, device, ignore, init_buffers)
    check_check(check)
    checkpoint = open_quantized(path, serializer)
    if into is None:
        if isinstance(checkpoint, Checkpoint):  # `values` checks the tensors of another tool
            checkpoint.check(check)
        return _mapping(checkpoint, dequantize)
    refuse_unfit(into, MismatchError)
    checkpoint.check(check)
    named = named_as_in(into, checkpoint)
    beside = held_beside(into)
    places, buffers = find_places(named, into, beside, ignored, init_buffers)
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


def _check_arguments(
    into: nn.Module | None,
    dequantize: bool,
    compute: Compute,
    device: Device | None,
    ignore: Sequence[str],
    init_buffers: InitBuffers | None,
) -> None:
    """Check the arguments of `load`, and refuse those that the result does not need."""
    check_compute(compute)
    if into is None and device is not None:
        raise ArgumentError("device= says where a model is to be; without into= tensors alias the file, on the CPU")
    if into is None and compute != "auto":
        raise ArgumentError("compute= chooses the kernels of a model; without into= there is no model")
    if into is None and ignore:
        raise ArgumentError("ignore= names tensors that a model may lack; without into= the mapping has every tensor")
    if into is None and init_buffers is not None:
        raise ArgumentError("init_buffers= sets buffers of a model; without into= there is no model")
    if not (init_buffers is None or callable(init_buffers)):
        raise ArgumentError(f"init_buffers= takes a function of a module, not a {type(init_buffers).__name__}")
    if into is not None and dequantize:
        raise ArgumentError("dequantize=True loads a mapping of float tensors; give it without into=")
    if not (into is None or isinstance(into, nn.Module)):
        raise ArgumentError(f"into= takes a model, not a {type(into).__name__}; without it a mapping is returned")


def _mapping(checkpoint: Checkpoint | ForeignCheckpoint, dequantize: bool) -> dict[str, Value]:
    """Return the tensors of a checkpoint. Tied names share one tensor, also if they are dequantized."""
    values = checkpoint.values()
    coded = {id(value): value for value in values.values() if dequantize and isinstance(value, QuantizedTensor)}
    floats = {key: value.dequantize() for key, value in coded.items()}
    return {name: floats.get(id(value), value) for name, value in values.items()}
