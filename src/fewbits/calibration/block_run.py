"""`BlockRun`: runs one block of a chain, once for each group of its weights, and collects their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from fewbits.calibration.capture import InputCapture, Watched
from fewbits.calibration.collected import Collected, Grouping, Key
from fewbits.calibration.finished import FinishedModules
from fewbits.calibration.replay import Block, check_replay, replaying
from fewbits.calibration.shortcut import same_arguments
from fewbits.calibration.spill import KeptInputs, KeptTensors
from fewbits.nn.walk import find, structural_copy
from fewbits.numerics.layout import Layout
from fewbits.rounding.base import RowInputs
from fewbits.rounding.statistics import Needs

#: Statistics of the inputs of weights that are quantized together, by the name of the weight.
Group = dict[str, list[RowInputs]]


class _Enough(BaseException):
    """Ends a forward whose other layers are not needed; not an `Exception`, because a forward may catch those."""


@attrs.frozen(eq=False)
class BlockInputs:
    """The inputs of a block by batch.

    Attributes:
        floats: in the float model; only of the first batch, if no more are needed.
        currents: in the model that is quantized so far.
    """

    floats: KeptTensors
    currents: KeptTensors


@attrs.frozen(eq=False)
class Collecting:
    """The statistics to collect, and of which weights.

    Attributes:
        model: the float model.
        layouts: the layouts of the weights, by name.
        needs: the statistics.
        spill: a folder for temporary files with the activations; None keeps them in memory.
    """

    model: nn.Module
    layouts: Mapping[str, Layout]
    needs: Needs
    spill: Path | None

    def watched(self, tensors: Mapping[str, Tensor]) -> list[Watched]:
        """Return the tensors whose layouts are known, to look for them."""
        # They are made anew each time: kept, they would keep the float weights of a model that is quantized in place.
        wanted = {name: tensor.detach() for name, tensor in tensors.items() if name in self.layouts}
        return [Watched(name, tensor, self.layouts[name]) for name, tensor in wanted.items()]


class BlockRun:
    """One block on its way through a calibration, with a copy whose weights are replaced by dequantized ones.

    Args:
        block: the float block.
        following: the next block of the chain; None for the last.
        inputs: the inputs of the block and of its copy.
        collecting: the statistics to collect.
    """

    def __init__(self, block: Block, following: Block | None, inputs: BlockInputs, collecting: Collecting) -> None:
        self._block, self._following, self._inputs, self._collecting = block, following, inputs, collecting
        self._outputs = KeptTensors(collecting.spill)
        self._copied = structural_copy(block.module)
        self._working = {name: find(self._copied, local).tensor for name, local in block.weights.items()}
        self._finished = FinishedModules(self._copied, list(self._working.values()), collecting.spill)
        self._working |= {name: find(self._copied, local).tensor for name, local in block.shared.items()}

    def replace(self, name: str, values: Tensor) -> None:
        """Put the dequantized values of a weight into the copy; ignore weights of other blocks."""
        if name in self._working:
            working = self._working[name]
            working.data = values.to(working.device, working.dtype)

    def groups(self) -> Iterator[Group]:
        """Yield the weights in groups, with the statistics of their inputs; see `Part.groups`."""
        grouping, references = self._run_float()
        seen = {name for group in grouping.groups for name in group}
        yield {name: [] for name in self._block.weights if name not in seen}
        pending = list(grouping.groups)
        while pending:
            group = pending.pop(0)
            leaders = {grouping.leader(name) for name in group}
            if len(leaders) > 1 and self._depend_on_one_another(group, leaders):
                pending[:0] = grouping.apart(group)
                continue
            only = {name for name in leaders if len(leaders) == 1 and self._is_used_whole_and_once(name, grouping)}
            unfinished = [name for later in (group, *pending) for name in later]
            collected = self._run_quantized(_GroupRun(unfinished, leaders, {*grouping.later(group), *only}), references)
            yield {name: collected.of(grouping.leader(name), grouping.followed_rows(name)) for name in group}

    def _depend_on_one_another(self, group: list[str], leaders: set[str]) -> bool:
        """Tell whether weights of a group change the inputs of others, as those of consecutive layers do.

        Names only suggest which weights are parallel: the layers of a `ModuleList` may be experts, or a sequence.
        """
        weights = [self._working[name] for name in group]
        before, kept = self._first_inputs(leaders), [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data * 0.5
            return not same_arguments(before, self._first_inputs(leaders))
        finally:
            for weight, data in zip(weights, kept, strict=True):
                weight.data = data

    def _first_inputs(self, leaders: set[str]) -> dict[Key, Tensor]:
        """Return the inputs of some weights in the first batch."""
        watched = self._collecting.watched({name: self._working[name] for name in leaders})
        with replaying(self._copied):
            return self._inputs_of(leaders, set(), watched, 0, self._inputs.currents[0], lambda: None)

    def _is_used_whole_and_once(self, name: str, grouping: Grouping) -> bool:
        return grouping.only_rows(name) == slice(0, self._collecting.layouts[name].rows)

    def outputs(self) -> BlockInputs:
        """Return the outputs of the float block and of its copy: the inputs of the following block."""
        block, floats = self._block, self._inputs.floats
        if not len(self._outputs):
            with replaying(block.module):
                for batch in range(len(floats) if self._collecting.needs == "cross_moment" else 1):
                    self._outputs.append(block.run(block.module, batch, floats[batch]))
            check_replay(block, self._outputs[0], self._following)
        currents = KeptTensors(self._collecting.spill)
        with replaying(self._copied):
            for batch, hidden in enumerate(self._inputs.currents):
                currents.append(self._output(batch, hidden))
        return BlockInputs(self._outputs, currents)

    def _output(self, batch: int, hidden: Tensor | None) -> Tensor | None:
        """Run the copy, whose weights are all final."""

        def run(end_keeping: Callable[[], None]) -> Tensor | None:
            end_keeping()
            return self._block.run(self._copied, batch, hidden)

        return self._finished.run(batch, run, same_arguments)

    def _run_float(self) -> tuple[Grouping, KeptInputs]:
        """Run the float block. Return how its weights are grouped, and their inputs in each batch.

        Without need for the inputs of the float model, only the first batch runs.
        """
        block, floats, needs = self._block, self._inputs.floats, self._collecting.needs
        grouping, inputs = Grouping(self._collecting.model), KeptInputs(self._collecting.spill)
        own = {name: find(block.module, local).tensor for name, local in block.weights.items()}
        watched = self._collecting.watched(own)
        with replaying(block.module):
            with InputCapture(watched, grouping.receive):
                first = block.run(block.module, 0, floats[0])
            check_replay(block, first, self._following)
            self._look_for_the_rest(grouping, watched)
            if needs != "cross_moment":
                self._outputs.append(first)
                return grouping, inputs
            names = {grouping.leader(name) for group in grouping.groups for name in group}
            leaders = [weight for weight in watched if weight.name in names]
            for batch, x in enumerate(floats):
                collected = Collected(needs)
                with InputCapture(leaders, collected.receive):
                    self._outputs.append(block.run(block.module, batch, x))
                inputs.append(collected.taken())
        return grouping, inputs

    def _look_for_the_rest(self, grouping: Grouping, watched: list[Watched]) -> None:
        """Run more batches while there are weights that the batches before did not use."""
        currents = self._inputs.currents
        for batch in range(1, len(currents)):
            if not grouping.lacks(self._block.weights):
                return
            grouping.begin_batch()
            with InputCapture(watched, grouping.receive):
                self._block.run(self._block.module, batch, currents[batch])

    def _run_quantized(self, group: _GroupRun, references: KeptInputs) -> Collected:
        """Run the copy of the block, in which the groups before are quantized, and collect the inputs of one group."""
        collected = Collected(self._collecting.needs)
        watched = self._collecting.watched({name: self._working[name] for name in group.open})
        first: list[torch.Size] = []
        with replaying(self._copied):
            for batch, hidden in enumerate(self._inputs.currents):
                shapes = self._block.shapes(batch, hidden)
                first = first or shapes
                # A batch of another shape may use the weights in another order, or more often, than the first.
                ends = group.ends if shapes == first else set()
                run = partial(self._inputs_of, group.leaders, ends, watched, batch, hidden)
                collected.add(self._finished.run(batch, run, same_arguments))
                collected.end_batch(references.taken(batch, group.leaders))
        return collected

    def _inputs_of(
        self,
        leaders: set[str],
        ends: set[str],
        watched: list[Watched],
        batch: int,
        hidden: Tensor | None,
        end_keeping: Callable[[], None],
    ) -> dict[Key, Tensor]:
        """Run a batch up to the first input of a weight in `ends`, and return the inputs of the leaders."""
        collected = Collected(self._collecting.needs)

        def receive(name: str, rows: slice, x: Tensor) -> None:
            end_keeping()
            if name in leaders:
                collected.receive(name, rows, x)
            if name in ends:
                raise _Enough

        with suppress(_Enough), InputCapture(watched, receive):
            self._block.run(self._copied, batch, hidden)
        return collected.taken()


@attrs.frozen(eq=False)
class _GroupRun:
    """A group of weights whose inputs are collected.

    Attributes:
        open: the names of the weights that are not final: those of this group, and of the groups after it.
        leaders: the weights of the group whose inputs are collected.
        ends: the weights whose first input shows that the group needs no more inputs: those that are used only after
            the group, and the one leader of the group, if it is used whole and once.
    """

    open: list[str]
    leaders: set[str]
    ends: set[str]
