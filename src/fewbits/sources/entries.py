"""Describe the tensors of state dicts and files, which have names but no module classes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import attrs

from fewbits.checkpoint.serializer import Entry
from fewbits.formats.fp8 import ScaledWeight, is_activation_scale
from fewbits.numerics.scaled import FP8_TARGET
from fewbits.selection.info import TensorInfo, layout_by_shape, numeric_obstacle


def entry_infos(
    entries: Mapping[str, Entry],
    scaled: Mapping[str, ScaledWeight],
    storages: Mapping[str, Hashable],
    overlapping: Mapping[str, str],
) -> Iterator[TensorInfo]:
    """Describe every tensor, sorted by name.

    Args:
        entries: shape and dtype of each tensor, by name.
        scaled: the FP8 weights, which are read together with their scales.
        storages: a key per name, equal for two names if they are the same view of the same memory. A missing name
            shares no memory.
        overlapping: the names of tensors whose memory overlaps another tensor's, and why they cannot be quantized.
    """
    weights = {weight.scale: weight.name for weight in scaled.values()}
    for name, entry in sorted(entries.items()):
        storage, codes, reason = storages.get(name, name), None, None
        if name in weights:
            reason = f"it is the scale of {weights[name]}"
        elif scaled and is_activation_scale(name):
            reason = "a scale of activations, beside FP8 weights"
        elif name in scaled:
            # Weights that share codes but not scales have different values.
            storage = storage, storages.get(scaled[name].scale, scaled[name].scale)
            codes, entry = entry.dtype, Entry(entry.shape, FP8_TARGET)
        obstacle = reason or numeric_obstacle(name, entry.shape, entry.dtype) or overlapping.get(name)
        info = TensorInfo(
            name=name,
            shape=entry.shape,
            dtype=entry.dtype,
            storage=storage,
            layout=None if obstacle else layout_by_shape(entry.shape),
            declared=len(entry.shape) == 2,
            obstacle=obstacle,
            dequantized_from=codes,
            merged_into=weights.get(name),
        )
        yield attrs.evolve(info, rounds_inputs=not info.is_embedding_by_name)
