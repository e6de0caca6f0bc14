"""What a kernel asks while `torch.compile` traces its operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor


def is_traced(x: Tensor) -> bool:
    """Whether a compiler traces the operations on a tensor."""
    return isinstance(x, FunctionalTensor)


def surely(comparison: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes holds for every number that a symbol may stand for.

    A plain `if` would make a guard of it, and guards of several layers multiply the graphs.
    """
    if not isinstance(comparison, torch.SymBool):
        return bool(comparison)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # the compiler has imported it

    return statically_known_true(comparison)


def in_rows(x: Tensor) -> Tensor:
    """Return a contiguous tensor of two axes; a compiler computes it once, and in this order of memory.

    Otherwise inductor may choose other strides, or compute an element anew wherever a product needs it.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, (x.shape[1], 1)) if is_traced(x) else x
