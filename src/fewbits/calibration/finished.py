"""`FinishedModules`: give the outputs of modules that can no longer change, instead of computing them in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
from torch import Tensor, nn

from fewbits.calibration.forwards import replaced_forwards
from fewbits.calibration.spill import KeptTensors

_T = TypeVar("_T")

#: An output: a tensor, or a tuple or list of tensors and None; each tensor is replaced by its place among those kept.
_Places = Any


@attrs.define(eq=False)
class _ModuleOutputs:
    """The outputs of a module with weights, by batch."""

    module: nn.Module
    #: Whether its forward changed nothing that the module holds, in any call so far.
    is_pure: bool = True
    #: The result of `_held` when its running forward began.
    before: list[int] = attrs.field(factory=list)
    inner: list[_ModuleOutputs] = attrs.field(factory=list)
    outputs: dict[int, _Places] = attrs.field(factory=dict)


class FinishedModules:
    """The outputs of modules inside a block whose results are final, although later weights of the block are not.

    The groups of a block are quantized in the order in which the block uses them, and the block runs again for each. In
    such a run, a module that ends before the first unfinished weight gives its final output for that batch: all later
    runs would give the same.

    Args:
        block: the copy of a block that runs.
        weights: the weights inside it; modules without any are not worth keeping.
        spill: as in `KeptTensors`.
    """

    def __init__(self, block: nn.Module, weights: list[Tensor], spill: Path | None = None) -> None:
        self._kept = KeptTensors(spill)
        self._usable = True
        wanted = {id(weight) for weight in weights}
        found = {
            name: _ModuleOutputs(module)
            for name, module in block.named_modules()
            if name and any(id(own) in wanted for own in _tensors(module))
        }
        for name, finished in found.items():
            finished.inner = [other for path, other in found.items() if path.startswith(f"{name}.")]
        self._finished = list(found.values())

    def run(self, batch: int, forward: Callable[[Callable[[], None]], _T], same: Callable[[_T, _T], bool]) -> _T:
        """Run a batch through the block; give outputs of earlier runs of this batch, and keep those that are final now.

        The first two batches run both ways. Nothing is given any more if the results differ: a module then does more
        than return its output. A module that changes anything that it holds is not kept.

        Args:
            batch: the number of the batch.
            forward: runs it. It gets a function to call as soon as a weight is used that is not final.
            same: tells whether two results are equal.
        """
        if not any(batch in finished.outputs for finished in self._finished):
            with self._keeping(batch) as end_keeping:
                return forward(end_keeping)
        try:
            with self._given(batch), self._keeping(batch) as end_keeping:
                given = forward(end_keeping)
        except Exception:  # the block may need a side effect of a module
            self._stop()
            return forward(_nothing)
        if batch > 1:
            return given
        # Run in full only now: a block that carries state from call to call still has that of another batch, so the
        # first run would have shown a difference.
        whole = forward(_nothing)
        if not same(given, whole):
            self._stop()
        return whole

    def _stop(self) -> None:
        self._usable = False
        for finished in self._finished:
            for batch in list(finished.outputs):
                self._forget(finished, batch)

    @contextmanager
    def _given(self, batch: int) -> Iterator[None]:
        """Let finished modules return their kept outputs of a batch, at their first call."""
        known = [finished for finished in self._finished if batch in finished.outputs]
        forwards = {f.module: _once(partial(self._output, f, batch), f.module.forward) for f in known}
        with replaced_forwards(forwards):
            yield

    @contextmanager
    def _keeping(self, batch: int) -> Iterator[Callable[[], None]]:
        """Keep the outputs of modules that end before the function that this gives is called."""
        with ExitStack() as hooks:
            if self._usable:
                for finished in self._finished:
                    hooks.callback(finished.module.register_forward_pre_hook(partial(self._begin, finished)).remove)
                    hook = partial(self._keep, finished, batch)
                    hooks.callback(finished.module.register_forward_hook(hook).remove)
            yield hooks.close

    def _begin(self, finished: _ModuleOutputs, module: nn.Module, args: object) -> None:
        finished.before = _held(module)

    def _keep(self, finished: _ModuleOutputs, batch: int, module: nn.Module, args: object, output: object) -> None:
        finished.is_pure = finished.is_pure and finished.before == _held(module)
        if not finished.is_pure:
            for known in list(finished.outputs):
                self._forget(finished, known)
        if batch in finished.outputs or not finished.is_pure or not _is_kept(output):
            return
        finished.outputs[batch] = _each(self._append, output)
        for inner in finished.inner:
            self._forget(inner, batch)

    def _append(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().clone())
        return len(self._kept) - 1

    def _output(self, finished: _ModuleOutputs, batch: int) -> Any:
        return _each(self._taken, finished.outputs[batch])

    def _taken(self, place: int) -> Tensor | None:
        tensor = self._kept[place]
        return None if tensor is None else tensor.clone()  # the block may write to it

    def _forget(self, finished: _ModuleOutputs, batch: int) -> None:
        if batch in finished.outputs:
            _each(self._kept.release, finished.outputs.pop(batch))


def _once(first: Callable[[], Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a forward that returns the result of `first` at the first call, and runs the module at later ones."""
    calls: list[None] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return first() if len(calls) == 1 else forward(*args, **kwargs)

    return run


def _nothing() -> None:
    """Do nothing."""


def _held(module: nn.Module) -> list[int]:
    """Return numbers that change if a module gets other attributes, or writes to its buffers."""
    attributes = [id(value) for part in module.modules() for value in vars(part).values()]
    return attributes + [buffer._version for buffer in module.buffers() if not buffer.is_inference()]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_kept(output: Any) -> bool:
    """Whether an output can be kept: a tensor, or a plain tuple or list of tensors and None."""
    parts = output if type(output) in (tuple, list) else (output,)
    return any(isinstance(part, Tensor) for part in parts) and all(
        part is None or isinstance(part, Tensor) for part in parts
    )


def _each(function: Callable[[Any], Any], output: Any) -> Any:
    """Apply a function to the tensors of an output, or to their places."""
    if isinstance(output, (tuple, list)):
        return type(output)(None if part is None else function(part) for part in output)
    return function(output)
