"""`BlockCalibration`: takes the inputs of each layer when the layers before it are quantized."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

from torch import Tensor, nn

from fewbits.calibration.capture import InputCapture, Watched
from fewbits.calibration.chains import chains
from fewbits.calibration.collected import Collected, Grouping, Key
from fewbits.calibration.replay import Block, check_replay, keep_calls, replaying, without_shortcuts
from fewbits.errors import CalibrationError
from fewbits.nn.walk import find, slots, structural_copy
from fewbits.numerics.layout import Layout
from fewbits.rounding.base import RowInputs
from fewbits.rounding.statistics import Needs


class _Enough(BaseException):
    """Ends a forward whose other layers are not needed; not an `Exception`, because a forward may catch those."""


class BlockCalibration:
    """Takes the inputs of the layers of a prepared model, one block after the other.

    `observe` runs data through the float model. It keeps the arguments of the blocks, and adds up the statistics of
    layers outside all chains. `groups` then runs the blocks again. A model without a chain is one block.

    Args:
        model: the float model.
        layouts: the layouts of the weights whose inputs are needed, by name.
        needs: the statistics to collect.
    """

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout], needs: Needs) -> None:
        self._model, self._layouts, self._needs = model, layouts, needs
        self._chains: list[list[Block]] | None = None
        self._hidden: list[list[Tensor | None]] = []
        self._outside = Collected(needs)
        self._working: dict[str, Tensor] = {}

    # Observe the float model.

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

    @property
    def has_blocks(self) -> bool:
        """Whether `find_blocks` has found the blocks."""
        return self._chains is not None

    @property
    def has_data(self) -> bool:
        """Whether any batch was observed."""
        return any(self._hidden)

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
        self._chains = [[Block(names[id(module)], module) for module in chain] for chain in found]
        self._hidden = [[] for _ in self._chains]

    def _check_calls(self, kept: Sequence[int]) -> None:
        for chain, count in zip(self._chains or (), kept, strict=True):
            if any(len(block.calls) != count + 1 for block in chain):
                raise CalibrationError("the blocks of the model did not all run once in this batch, as in the first")

    def _forget_after(self, kept: Sequence[int]) -> None:
        self._outside.taken()
        for chain, hidden, count in zip(self._chains or (), self._hidden, kept, strict=True):
            del hidden[count:]
            for block in chain:
                del block.calls[count:]

    def _outside_chains(self) -> list[Watched]:
        inside = {name for chain in self._chains or () for block in chain for name in self._names_in(block)}
        return self._watched({slot.name: slot.tensor for slot in slots(self._model) if slot.name not in inside})

    def _names_in(self, block: Block) -> list[str]:
        own = {id(slot.tensor) for slot in slots(block.module)}
        return [slot.name for slot in slots(self._model) if slot.name in self._layouts and id(slot.tensor) in own]

    def _watched(self, tensors: Mapping[str, Tensor]) -> list[Watched]:
        # They are made anew each time: kept, they would keep the float weights of a model that is quantized in place.
        return [
            Watched(name, tensor.detach(), self._layouts[name])
            for name, tensor in tensors.items()
            if name in self._layouts
        ]

    # Run the blocks again.

    def groups(self) -> Iterator[dict[str, list[RowInputs]]]:
        """Yield groups of weights with the statistics of their inputs; each weight once.

        The caller quantizes a group and calls `replace` with the results before it takes the next group. Weights whose
        inputs were not seen have no statistics.
        """
        outside = [watched.name for watched in self._outside_chains()]
        blocks = [[(block, self._names_in(block)) for block in chain] for chain in self._chains or ()]
        yield {name: self._outside.of(name) for name in outside}
        for chain, hidden in zip(blocks, self._hidden, strict=True):
            references = currents = hidden
            for at, (block, names) in enumerate(chain):
                following = chain[at + 1][0] if at + 1 < len(chain) else None
                references, currents = yield from self._block(block, names, references, currents, following)

    def replace(self, name: str, values: Tensor) -> None:
        """Put the dequantized values of a weight into the copy of the block that runs."""
        if name in self._working:
            self._working[name].data = values

    def _block(
        self,
        block: Block,
        names: list[str],
        references: list[Tensor | None],
        currents: list[Tensor | None],
        following: Block | None,
    ) -> Generator[dict[str, list[RowInputs]], None, tuple[list[Tensor | None], list[Tensor | None]]]:
        copied = structural_copy(block.module)
        self._working = {name: find(copied, _within(block, name)).tensor for name in names}
        grouping, inputs, references = self._run_float(block, names, references, following)
        seen = {name for group in grouping.groups for name in group}
        yield {name: [] for name in names if name not in seen}
        for group in grouping.groups:
            leaders = {name: grouping.leader(name) for name in group}
            later = grouping.later(group)
            collected = self._run_quantized(block, copied, set(leaders.values()), later, currents, inputs)
            yield {name: collected.of(leader) for name, leader in leaders.items()}
        if following is not None:
            with replaying(copied):
                currents = [block.run(copied, batch, hidden) for batch, hidden in enumerate(currents)]
        self._working = {}
        return references, currents

    def _run_float(
        self, block: Block, names: list[str], hidden: list[Tensor | None], following: Block | None
    ) -> tuple[Grouping, list[dict[Key, Tensor]], list[Tensor | None]]:
        """Run the float block. Return how its weights are grouped, their inputs in each batch, and its outputs.

        Without need for the inputs of the float model, only the first batch runs.
        """
        grouping, inputs = Grouping(self._model), []
        watched = self._watched({name: find(block.module, _within(block, name)).tensor for name in names})
        with replaying(block.module):
            with InputCapture(watched, grouping.receive):
                outputs = [block.run(block.module, 0, hidden[0])]
            check_replay(block, outputs[0], following)
            if self._needs == "cross_moment":
                leaders = [weight for weight in watched if grouping.leader(weight.name) == weight.name]
                outputs = []
                for batch, x in enumerate(hidden):
                    collected = Collected(self._needs)
                    with InputCapture(leaders, collected.receive):
                        outputs.append(block.run(block.module, batch, x))
                    inputs.append(collected.taken())
        return grouping, inputs, outputs

    def _run_quantized(
        self,
        block: Block,
        copied: nn.Module,
        leaders: set[str],
        later: list[str],
        hidden: list[Tensor | None],
        references: list[dict[Key, Tensor]],
    ) -> Collected:
        """Run the copy of the block, in which the groups before are quantized, and collect the inputs of one group."""
        collected = Collected(self._needs)

        def receive(name: str, rows: slice, x: Tensor) -> None:
            if name not in leaders:
                raise _Enough
            collected.receive(name, rows, x)

        watched = self._watched({name: self._working[name] for name in [*leaders, *later]})
        with replaying(copied):
            for batch, x in enumerate(hidden):
                with suppress(_Enough), InputCapture(watched, receive):
                    block.run(copied, batch, x)
                collected.end_batch(references[batch] if references else None)
        return collected


def _within(block: Block, name: str) -> str:
    """Return the name of a weight of the model within a block."""
    return name.removeprefix(f"{block.name}.") if block.name else name
