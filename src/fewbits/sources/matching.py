"""Find the parameters of a model that hold the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fewbits.checkpoint.digests import digest
from fewbits.errors import MismatchError
from fewbits.nn.storage import View
from fewbits.nn.walk import slots

_Contents = tuple[tuple[int, ...], str]


def matched_parameters(model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Find the parameter with the same shape and values as each tensor. Names only decide between equal parameters.

    Args:
        model: the model.
        names: the names of the tensors.
        read: returns a tensor.

    Returns:
        the name of the parameter for each tensor; the first name, if it has several.

    Raises:
        MismatchError: naming all tensors without a parameter, and those that several parameters fit equally well.
    """
    parameters: dict[_Contents, list[str]] = {}
    views = set()
    for slot in slots(model):
        view = View.of(slot.tensor)
        if slot.is_parameter and slot.tensor.is_floating_point() and view not in views:
            views.add(view)
            parameters.setdefault(_contents(slot.tensor), []).append(slot.name)
    found, missing = {}, []
    for name in names:
        candidates = _most_alike(name, parameters.get(_contents(read(name)), []))
        if len(candidates) == 1:
            found[name] = candidates[0]
        else:
            missing.append(f"{name} (equal to {', '.join(candidates)})" if candidates else name)
    if missing:
        raise MismatchError(
            f"{len(missing)} of the tensors to quantize are not exactly one parameter of {type(model).__name__}, with "
            f"the same shape and values: {', '.join(missing)}. Load the model from these files in float32 or in their "
            "own dtype, or exclude these tensors"
        )
    return found


def _contents(tensor: Tensor) -> _Contents:
    """Return the shape and a digest of the values. The same numbers in a wider dtype are equal."""
    return tuple(tensor.shape), digest(tensor.detach().to("cpu", torch.float32))


def _most_alike(name: str, candidates: list[str]) -> list[str]:
    """Return the candidates that share the most parts with a name, counted from the end."""
    lengths = {candidate: _common_end(name, candidate) for candidate in candidates}
    return [candidate for candidate in candidates if lengths[candidate] == max(lengths.values())]


def _common_end(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
