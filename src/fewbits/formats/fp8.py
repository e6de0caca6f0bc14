"""FP8 weights of other tools: which tensor is the scale of which, and reading both as one bfloat16 tensor.

Two ways to store them are common. With ``p_scale_inv`` beside ``p`` (DeepSeek-V3 and what followed it) there is a scale
for each block, commonly of 128 by 128; in spite of its name it is what codes are multiplied by. With ``p_scale``
(compressed-tensors, ModelOpt) there is one for the whole tensor or one for each row, rarely for blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import NumericsError, SourceError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.scaled import FP8_DTYPES, FP8_SCALE_DTYPES, FP8_TARGET, ScaleGrid, dequantize_scaled
from fewbits.selection.ledger import Ledger

#: What is added to the name of a weight to make that of its scales.
SCALE_SUFFIXES = ("_scale_inv", "_scale")

#: Rows and columns of blocks that are looked for where no configuration tells.
KNOWN_BLOCKS = ((128, 128), (1, 128))

#: The last component of the name of a scale that is no weight's, or what that ends in after an underscore.
ACTIVATION_SCALES = (
    "input_scale", "output_scale", "act_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
    "prob_scale",
)  # fmt: skip

#: Reads elements of a tensor by its name, from the first of two positions to the second, in one dimension.
ReadElements = Callable[[str, int, int], Tensor]


@attrs.frozen
class ScaledWeight:
    """An FP8 weight and its scales.

    Attributes:
        name: of the weight.
        entry: its shape, and the dtype of its codes.
        scale: the name of its scales.
        scale_entry: their shape and dtype.
        grid: which of them goes with which code.
    """

    name: str
    entry: Entry
    scale: str
    scale_entry: Entry
    grid: ScaleGrid

    @property
    def described(self) -> Entry:
        """What it is dequantized to."""
        return Entry(self.entry.shape, FP8_TARGET)

    def read(
        self, elements: ReadElements, first: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """Some of its elements as they lie, dequantized.

        Args:
            elements: reads codes and scales.
            first: the first element.
            shape: what they are to look like, which says how many there are.
            device: where codes and scales are.

        Raises:
            NumericsError: for what cannot be dequantized; it names the weight and its scales.
        """
        out = torch.empty(shape, dtype=FP8_TARGET, device=device)
        try:
            dequantize_scaled(
                lambda start, stop: elements(self.name, start, stop),
                lambda start, stop: elements(self.scale, start, stop),
                self.grid,
                out,
                first=first,
                shape=self.entry.shape,
            )
        except NumericsError as error:
            where = f"{_named(self.name, self.entry)}, with {_named(self.scale, self.scale_entry)}"
            raise type(error)(f"{where}: {error}") from None
        return out


def scaled_weights(
    entries: Mapping[str, Entry], blocks: Sequence[tuple[int, int]] = KNOWN_BLOCKS
) -> dict[str, ScaledWeight]:
    """The FP8 weights among some tensors that have scales beside them, by name.

    Args:
        entries: all tensors, by name.
        blocks: rows and columns of the blocks that there may be.

    Raises:
        SourceError: for scales that do not fit their weight, or have none.
    """
    found = {}
    for name, entry in entries.items():
        if entry.dtype in FP8_DTYPES:
            scales = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in entries]
            if len(scales) > 1:
                raise SourceError(
                    f"{_named(name, entry)} has {' and '.join(scales)} beside it; one of them can be its scale, not "
                    "both: remove the other from the checkpoint"
                )
            for scale in scales:
                found[name] = ScaledWeight(name, entry, scale, entries[scale], _grid(name, scale, entries, blocks))
    _refuse_lost_scales(entries)
    return found


def tell_unscaled(ledger: Ledger) -> None:
    """Warn of FP8 tensors that are kept, because no scales lie beside them: they may have lost theirs."""
    names = [row.name for row in ledger.stored if row.dtype in FP8_DTYPES]
    if names:
        reason = "no scales lie beside them; they are kept as they are"
        emit("warning", "fp8_without_scale", tensors=len(names), first=names[0], reason=reason)


def is_activation_scale(name: str) -> bool:
    """Whether a name beside FP8 weights is that of a scale of what a layer computes with, not of a weight."""
    last = name.rpartition(".")[2]
    return any(last == known or last.endswith(f"_{known}") for known in ACTIVATION_SCALES)


def _grid(name: str, scale: str, entries: Mapping[str, Entry], blocks: Sequence[tuple[int, int]]) -> ScaleGrid:
    entry, scale_entry = entries[name], entries[scale]
    if scale_entry.dtype not in FP8_SCALE_DTYPES:
        raise SourceError(
            f"{_named(scale, scale_entry)} lies beside {_named(name, entry)} and cannot be its scale, which is one of "
            f"{', '.join(map(dtype_name, FP8_SCALE_DTYPES))}; dequantize the checkpoint with the tool that wrote it"
        )
    grid = ScaleGrid.fit(entry.shape, scale_entry.shape, blocks)
    if grid is None:
        cuts = " or ".join(f"{rows} by {columns}" for rows, columns in blocks)
        raise SourceError(
            f"{_named(scale, scale_entry)} does not fit {_named(name, entry)}: there is one scale for the tensor, one "
            f"for each row, or one for each block of {cuts}; if its blocks are others, give the directory whose "
            "config.json has their weight_block_size"
        )
    return grid


def _refuse_lost_scales(entries: Mapping[str, Entry]) -> None:
    """Refuse scales of weights that are not there: they would pass for weights."""
    # Beside float weights, one of these two names has been seen for other things.
    suffixes = SCALE_SUFFIXES if any(entry.dtype in FP8_DTYPES for entry in entries.values()) else SCALE_SUFFIXES[:1]
    for name, entry in entries.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(f"weight{suffix}")), None)
        if suffix is not None and name.removesuffix(suffix) not in entries:
            raise SourceError(
                f"{_named(name, entry)} is the scale of {name.removesuffix(suffix)}, which is not there; if that is in "
                "another file of the checkpoint, give its directory"
            )


def _named(name: str, entry: Entry) -> str:
    return f"{name} ({dtype_name(entry.dtype)}, shape {entry.shape})"
