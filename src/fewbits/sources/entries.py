"""Describe the tensors of a state dict or file, which have names but no module classes."""

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
    """Describe every tensor, in the order of names.

    Args:
        entries: shape and dtype of each.
        scaled: FP8 weights that are dequantized on reading, by name.
        storages: equal for two names if they are the same view of the same memory. A name without an entry shares none.
        overlapping: by name, why a tensor whose memory overlaps another's cannot be quantized.
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
            # Codes that are shared by weights with other scales are other weights.
            storage = storage, storages.get(scaled[name].scale, scaled[name].scale)
            info = entry_info(name, scaled[name].described, storage, overlapping.get(name))
            yield attrs.evolve(info, dequantized_from=entry.dtype)
        else:
            yield entry_info(name, entry, storage, overlapping.get(name))


def entry_info(name: str, entry: Entry, storage: Hashable, obstacle: str | None = None) -> TensorInfo:
    """Describe one tensor."""
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
