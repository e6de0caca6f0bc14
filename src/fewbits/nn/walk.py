"""Every tensor that a model holds, with the place it is held at."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from torch import Tensor, nn

from fewbits.errors import SourceError


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
