"""Choose the layout of a weight, and the kernel that computes a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.blocks import ByteBlocks, PairBlocks, TileBlocks, WordBlocks
from fewbits.kernels.integers import FloatSums, IntMM, TileIntMM
from fewbits.kernels.packed_mm import BytePairMM, Int4PackMM, Int8PackMM
from fewbits.kernels.reference import REFERENCE
from fewbits.kernels.weight_layouts import WeightLayout

#: All kernels, the most preferred first. The last one computes everything; the others are measured against it.
KERNELS: tuple[Kernel[Any], ...] = (
    Int8PackMM(),
    IntMM(),
    FloatSums(),
    ByteBlocks(),
    BytePairMM(),
    PairBlocks(),
    Int4PackMM(),
    TileIntMM(),
    TileBlocks(),
    WordBlocks(),
    REFERENCE,
)


def check_compute(compute: object) -> None:
    """Refuse a value that is not a setting of `fewbits.set_compute`.

    Raises:
        ArgumentError: For anything but "auto", "exact" and "int8".
    """
    if compute not in get_args(Compute):
        raise ArgumentError(f"compute must be 'auto', 'exact' or 'int8', not {compute!r}")


def refusal(kernel: Kernel[Any], weight: WeightLayout, compute: Compute) -> str | None:
    """Say why a kernel may not, or cannot, compute with a weight; None if it does."""
    activations = weight.spec.activations
    if kernel is not REFERENCE:
        if compute == "exact":
            return "compute is 'exact'"
        if activations and not kernel.rounds_inputs:
            return f"the scheme has {activations} int8 inputs"
        if kernel.rounds_inputs and not activations and compute != "int8":
            return f"compute is {compute!r}, and the scheme does not round inputs"
    return kernel.supports(weight)


def preferred(weight: WeightLayout, compute: Compute, kernels: Sequence[Kernel[Any]] = KERNELS) -> Kernel[Any]:
    """Return the first kernel that computes with a weight once it has prepacked it."""
    return next((kernel for kernel in kernels if refusal(kernel, weight, compute) is None), REFERENCE)


def kernels_reading(weight: WeightLayout, compute: Compute, kernels: Sequence[Kernel[Any]]) -> tuple[Kernel[Any], ...]:
    """List the kernels that compute with a weight in the layout that it has now, most preferred first."""
    return tuple(
        kernel
        for kernel in dict.fromkeys([*kernels, REFERENCE])
        if isinstance(weight, kernel.weight_layout) and refusal(kernel, weight, compute) is None
    )


def choose(kernels: Sequence[Kernel[Any]], x: Tensor, rows: int, weight: WeightLayout) -> Kernel[Any]:
    """Choose the kernel of one call; the reference if the input has no rows."""
    for kernel in kernels if rows else ():
        if kernel.takes(x, rows, weight) is None:
            return kernel
    return REFERENCE
