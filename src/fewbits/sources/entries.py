"""Describe the tensors of state dicts and files, which have names but no module classes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import attrs

from fewbits.checkpoint.serializer import Entry
from fewbits.formats.fp8 import ScaledWeight, is_activation_scale
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
        overlapping: for tensors whose memory overlaps another tensor's: why they cannot be quantized.
    """
    weights = {weight.scale: weight for weight in scaled.values()}
    for name, entry in sorted(entries.items()):
        storage = storages.get(name, name)
        if name in weights:
            of = weights[name].name
            why = f"it is the scale of {of}"
            yield TensorInfo(name, entry.shape, entry.dtype, storage=storage, obstacle=why, merged_into=of)
        elif scaled and is_activation_scale(name):
            why = "a scale of activations, beside FP8 weights"
            yield TensorInfo(name, entry.shape, entry.dtype, storage=storage, obstacle=why)
        elif name in scaled:
            # Weights that share codes but not scales have different values.
            storage = storage, storages.get(scaled[name].scale, scaled[name].scale)
            info = entry_info(name, scaled[name].described, storage, overlapping.get(name))
            yield attrs.evolve(info, dequantized_from=entry.dtype)
        else:
            yield entry_info(name, entry, storage, overlapping.get(name))


def entry_info(name: str, entry: Entry, storage: Hashable, obstacle: str | None = None) -> TensorInfo:
    """Describe one tensor by its name, shape and dtype."""
    obstacle = numeric_obstacle(name, entry.shape, entry.dtype) or obstacle
    info = TensorInfo(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        storage=storage,
        layout=None if obstacle else layout_by_shape(entry.shape),
        declared=len(entry.shape) == 2,
        obstacle=obstacle,
    )
    return attrs.evolve(info, rounds_inputs=not info.is_embedding_by_name)
