"""`InputWatch`: shows the inputs of layers to observers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits.errors import CalibrationError
from fewbits.observers.base import Observer


class InputWatch:
    """Shows the first input of each layer to its observer at every forward, while it is attached.

    The first input is the first tensor among the arguments of the module. It is not shown if it is not floating (such
    as the indices of an embedding) or has no elements (such as for an expert that gets no tokens).

    Args:
        layers: (name of the weight, a module that uses it, the observer of its inputs); tied weights have several
            modules and one observer.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module, Observer]]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._lock = threading.Lock()  # a model may run in several threads, and observers update their statistics
        self._unseen = dict.fromkeys(name for name, _, _ in layers)
        self.attach()

    def attach(self) -> None:
        """Attach the hooks."""
        self._handles = [
            module.register_forward_pre_hook(self._hook(name, observer), with_kwargs=True)
            for name, module, observer in self._layers
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Remove the hooks for the block, and attach them again only if the block raises."""
        self.remove()
        try:
            yield
        except BaseException:
            self.attach()
            raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the hooks for the block, and attach them again."""
        self.remove()
        try:
            yield
        finally:
            self.attach()

    @property
    def is_empty(self) -> bool:
        """Whether no observer looks at any layer."""
        return not self._layers

    def unseen(self) -> list[str]:
        """Return the names of the weights whose layers have had no input so far."""
        return list(self._unseen)

    def _hook(self, name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is None or not first.is_floating_point() or not first.numel():
                return
            with self._lock:
                try:
                    observer.observe_input(first.detach())
                except CalibrationError as error:
                    raise CalibrationError(f"the layer of {name}: {error}") from error
                self._unseen.pop(name, None)

        return show
