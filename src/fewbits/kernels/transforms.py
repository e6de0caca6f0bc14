"""Detect transforms of torch.func and forward-mode differentiation, which do not know the operations of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Whether a transform of torch.func wraps a tensor.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def is_transformed(x: Tensor) -> bool:
    """Whether a transform wraps a tensor, or forward mode is active."""
    return is_wrapped(x) or forward_ad._current_level >= 0


def is_transforming() -> bool:
    """Whether a compiler traces code under a transform."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# The effect of `torch.compiler.assume_constant_result`, which would import the compiler with every `import fewbits`.
is_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]
