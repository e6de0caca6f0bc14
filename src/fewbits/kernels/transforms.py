"""Whether a transform of torch.func, or forward mode, is at work: they know no kernel's operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Whether a transform of torch.func stands behind a tensor.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def is_transformed(x: Tensor) -> bool:
    """Whether one does, or forward mode is at work."""
    return is_wrapped(x) or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transforming() -> bool:
    """Whether a compiler traces something that is transformed."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
