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


def is_transforming() -> bool:
    """Whether a compiler traces something that is transformed."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# What `torch.compiler.assume_constant_result` does; that would import the compiler, with every `import fewbits`.
is_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]
