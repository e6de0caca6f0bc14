"""Running data through a prepared model, so that observers see what its layers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits.errors import CalibrationError
from fewbits.observers.base import Observer

#: Runs one batch through the model: ``forward(model, batch)``.
Forward = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> object:
    """Feed a tensor as it is, a mapping as keyword arguments, and of a tuple or list, (input, target...), the input.

    Raises:
        CalibrationError: for anything else.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    raise CalibrationError(
        f"a batch of type {type(batch).__name__} cannot be fed by itself: yield tensors, (input, target) pairs or "
        "mappings of keyword arguments, or pass forward=, a function of the model and the batch"
    )


class InputWatch:
    """Shows a layer's first input to an observer, at every forward, for as long as it is attached.

    Args:
        layers: (name of the weight, a module that uses it, the observer that wants its inputs); tied weights have
            several modules and one observer.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module, Observer]]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, int] = {name: 0 for name, _, _ in layers}
        self.attach()

    def attach(self) -> None:
        """Begin to watch."""
        self._handles = [
            module.register_forward_pre_hook(self._hook(name, observer), with_kwargs=True)
            for name, module, observer in self._layers
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Without hooks inside; they come back only if the block raises."""
        self.remove()
        try:
            yield
        except BaseException:
            self.attach()
            raise

    def unseen(self) -> list[str]:
        """The names of the weights whose layers have had no input so far."""
        return [name for name, inputs in self._seen.items() if not inputs]

    def _hook(self, name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is not None:
                self._seen[name] += 1
                observer.observe_input(first.detach())

        return show


def run(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> int:
    """Run every batch in eval mode and without gradients; the training flags are as before afterwards.

    Returns:
        how many batches there were.

    Raises:
        CalibrationError: if there was none, or one cannot be fed.
    """
    forward = forward or default_forward
    training = [module for module in model.modules() if module.training]
    count = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
                count += 1
    finally:
        for module in training:
            module.training = True
    if not count:
        raise CalibrationError(
            "there was no batch to observe; an iterator that is used up yields nothing a second time"
        )
    return count
