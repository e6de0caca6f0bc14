"""Find the tensor of a GGUF template for each tensor of a checkpoint, and prove that the two are the same weight."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from fewbits.errors import MismatchError
from fewbits.formats.base import Described
from fewbits.formats.gguf_file import GGUFFile, StoredTensor
from fewbits.formats.gguf_names import gguf_names, row_order
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.row import LedgerRow

#: The least cosine between a row and the same row in another precision. Codes of 2 bits reach 0.8; rows of different
#: weights have a cosine near zero.
LEAST_COSINE = 0.5

#: Rows whose norm is a smaller share of the largest one prove nothing: their codes may all be zero.
_LEAST_NORM = 1e-4

_ADVICE = "is the template made from the same model?"


@attrs.frozen
class Match:
    """A tensor of a template, and the tensor of a checkpoint that takes its place."""

    stored: StoredTensor
    row: LedgerRow


def match(template: GGUFFile, source: Described) -> dict[str, Match]:
    """Find the tensor of the checkpoint for each tensor of the template, by name; values are not compared.

    Tensors of one axis that the checkpoint lacks are left to the template, for example ``rope_freqs``.

    Raises:
        MismatchError: naming quantized tensors that the template lacks, and matrices that the checkpoint lacks.
        FormatError: if the package does not know the architecture of the template.
    """
    holders = source.ledger.names_by_holder()
    names = gguf_names(template, [name for same in holders.values() for name in same])
    found: dict[str, Match] = {}
    problems = []
    for holder, same in holders.items():
        row = source.ledger[holder]
        places = {names[name] for name in same if name in names}
        if not places and row.fate == "quantized":
            problems.append(f"{holder} has no counterpart in {template.path}")
        problems += [f"{holder} and {found[place].row.name} are both {place}" for place in places & found.keys()]
        found |= {place: Match(template.tensors[place], row) for place in places}
    lacking = [name for name, stored in template.tensors.items() if name not in found and len(stored.shape) > 1]
    problems += [f"{template.path} has {name}, which has no counterpart in {source.path}" for name in lacking]
    if problems:
        raise MismatchError(f"{'; '.join(problems)}; {_ADVICE}")
    return found


def as_matrix(value: QuantizedTensor) -> Tensor:
    """Return the numbers of a tensor in float32, as the (rows, columns) matrix of its codes."""
    return WeightMatrix(value.dequantize(torch.float32), value.layout).whole()


def proved_order(template: GGUFFile, matched: Match, value: QuantizedTensor) -> Tensor | None:
    """Compare a weight with the template's, row by row, and return the order of rows in which they agree.

    Returns:
        for each row of the template, the row of the weight; None if the rows are in the same order.

    Raises:
        MismatchError: if they agree in no order, or in two.
    """
    stored, weight = matched.stored, as_matrix(value)
    if (math.prod(stored.shape[:-1]), stored.shape[-1]) != weight.shape:
        raise MismatchError(f"{matched.row.name} has shape {value.shape}, {stored.name} has {stored.shape}; {_ADVICE}")
    numbers = stored.decode().reshape(weight.shape).float()
    orders = _orders(template, stored, len(weight))
    agreement = [_least_cosine(weight if order is None else weight[order], numbers) for order in orders]
    fitting = [order for order, cosine in zip(orders, agreement, strict=True) if cosine >= LEAST_COSINE]
    if len(fitting) == 1:
        return fitting[0]
    how = "in two orders of their rows" if fitting else f"in no order of their rows (cosine {max(agreement):.2f})"
    raise MismatchError(f"{matched.row.name} agrees with {stored.name} of {template.path} {how}; {_ADVICE}")


def prove_kept(template: GGUFFile, matched: Match, value: Tensor) -> bool:
    """Compare a tensor that is not quantized with the template's.

    Returns:
        whether the template has the same values, up to the rounding to its dtype. It may have a quantized tensor.

    Raises:
        MismatchError: if they do not agree.
    """
    stored = matched.stored
    if stored.shape == tuple(value.shape):
        numbers, orders = stored.decode(), _orders(template, stored, value.shape[0] if value.shape else 1)
        ordered = [value if order is None else value[order] for order in orders]
        if any(_same_after_rounding(one, numbers) for one in ordered):
            return True
        close = not stored.is_plain and any(_least_cosine(one.float(), numbers) >= LEAST_COSINE for one in ordered)
        if close and not matched.row.tuned:
            return False
    raise MismatchError(
        f"{matched.row.name} ({matched.row.fate}, shape {tuple(value.shape)}) has other values than {stored.name} of "
        f"{template.path} ({stored.type}, shape {stored.shape}); {_ADVICE}"
    )


def _orders(template: GGUFFile, stored: StoredTensor, rows: int) -> list[Tensor | None]:
    """Return the orders in which a template may have the rows of a weight."""
    order = row_order(template, stored.name, rows)
    return [None] if order is None or torch.equal(order, torch.arange(rows)) else [None, order]


def _same_after_rounding(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _least_cosine(one: Tensor, other: Tensor) -> float:
    """Return the least cosine of two rows, among the rows of `other` that are not nearly zero; zero without any."""
    if not other.numel():
        return 0.0
    norms = other.norm(dim=-1)
    counted = norms > _LEAST_NORM * norms.max()
    cosines = torch.nn.functional.cosine_similarity(one, other, dim=-1)[counted]
    return float(cosines.min()) if cosines.numel() else 0.0
