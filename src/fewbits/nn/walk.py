"""List the parameters and buffers of a model, with the module that holds each."""

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
        local: the name of the tensor in that module.
        is_parameter: whether the tensor is a parameter; otherwise it is a buffer.
        persistent: whether a state dict holds the tensor.
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
            SourceError: if the tensor has been removed.
        """
        held = self.module._parameters if self.is_parameter else self.module._buffers
        tensor = dict(held.items()).get(self.local)  # TorchScript's mappings have no get
        if tensor is None:
            raise SourceError(f"{self.name} has been removed from the model since it was prepared")
        return tensor

    @property
    def key(self) -> tuple[int, str]:
        """A key that is equal for two paths to one tensor of one module."""
        return id(self.module), self.local


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
        SourceError: if it has been removed.
    """
    path, _, local = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SourceError(f"{name} has been removed from the model since it was prepared") from None
    return Slot(name, module, local, local in module._parameters)
