"""Run a model without its blocks, to get the arguments of each block without the time of a forward.

In most models, everything that a block gets besides its input (masks, positions) comes from outside the chain. A first
batch shows whether that holds: its arguments must be the same with and without the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.forwards import replaced_forwards
from fewbits.calibration.replay import Block


class _AfterLastBlock(BaseException):
    """Ends a forward after its last block; not an `Exception`, because a forward may catch those."""


def run_without_blocks(chains: Sequence[Sequence[Block]], run: Callable[[], object]) -> None:
    """Run a batch with blocks that return their input, up to the last block.

    Args:
        chains: the chains of blocks, in the order in which they run.
        run: runs the batch through the model.
    """
    with suppress(_AfterLastBlock), _passing_on(chains):
        run()


@contextmanager
def _passing_on(chains: Sequence[Sequence[Block]]) -> Iterator[None]:
    """Let each block return a copy of its input, and end the forward after the last block."""
    last = chains[-1][-1].module

    def stop(*_: object) -> None:
        raise _AfterLastBlock

    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    for chain in chains:
        passed: list[Tensor] = []
        forwards |= {block.module: _pass_on(passed) for block in chain}
    hook = last.register_forward_hook(stop)
    try:
        with replaced_forwards(forwards):
            yield
    finally:
        hook.remove()


def _pass_on(passed: list[Tensor]) -> Callable[..., Tensor]:
    """Make the forward of a block: `passed` holds the output of the block before it in its chain."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        given = next((x for x in tensors if passed and x is passed[-1]), None)
        if given is None:
            given = next(x for x in tensors if x.is_floating_point())
        passed[:] = [given.clone()]  # an object of its own, so that no other argument is taken for it
        return passed[0]

    return forward


def same_arguments(first: object, second: object) -> bool:
    """Tell whether the arguments of two calls are equal: tensors bit for bit, containers by their elements."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and _equal(first, second)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same_arguments, first, second))
    if isinstance(first, Mapping):
        return (
            isinstance(second, Mapping)
            and first.keys() == second.keys()
            and all(same_arguments(value, second[key]) for key, value in first.items())
        )
    return first is second or (type(first) is type(second) and isinstance(first, (int, float, str)) and first == second)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
