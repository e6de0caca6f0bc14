"""Keep the arguments of blocks, and run blocks again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.calibration.chains import hidden_of
from fewbits.calibration.running import evaluating
from fewbits.calibration.spill import KeptTensors
from fewbits.errors import CalibrationError

#: Marks the place of a block's input among its arguments.
_HIDDEN = object()

#: A replay must give the same sum of magnitudes as the first run, up to this share.
_TOLERANCE = 1e-3


@attrs.define(eq=False)
class Block:
    """A block of a chain, with its arguments in each batch, except the output of the block before.

    Attributes:
        name: its path in the model; "" for the model itself.
        module: the block of the float model.
        weights: the names of its weights in the model, and their names in the block.
        shared: weights that an earlier block has too; that block calibrates them.
        calls: the arguments in each batch, with `_HIDDEN` in place of the block's input.
        magnitude: the sum of magnitudes of its input in the first batch, to check replays with.
        returns_hidden: whether its output was nothing but a tensor like its input, in all batches.
    """

    name: str
    module: nn.Module
    weights: dict[str, str]
    shared: dict[str, str] = attrs.field(factory=dict)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=list)
    magnitude: float | None = None
    returns_hidden: bool = True

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None) -> None:
        """Keep the arguments of one call; `hidden` is the block's input among them."""
        if hidden is not None and self.magnitude is None:
            self.magnitude = _magnitude(hidden)
        marked = {key: _HIDDEN if value is hidden else value for key, value in kwargs.items()}
        self.calls.append((tuple(_HIDDEN if value is hidden else value for value in args), marked))

    def shapes(self, batch: int, hidden: Tensor | None) -> list[torch.Size]:
        """Return the shapes of the tensors among the arguments of a batch; `hidden` is the block's input."""
        args, kwargs = self.calls[batch]
        return [value.shape for value in (hidden, *args, *kwargs.values()) if isinstance(value, Tensor)]

    def run(self, module: nn.Module, batch: int, hidden: Tensor | None) -> Tensor | None:
        """Run this block, or a copy of it, on one batch."""
        args, kwargs = self.calls[batch]
        # Without the copy, a block that writes to its input would change it for the next replay.
        given = None if hidden is None else hidden.clone()
        marked = {key: given if value is _HIDDEN else value for key, value in kwargs.items()}
        return hidden_of(module(*(given if value is _HIDDEN else value for value in args), **marked))


def keep_calls(chain: Sequence[Block], hidden: KeptTensors, hooks: ExitStack) -> None:
    """Keep the arguments of each block, and the input of the first, until the hooks are removed."""
    passed: list[Tensor | None] = [None]
    given: list[Tensor | None] = [None]

    def before(block: Block) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[0] = passed[0]
            if block is chain[0]:
                given[0] = next((x for x in (*args, *kwargs.values()) if _is_floating(x)), None)
                hidden.append(None if given[0] is None else given[0].detach().clone())
            block.keep(args, kwargs, given[0])

        return keep

    def after(block: Block) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def pass_on(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            block.returns_hidden = block.returns_hidden and _is_like(output, given[0])
            passed[0] = hidden_of(output)

        return pass_on

    for block in chain:
        hooks.callback(block.module.register_forward_pre_hook(before(block), with_kwargs=True).remove)
        hooks.callback(block.module.register_forward_hook(after(block)).remove)


def _is_like(output: object, hidden: Tensor | None) -> bool:
    if not isinstance(output, Tensor) or hidden is None:
        return False
    return (output.shape, output.dtype, output.device) == (hidden.shape, hidden.dtype, hidden.device)


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check_replay(block: Block, output: Tensor | None, following: Block | None) -> None:
    """Refuse a block that gives another output than the first time.

    Raises:
        CalibrationError: naming the block.
    """
    expected = None if following is None else following.magnitude
    if expected is None:
        return
    found = float("nan") if output is None else _magnitude(output)
    if not abs(found - expected) <= _TOLERANCE * abs(expected):
        raise CalibrationError(
            f"{block.name} gave another output when it was run again with the same input; calibration block by block "
            "needs blocks without a memory or chance: turn off caches (use_cache=False) and random numbers"
        )


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().sum())


@contextmanager
def replaying(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode, without gradients and without shortcuts."""
    with without_shortcuts(module), evaluating(module):
        yield


@contextmanager
def without_shortcuts(module: nn.Module) -> Iterator[None]:
    """Let torch compute layers by products that can be seen; turn off the caches of transformers models.

    Torch has single operations for whole attention layers, and oneDNN for recurrent layers.
    """
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for config in caching:
            config.use_cache = False
        if recurrent:
            previous = torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
        yield
    finally:
        if recurrent:
            torch.backends.mkldnn.set_flags(previous[0])  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in caching:
            config.use_cache = True
