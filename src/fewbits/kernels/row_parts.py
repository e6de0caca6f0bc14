"""Cut a weight between rows: one expert of a stack, or one of several projections that share a matrix."""

from __future__ import annotations

from typing import Any

from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.numerics.layout import Layout

#: Codes of scales and zero points lie in words of this many bits, which cannot be cut.
_WORD = 32


def row_part(weight: WeightLayout, rows: slice) -> WeightLayout | None:
    """Return some rows of a weight as a matrix of their own, in the same layout and memory.

    Args:
        weight: The weight, of any shape.
        rows: Some rows of its matrix: a start and a stop.

    Returns:
        the rows; None if the layout cannot be cut there.
    """
    shared, data = _shared_of(weight, rows), weight.data_of(rows)
    if shared is None or data is None:
        return None
    fields: dict[str, Any] = {**data, **shared, "input_scale": weight.input_scale, "spec": weight.spec}
    return type(weight)(**fields, layout=Layout.of((rows.stop - rows.start, weight.layout.columns)))


def _shared_of(weight: WeightLayout, rows: slice) -> dict[str, Any] | None:
    """Return the tensors of scales and zero points for some rows; None if they cannot be cut there."""
    if weight.scale.dim() == 1:  # one scale serves the whole weight
        return {"scale": weight.scale, "zero_point": weight.zero_point}
    spec = weight.spec
    packed = {"scale_codes": (weight.scale_codes, spec.scale_bits), "zero_point": (weight.zero_point, spec.bits)}
    cut: dict[str, Any] = {"scale": weight.scale[rows]}
    for name, (words, bits) in packed.items():
        if words is not None and bits is not None:
            if rows.start * bits % _WORD:
                return None
            cut[name] = words[rows.start * bits // _WORD : -(-rows.stop * bits // _WORD)]
    return cut
