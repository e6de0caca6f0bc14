"""Find values for buffers on the meta device that a file lacks, and names that the model would tie.

Both are found out on copies of the model whose parameters have no memory, so the model itself never changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import SourceError
from fewbits.nn.walk import Slot, deep_copy, slots
from fewbits.numerics.tensor import same_bits

#: Sets the buffers of a module.
InitBuffers = Callable[[nn.Module], object]


def initial_values(
    model: nn.Module, buffers: Sequence[Slot], init_buffers: InitBuffers | None
) -> tuple[dict[tuple[int, str], Tensor], list[str]]:
    """Values for buffers on the meta device, as `_init_weights` of the model sets them, and after it `init_buffers`.

    Two copies of the model are initialized, one with zeros in these buffers and one with ones. A buffer that is not the
    same in both was not set, or not completely, or by chance.

    Args:
        model: not changed.
        buffers: of the model, all on the meta device.
        init_buffers: called with the copy of each module that holds some of the buffers.

    Returns:
        the values by `Slot.key`, and a problem for each buffer that got none.
    """
    if not buffers:
        return {}, []
    try:
        (first, why), (second, _) = (_initialized(model, buffers, init_buffers, fill) for fill in (0, 1))
    except SourceError as error:
        first, second, why = {}, {}, dict.fromkeys((_path(slot) for slot in buffers), f" ({error})")
    values = {}
    problems = []
    for slot in buffers:
        value, other = first.get(slot.name), second.get(slot.name)
        if value is not None and other is not None and not value.is_meta and same_bits(value, other):
            values[slot.key] = value
        else:
            where = f"{slot.name} is a buffer that no state dict holds, and is on the meta device"
            problems.append(
                f"{where}{why.get(_path(slot), '')}; build the model on the CPU, or give a function that sets it as "
                "init_buffers="
            )
    return values, problems


def _initialized(
    model: nn.Module, buffers: Sequence[Slot], init_buffers: InitBuffers | None, fill: int
) -> tuple[dict[str, Tensor | None], dict[str, str]]:
    """The buffers of an initialized copy by name, and by module why its `_init_weights` failed."""
    memory = {id(slot.tensor): torch.full_like(slot.tensor, fill, device="cpu") for slot in buffers}
    failures = {}
    with torch.no_grad(), torch.device("cpu"):
        copied = _copy_without_memory(model, memory)
        modules = {_path(slot): copied.get_submodule(_path(slot)) for slot in buffers}
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
    """A copy of the model on the meta device, but for the tensors that `memory` has, by the id of the original."""
    memo: dict[int, Any] = {}
    for slot in slots(model):
        tensor = slot.tensor
        if not nn.parameter.is_lazy(tensor):
            empty = memory.get(id(tensor), torch.empty_like(tensor, device="meta"))
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if slot.is_parameter else empty
    return deep_copy(model, memo, otherwise="build it on the CPU")


def _path(slot: Slot) -> str:
    return slot.name.rpartition(".")[0]
