"""Save memory while training: compute the inner results of blocks again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fewbits.calibration.chains import chains
from fewbits.calibration.forwards import replaced_forwards
from fewbits.nn.stored import StoredWeight, stored_weights


@contextmanager
def checkpointed(model: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Let the blocks of a model's chains compute their inner results again in the backward pass, inside the block.

    Args:
        model: the model, with stand-ins for its packed weights.
        run: runs a batch through it, which shows the chains.
    """
    sizes = {module: sum(map(_size, stored_weights(module).values())) for module in model.modules()}
    blocks = [block for chain in chains(model, run, sizes) for block in chain]
    with replaced_forwards({block: _recomputing(block.forward) for block in blocks}):
        yield


def _size(stored: StoredWeight) -> int:
    return 0 if stored.layout is None else stored.layout.rows * stored.layout.columns


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint  # with torch 2.6 it imports much of the compiler

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, *args, **kwargs), use_reentrant=False)

    return run
