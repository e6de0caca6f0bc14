"""Every tensor that a model holds, with the place it is held at."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Hashable, Iterator
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.errors import SourceError
from fewbits.nn.storage import storage_key

#: Where every module keeps its tensors, its children and its hooks.
_MODULE_STATE = frozenset(vars(nn.Module()))


@attrs.frozen(eq=False)
class Slot:
    """One parameter or buffer of one module.

    Attributes:
        name: full dotted name.
        module: the module that holds it.
        local: its name in that module.
        is_parameter: whether it is a parameter; a buffer otherwise.
        persistent: whether a state dict has it.
    """

    name: str
    module: nn.Module
    local: str
    is_parameter: bool
    persistent: bool = True

    @property
    def tensor(self) -> Tensor:
        """What the module holds now. The slot itself keeps nothing alive.

        Raises:
            SourceError: if it holds nothing there any more.
        """
        held = self.module._parameters if self.is_parameter else self.module._buffers
        tensor = dict(held.items()).get(self.local)  # TorchScript's mappings have no get
        if tensor is None:
            raise SourceError(f"{self.name} has been removed from the model since it was looked at")
        return tensor

    @property
    def key(self) -> tuple[int, str]:
        """Equal for two paths to one place: a module may have several."""
        return id(self.module), self.local


def slots(model: nn.Module) -> Iterator[Slot]:
    """All parameters and buffers under all their names, shared modules and tied tensors included."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(prefix + local, module, local, True)
        for local, buffer in module._buffers.items():
            if buffer is not None:
                yield Slot(prefix + local, module, local, False, local not in module._non_persistent_buffers_set)


def parent_of(model: nn.Module, slot: Slot) -> nn.Module | None:
    """The module that holds the slot's module, by the path in its name; None for the root."""
    path = slot.name.rpartition(".")[0]
    return model.get_submodule(path.rpartition(".")[0]) if path else None


def held_beside(model: nn.Module) -> dict[str, str]:
    """A reason for each parameter whose memory a module holds elsewhere too: in an attribute, a list, a view.

    Such a reference would go on using the float tensor. The lists that recurrent layers keep are made anew.
    """
    parameters = {_memory(slot.tensor) for slot in slots(model) if slot.is_parameter and slot.tensor.numel()}
    reasons: dict[Hashable, str] = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            # Spectral norm and pruning compute a weight anew, out of its original, before every forward.
            anew = attribute == "_flat_weights" and isinstance(module, nn.RNNBase)
            if attribute in _MODULE_STATE or anew or f"{attribute}_orig" in module._parameters:
                continue
            for tensor in _tensors_in(value):
                where = f"{path}.{attribute}" if path else attribute
                if tensor.numel() and _memory(tensor) in parameters:
                    reasons[_memory(tensor)] = f"{where} holds it too, and would go on using the float tensor"
    return {slot.name: reasons[_memory(slot.tensor)] for slot in slots(model) if _memory(slot.tensor) in reasons}


def _memory(tensor: Tensor) -> Hashable:
    """Equal for two tensors in one storage."""
    lazy = nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided
    return id(tensor) if lazy else (tensor.device, tensor.untyped_storage().data_ptr())


def _tensors_in(value: object, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in an attribute, looking into containers, partial functions and namespaces, some levels deep."""
    if isinstance(value, functools.partial):
        value = [value.args, value.keywords]
    elif isinstance(value, SimpleNamespace) or attrs.has(type(value)) or dataclasses.is_dataclass(value):
        value = getattr(value, "__dict__", None)
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict)):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _tensors_in(entry, depth - 1)


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules, hooks included, whose parameters are new objects over the same storage.

    Buffers are copied, because a forward may write to them.

    Raises:
        SourceError: if something in the model refuses to be copied.
    """
    memo: dict[int, Any] = {}
    clones: dict[Hashable, Tensor] = {}
    for slot in slots(model):
        tensor = slot.tensor
        if type(tensor) is nn.Parameter:
            copied = memo.setdefault(id(tensor), nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))
            copied.__dict__.update(tensor.__dict__)
        elif type(tensor) is Tensor:
            key = storage_key(tensor)
            memo[id(tensor)] = clones[key] = clones[key] if key in clones else tensor.detach().clone()
    copied_model = deep_copy(model, memo)
    _refuse_shared_functions(model, copied_model)
    return copied_model


def _refuse_shared_functions(model: nn.Module, copied: nn.Module) -> None:
    """Refuse functions that are set on a module and refer to modules of the source: a copy would call the source.

    Raises:
        SourceError: naming the first such function.
    """
    modules = {id(module) for module in model.modules()}
    for (name, module), copy_of_it in zip(model.named_modules(), copied.modules(), strict=False):
        for attribute, value in vars(module).items():
            if isinstance(value, FunctionType) and vars(copy_of_it).get(attribute) is value:
                closure = getattr(value, "__closure__", None) or ()
                cells = [cell.cell_contents for cell in closure if _is_filled(cell)]
                held = [getattr(content, "__self__", content) for content in cells]
                if attribute == "forward" or any(id(content) in modules for content in held):
                    where = f"{name}.{attribute}" if name else attribute
                    raise SourceError(
                        f"{where} is a function that is set on the instance, and a copy would share it with the "
                        "source, weights included; quantize with inplace=True, or set it afterwards"
                    )


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def find(model: nn.Module, name: str) -> Slot:
    """The slot of this full name, as the model is now.

    Raises:
        SourceError: if there is none any more.
    """
    path, _, local = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SourceError(f"{name} has been removed from the model since it was looked at") from None
    return Slot(name, module, local, local in module._parameters)


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy in which objects may already have their copies (by id).

    Raises:
        SourceError: if something in the model refuses to be copied.
    """
    given = set(memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise SourceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "remove what refuses to be copied, or quantize with inplace=True"
        ) from error
    shared = (set(map(id, model.modules())) & set(map(id, copied.modules()))) - given
    if shared:
        name = next(name for name, module in model.named_modules() if id(module) in shared)
        raise SourceError(
            f"{name or 'the root module'} is not copied by copy.deepcopy, so the source itself would be changed; "
            "mend its __deepcopy__, or quantize with inplace=True"
        )
    return copied
