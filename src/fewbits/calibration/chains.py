"""Find chains of blocks: modules that run once, in order, each on the output of the one before."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@attrs.define(eq=False)
class _Call:
    """One call of a module, with the calls inside it.

    Attributes:
        module: the module.
        inputs: the numbers of its floating inputs.
        output: the number of the tensor that it passes on; None if it passes on none.
        calls: the calls inside it, in order.
    """

    module: nn.Module
    inputs: list[int]
    output: int | None = None
    calls: list[_Call] = attrs.field(factory=list)


class _Numbers:
    """Numbers tensors, without keeping them in memory: an `id` may be used again when a tensor is gone."""

    def __init__(self) -> None:
        self._known: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._next = itertools.count()

    def of(self, tensor: Tensor) -> int:
        """Return the number of a tensor."""
        if tensor not in self._known:
            self._known[tensor] = next(self._next)
        return self._known[tensor]


def chains(model: nn.Module, run: Callable[[], object], sizes: Mapping[nn.Module, int]) -> list[list[nn.Module]]:
    """Find the chains that divide a model best, in the order in which they run.

    The best chain covers the most weights outside its largest block. The next best chain shares no module with it, and
    so on.

    Args:
        model: the model.
        run: runs one batch through it.
        sizes: the weights of each module, without those of its children.

    Returns:
        lists of blocks. Empty if the model has no chain.
    """
    root = _traced(model, run)
    counts = Counter(id(call.module) for call in _all(root))
    found = [chain for call in _all(root) for chain in _within(call, counts)]
    covered = {id(module): sum(sizes.get(part, 0) for part in module.modules()) for module in model.modules()}
    weighed = []
    for chain in found:
        chain = _trimmed(chain, covered)
        own = [covered[id(module)] for module in chain]
        if chain and sum(own) > max(own):
            weighed.append((sum(own) - max(own), chain))
    chosen: list[list[nn.Module]] = []
    for _, chain in sorted(weighed, key=lambda pair: -pair[0]):
        parts = {id(part) for module in chain for part in module.modules()}
        others = {id(part) for other in chosen for module in other for part in module.modules()}
        if parts.isdisjoint(others):
            chosen.append(chain)
    order = {id(call.module): at for at, call in enumerate(_all(root))}
    return sorted(chosen, key=lambda chain: order[id(chain[0])])


def _traced(model: nn.Module, run: Callable[[], object]) -> _Call:
    """Run a batch, and record the calls of all modules."""
    root = _Call(model, [])
    stack, numbers = [root], _Numbers()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        call = _Call(module, [numbers.of(tensor) for tensor in tensors if tensor.is_floating_point()])
        stack[-1].calls.append(call)
        stack.append(call)

    def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        hidden = hidden_of(output)
        stack.pop().output = None if hidden is None else numbers.of(hidden)

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        run()
    return root


def _all(call: _Call) -> Iterator[_Call]:
    yield call
    for inner in call.calls:
        yield from _all(inner)


def _within(call: _Call, counts: Mapping[int, int]) -> list[list[nn.Module]]:
    """Return the chains among the calls directly inside a call."""
    found: list[list[_Call]] = []
    for inner in _flattened(call.calls):
        if counts[id(inner.module)] > 1 or not inner.inputs:
            continue
        before = next((chain for chain in found if chain[-1].output in inner.inputs), None)
        if before is None:
            found.append([inner])
        else:
            before.append(inner)
    return [[member.module for member in chain] for chain in found]


def _flattened(calls: Sequence[_Call]) -> Iterator[_Call]:
    """Replace each Sequential by its children, which are a chain by definition."""
    for call in calls:
        if type(call.module).forward is nn.Sequential.forward and call.calls:
            yield from _flattened(call.calls)
        else:
            yield call


def _trimmed(chain: list[nn.Module], covered: Mapping[int, int]) -> list[nn.Module]:
    """Drop blocks without weights at both ends."""
    own = [at for at, module in enumerate(chain) if covered[id(module)]]
    return chain[own[0] : own[-1] + 1] if own else []


def hidden_of(output: object) -> Tensor | None:
    """Return the tensor that a block passes on: its output, or the first element of a tuple or list."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
