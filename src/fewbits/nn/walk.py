"""List the parameters and buffers of a model, copy a model, and call it with a batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import CellType, FunctionType
from typing import Any

import attrs
from torch import Tensor, nn

from fewbits.errors import SourceError
from fewbits.nn.storage import View

#: The attribute of a module with the number of tunings of each of its tuned tensors, by local name.
_TUNED = "_fewbits_tuned"


@attrs.frozen(eq=False)
class Slot:
    """One parameter or buffer of one module.

    Attributes:
        name: The full dotted name.
        module: The module that holds the tensor.
        local: The name of the tensor in that module.
        is_parameter: Whether the tensor is a parameter; otherwise it is a buffer.
        persistent: Whether a state dict holds the tensor.
    """

    name: str
    module: nn.Module
    local: str
    is_parameter: bool
    persistent: bool = True

    @property
    def tensor(self) -> Tensor:
        """The tensor that the module holds now; the slot itself keeps no tensor alive.

        Raises:
            SourceError: If the tensor has been removed.
        """
        held = self.module._parameters if self.is_parameter else self.module._buffers
        tensor = dict(held.items()).get(self.local)  # TorchScript's mappings have no get
        if tensor is None:
            raise _removed(self.name)
        return tensor

    @property
    def key(self) -> tuple[int, str]:
        """A key that is equal for two paths to one tensor of one module."""
        return id(self.module), self.local


def _removed(name: str) -> SourceError:
    return SourceError(f"{name} has been removed from the model since it was prepared")


def slots(model: nn.Module) -> Iterator[Slot]:
    """Yield all parameters and buffers under all their names, including shared modules and tied tensors."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(prefix + local, module, local, True)
        for local, buffer in module._buffers.items():
            if buffer is not None:
                yield Slot(prefix + local, module, local, False, local not in module._non_persistent_buffers_set)


def parent_of(model: nn.Module, slot: Slot) -> nn.Module | None:
    """Return the parent of the slot's module, by the path in its name; None for the root."""
    path = slot.name.rpartition(".")[0]
    return model.get_submodule(path.rpartition(".")[0]) if path else None


def find(model: nn.Module, name: str) -> Slot:
    """Return the slot with this full name in the current model.

    Raises:
        SourceError: If it has been removed.
    """
    path, _, local = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise _removed(name) from None
    return Slot(name, module, local, local in module._parameters)


def mark_tuned(module: nn.Module, local: str) -> None:
    """Remember in a module that a tensor of it was tuned; copies of the module know it too."""
    counts = module.__dict__.setdefault(_TUNED, {})
    counts[local] = counts.get(local, 0) + 1


def tuned_tensors(model: nn.Module) -> dict[str, int]:
    """Return how often each tuned tensor was tuned, by its full name."""
    return {
        f"{path}.{local}" if path else local: count
        for path, module in model.named_modules()
        for local, count in vars(module).get(_TUNED, {}).items()
    }


def forget_tuning(model: nn.Module) -> None:
    """Remove all marks of tuned tensors."""
    for module in model.modules():
        module.__dict__.pop(_TUNED, None)


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy all modules and hooks; the parameters of the copy are new objects over the same storage.

    Buffers are copied, because a forward may write to them.

    Raises:
        SourceError: If a part of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    clones: dict[Hashable, Tensor] = {}
    for slot in slots(model):
        tensor = slot.tensor
        if type(tensor) is nn.Parameter:
            copied = memo.setdefault(id(tensor), nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))
            copied.__dict__.update(tensor.__dict__)
        elif type(tensor) is Tensor:
            key = View.of(tensor)
            memo[id(tensor)] = clones[key] = clones[key] if key in clones else tensor.detach().clone()
    copied_model = deep_copy(model, memo, otherwise="quantize with inplace=True")
    _refuse_shared_functions(model, copied_model)
    return copied_model


def _refuse_shared_functions(model: nn.Module, copied: nn.Module) -> None:
    """Refuse functions that are set on a module instance and refer to the source: a copy would call the source.

    Raises:
        SourceError: If there is such a function; the message names the first.
    """
    modules = {id(module) for module in model.modules()}
    for (name, module), copy_of_it in zip(model.named_modules(), copied.modules(), strict=False):
        for attribute, value in vars(module).items():
            if isinstance(value, FunctionType) and vars(copy_of_it).get(attribute) is value:
                cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _is_filled(cell)]
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
        model: The model.
        memo: The memo of `copy.deepcopy`: copies of objects, by id.
        otherwise: An alternative for the user, for messages.

    Raises:
        SourceError: If a part of the model cannot be copied.
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


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model with one batch.

    A tuple is passed as positional arguments, a mapping as keyword arguments, anything else as the only argument. If a
    forward does not accept the keys of a mapping as keyword arguments, and accepts one positional argument, as that of
    `SentenceTransformer` does, a copy of the mapping is that argument, because such a forward may write into it.
    """
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, Mapping) and not _is_one_argument(model.forward, batch):
        return model(**batch)
    return model(copy.copy(batch) if isinstance(batch, Mapping) else batch)


def _is_one_argument(forward: Callable[..., Any], batch: Mapping[Any, Any]) -> bool:
    """Whether a forward takes the mapping itself as its argument."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # TorchScript and C functions have no signature
        return False
    if _binds(signature, **{str(key): value for key, value in batch.items()}):
        return False
    # If one key is the name of a parameter, the other keys are misspelt keyword arguments.
    return signature.parameters.keys().isdisjoint(batch) and _binds(signature, batch)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
