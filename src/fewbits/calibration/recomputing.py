"""Save memory while training: compute the inner results of blocks again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewbits.calibration.chains import chains
from fewbits.nn.stored import StoredWeight, stored_weights


@contextmanager
def checkpointed(model: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Let the blocks of a model's chains compute their inner results again in the backward pass, inside the block.

    Args:
        model: the model, with stand-ins for its packed weights.
        run: runs a batch through it, which shows the chains.
    """
    sizes = {module: sum(map(_size, stored_weights(module).values())) for module in model.modules()}
    with ExitStack() as undo:
        for block in [block for chain in chains(model, run, sizes) for block in chain]:
            forward = block.forward
            undo.callback(_restore_forward, block, vars(block).get("forward"))
            block.__dict__["forward"] = _recomputing(forward)
        yield


def _restore_forward(block: nn.Module, own: Callable[..., Any] | None) -> None:
    """Put back the forward that a block had before: its own, or that of its class."""
    del block.__dict__["forward"]
    if own is not None:
        block.__dict__["forward"] = own


def _size(stored: StoredWeight) -> int:
    return 0 if stored.layout is None else stored.layout.rows * stored.layout.columns


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, *args, **kwargs), use_reentrant=False)

    return run
