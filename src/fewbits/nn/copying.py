"""Copy a model: its structure over the same weights, or all of it."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from fewbits.errors import SourceError
from fewbits.nn.storage import storage_key
from fewbits.nn.walk import slots


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy all modules and hooks; the parameters of the copy are new objects over the same storage.

    Buffers are copied, because a forward may write to them.

    Raises:
        SourceError: if a part of the model cannot be copied.
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
    copied_model = deep_copy(model, memo, otherwise="quantize with inplace=True")
    _refuse_shared_functions(model, copied_model)
    return copied_model


def _refuse_shared_functions(model: nn.Module, copied: nn.Module) -> None:
    """Refuse functions that are set on a module instance and refer to the source: a copy would call the source.

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


def deep_copy(model: nn.Module, memo: dict[int, Any], *, otherwise: str) -> nn.Module:
    """Copy a model with `copy.deepcopy`, and refuse a copy that shares modules with the model.

    Args:
        model: the model.
        memo: the memo of `copy.deepcopy`: copies of objects, by id.
        otherwise: an alternative for the user, for messages.

    Raises:
        SourceError: if a part of the model cannot be copied.
    """
    given = set(memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise SourceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            f"remove the part that cannot be copied, or {otherwise}"
        ) from error
    shared = (set(map(id, model.modules())) & set(map(id, copied.modules()))) - given
    if shared:
        name = next(name for name, module in model.named_modules() if id(module) in shared)
        raise SourceError(
            f"{name or 'the root module'} is not copied by copy.deepcopy, so the source itself would be changed; "
            f"repair its __deepcopy__, or {otherwise}"
        )
    return copied
