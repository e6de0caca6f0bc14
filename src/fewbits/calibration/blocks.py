"""`BlockCalibration`: takes the inputs of each layer when the layers before it are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from fewbits.calibration.block_run import BlockInputs, BlockRun, Collecting, Group
from fewbits.calibration.capture import InputCapture, Watched
from fewbits.calibration.chains import chains
from fewbits.calibration.collected import Collected
from fewbits.calibration.replay import Block, keep_calls, without_shortcuts
from fewbits.calibration.running import Forward
from fewbits.calibration.shortcut import run_without_blocks, same_arguments
from fewbits.calibration.spill import KeptTensors
from fewbits.errors import CalibrationError
from fewbits.nn.walk import slots
from fewbits.numerics.layout import Layout
from fewbits.rounding.statistics import Needs


@attrs.frozen(eq=False)
class Part:
    """A part of a model that is calibrated at a time: a block, or all weights outside of blocks.

    Attributes:
        weights: the names of its weights.
        groups: yields its weights in groups, each weight once. The caller passes the result for each weight of a group
            to `BlockCalibration.replace` before it takes the next group. A caller that has the results already passes
            them to `replace`, and takes no group.
    """

    weights: list[str]
    groups: Iterator[Group]


class BlockCalibration:
    """Takes the inputs of the layers of a prepared model, one block after the other.

    `observe` runs data through the float model. It keeps the arguments of the blocks, and adds up the statistics of
    layers outside all chains. `parts` then runs the blocks again. A model without a chain is one block.

    Args:
        model: the float model.
        layouts: the layouts of the weights whose inputs are needed, by name.
        needs: the statistics to collect.

    Attributes:
        spill: a folder for temporary files with the activations; None keeps the activations in memory.
    """

    spill: Path | None = None

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout], needs: Needs) -> None:
        self._model, self._layouts, self._needs = model, layouts, needs
        self._chains: list[list[Block]] | None = None
        self._skips_blocks = False
        self._hidden: list[KeptTensors] = []
        self._outside = Collected(needs)
        self._running: BlockRun | None = None
        #: The dequantized values of weights that several blocks share.
        self._shared: dict[str, Tensor] = {}

    # Observe the float model.

    def watching(
        self, forward: Forward, paused: Callable[[], AbstractContextManager[object]], *, alone: bool
    ) -> Forward:
        """Return a forward that observes each batch.

        Args:
            forward: runs one batch.
            paused: makes a context without other observers, for additional runs of the first batch.
            alone: whether there are no other observers, which would need the true inputs of all layers.
        """

        def observe(model: nn.Module, batch: Any) -> None:
            run = partial(forward, model, batch)
            if not self.has_blocks:
                with paused():
                    self.find_blocks(run)
                self.observe(run)
                self._skips_blocks = alone and self._may_skip_blocks(run)
            elif not self._skips_blocks or not self._observed_without_blocks(run):
                self.observe(run)

        return observe

    def observe(self, run: Callable[[], object]) -> None:
        """Run one batch; keep the arguments of the blocks, and add up the inputs of layers outside all chains.

        Args:
            run: runs the batch through the model.

        Raises:
            CalibrationError: if the blocks do not run as in the batch that they were found with.
        """
        with without_shortcuts(self._model):
            kept = [len(hidden) for hidden in self._hidden]
            with ExitStack() as hooks:
                for chain, hidden in zip(self._chains or (), self._hidden, strict=True):
                    keep_calls(chain, hidden, hooks)
                hooks.enter_context(InputCapture(self._outside_chains(), self._outside.receive))
                try:
                    run()
                    self._check_calls(kept)
                except BaseException:
                    self._forget_after(kept)
                    raise
            self._outside.end_batch()

    def _may_skip_blocks(self, run: Callable[[], object]) -> bool:
        """Tell whether blocks get the same arguments if no block runs; `run` runs the batch that was observed last."""
        chains = self._chains or ()
        if self._outside_chains() or not all(block.returns_hidden for chain in chains for block in chain):
            return False
        kept = [len(hidden) for hidden in self._hidden]
        try:
            return self._observed_without_blocks(run) and all(
                same_arguments(*block.calls[-2:]) for chain in chains for block in chain
            )
        finally:
            self._forget_after(kept)

    def _observed_without_blocks(self, run: Callable[[], object]) -> bool:
        """Observe a batch without running the blocks; return whether the forward allows it."""
        try:
            self.observe(partial(run_without_blocks, self._chains or (), run))
        except Exception:  # a forward may reject the outputs of blocks that do nothing
            return False
        return True

    @property
    def has_blocks(self) -> bool:
        """Whether `find_blocks` has found the blocks."""
        return self._chains is not None

    def check_data(self, rounding: object) -> None:
        """Refuse to go on without data.

        Args:
            rounding: the strategy that needs it.

        Raises:
            CalibrationError: if no batch was observed.
        """
        if not any(self._hidden):
            raise CalibrationError(f"{rounding!r} needs data; call observe(batches), or pass data=")

    def find_blocks(self, run: Callable[[], object]) -> None:
        """Find the chains of blocks, from one batch. `observe` needs them.

        Args:
            run: runs the batch through the model.
        """
        sizes: dict[nn.Module, int] = {}
        for slot in slots(self._model):
            if slot.name in self._layouts:
                sizes[slot.module] = sizes.get(slot.module, 0) + slot.tensor.numel()
        names = {id(module): name for name, module in self._model.named_modules()}
        with without_shortcuts(self._model):
            found = chains(self._model, run, sizes) or [[self._model]]
        self._chains = [[self._block(names[id(module)], module) for module in chain] for chain in found]
        earlier: set[str] = set()
        for block in [block for chain in self._chains for block in chain]:
            block.shared = {name: block.weights.pop(name) for name in earlier.intersection(block.weights)}
            earlier |= block.weights.keys()
        self._hidden = [KeptTensors(self.spill) for _ in self._chains]

    def _check_calls(self, kept: Sequence[int]) -> None:
        for chain, count in zip(self._chains or (), kept, strict=True):
            if any(len(block.calls) != count + 1 for block in chain):
                raise CalibrationError(
                    "the blocks of the model did not all run once in this batch, as in the first; give batches "
                    "that take the same way through the model"
                )

    def _forget_after(self, kept: Sequence[int]) -> None:
        self._outside.taken()
        for chain, hidden, count in zip(self._chains or (), self._hidden, kept, strict=True):
            hidden.truncate(count)
            for block in chain:
                del block.calls[count:]

    def _block(self, path: str, module: nn.Module) -> Block:
        local = {id(slot.tensor): slot.name for slot in slots(module)}
        known = [slot for slot in slots(self._model) if slot.name in self._layouts]
        return Block(path, module, {slot.name: local[id(slot.tensor)] for slot in known if id(slot.tensor) in local})

    def _outside_chains(self) -> list[Watched]:
        inside = {name for chain in self._chains or () for block in chain for name in block.weights}
        tensors = {slot.name: slot.tensor for slot in slots(self._model) if slot.name not in inside}
        return self._collecting.watched(tensors)

    @property
    def _collecting(self) -> Collecting:
        return Collecting(self._model, self._layouts, self._needs, self.spill)

    # Run the blocks again.

    def parts(self) -> Iterator[Part]:
        """Yield the weights outside of blocks, then each block."""
        outside = [watched.name for watched in self._outside_chains()]
        yield Part(outside, iter([{name: self._outside.of(name) for name in outside}]))
        for chain, hidden in zip(self._chains or (), self._hidden, strict=True):
            inputs = BlockInputs(hidden, hidden)
            for block, following in zip_longest(chain, chain[1:]):
                self._running = BlockRun(block, following, inputs, self._collecting)
                for name in block.shared:
                    self._running.replace(name, self._shared[name])
                yield Part(list(block.weights), self._running.groups())
                if following is not None:
                    inputs = self._running.outputs()
                self._running = None

    def groups(self) -> Iterator[Group]:
        """Yield the groups of all parts; weights whose inputs were not seen have no statistics."""
        for part in self.parts():
            yield from part.groups

    def replace(self, name: str, values: Tensor) -> None:
        """Put the dequantized values of a weight into the copy of the block that runs."""
        if any(name in block.shared for chain in self._chains or () for block in chain):
            self._shared[name] = values
        if self._running is not None:
            self._running.replace(name, values)
