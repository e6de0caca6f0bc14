"""Read FP8 weights of other tools: pair each weight with its scales, and read both as one bfloat16 tensor.

Two ways to store scales are common. ``p_scale_inv`` beside ``p`` (DeepSeek-V3 and its successors) has one scale per
block, usually of 128 by 128 elements; despite its name, codes are multiplied by it. ``p_scale`` (compressed-tensors,
ModelOpt) has one scale for the whole tensor or one per row, rarely one per block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.codec import ReadElements
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import NumericsError, SourceError
from fewbits.numerics.dtypes import SCALE_DTYPES, dtype_name
from fewbits.numerics.scaled import FP8_DTYPES, FP8_TARGET, ScaleGrid, dequantize_scaled
from fewbits.selection.ledger import Ledger

#: Suffixes that turn the name of a weight into the name of its scales.
SCALE_SUFFIXES = ("_scale_inv", "_scale")

#: Block shapes (rows, columns) to try if no configuration states one.
KNOWN_BLOCKS = ((128, 128), (1, 128))

#: Names of activation scales: the last component of such a name equals one of these, or ends in "_" and one of these.
ACTIVATION_SCALES = (
    "input_scale", "output_scale", "act_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
    "prob_scale",
)  # fmt: skip


@attrs.frozen
class ScaledWeight:
    """An FP8 weight and its scales.

    Attributes:
        name: the name of the weight.
        entry: the shape of the weight and the dtype of its codes.
        scale: the name of the scales.
        scale_entry: shape and dtype of the scales.
        grid: which scale belongs to which code.
    """

    name: str
    entry: Entry
    scale: str
    scale_entry: Entry
    grid: ScaleGrid

    def read(
        self, elements: ReadElements, first: int, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """Dequantize consecutive elements of the weight.

        Args:
            elements: reads codes and scales.
            first: position of the first element in the flattened weight.
            shape: shape of the returned tensor, which sets the number of elements.
            device: the device of codes and scales.

        Raises:
            NumericsError: if an element cannot be dequantized; the message names the weight and its scales.
        """
        out = torch.empty(shape, dtype=FP8_TARGET, device=device)
        try:
            dequantize_scaled(
                lambda start, stop: elements(self.name, start, (stop - start,)),
                lambda start, stop: elements(self.scale, start, (stop - start,)),
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
    """Find the FP8 weights that have scales, by name.

    Args:
        entries: shape and dtype of all tensors, by name.
        blocks: possible block shapes (rows, columns).

    Raises:
        SourceError: if scales do not fit their weight, or their weight is missing.
    """
    found = {}
    for name, entry in entries.items():
        if entry.dtype in FP8_DTYPES:
            scales = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in entries]
            if len(scales) > 1:
                raise SourceError(
                    f"{_named(name, entry)} has {' and '.join(scales)} beside it; only one of them can be its scale: "
                    "remove the other from the checkpoint"
                )
            for scale in scales:
                found[name] = ScaledWeight(name, entry, scale, entries[scale], _grid(name, scale, entries, blocks))
    _refuse_lost_scales(entries)
    return found


def tell_unscaled(ledger: Ledger) -> None:
    """Warn about FP8 tensors that are kept because no scales were found: their scales may be lost."""
    names = [row.name for row in ledger.stored if row.dtype in FP8_DTYPES]
    if names:
        reason = "no scales lie beside them; they are kept unchanged"
        emit("warning", "fp8_without_scale", tensors=len(names), first=names[0], reason=reason)


def is_activation_scale(name: str) -> bool:
    """Return whether a tensor beside FP8 weights is, by its name, a scale of activations and not of a weight."""
    last = name.rpartition(".")[2]
    return any(last == known or last.endswith(f"_{known}") for known in ACTIVATION_SCALES)


def _grid(name: str, scale: str, entries: Mapping[str, Entry], blocks: Sequence[tuple[int, int]]) -> ScaleGrid:
    entry, scale_entry = entries[name], entries[scale]
    if scale_entry.dtype not in SCALE_DTYPES:
        raise SourceError(
            f"{_named(scale, scale_entry)} lies beside {_named(name, entry)} and cannot be its scale: scales are in "
            f"{', '.join(map(dtype_name, SCALE_DTYPES))}; dequantize the checkpoint with the tool that wrote it"
        )
    grid = ScaleGrid.fit(entry.shape, scale_entry.shape, blocks)
    if grid is None:
        cuts = " or ".join(f"{rows} by {columns}" for rows, columns in blocks)
        raise SourceError(
            f"{_named(scale, scale_entry)} does not fit {_named(name, entry)}: there is one scale for the tensor, one "
            f"for each row, or one for each block of {cuts}; if the blocks have another shape, give the directory "
            "whose config.json states their weight_block_size"
        )
    return grid


def _refuse_lost_scales(entries: Mapping[str, Entry]) -> None:
    """Refuse scales whose weights are missing: they would be taken for weights."""
    # Beside float weights, "_scale" is also used for other tensors, so only "_scale_inv" counts there.
    suffixes = SCALE_SUFFIXES if any(entry.dtype in FP8_DTYPES for entry in entries.values()) else SCALE_SUFFIXES[:1]
    for name, entry in entries.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(f"weight{suffix}")), None)
        if suffix is not None and name.removesuffix(suffix) not in entries:
            raise SourceError(
                f"{_named(name, entry)} is the scale of {name.removesuffix(suffix)}, which is missing; if that is "
                "in another file of the checkpoint, give its directory"
            )


def _named(name: str, entry: Entry) -> str:
    return f"{name} ({dtype_name(entry.dtype)}, shape {entry.shape})"
