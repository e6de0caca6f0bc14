"""Check that a tensor is plain: dense, with all its bytes in memory. Only plain tensors can be stored."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fewbits.errors import SourceError
from fewbits.numerics.layout import MAX_AXES

#: Advice for parameters that are distributed over processes.
GATHER = (
    "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) first"
)

#: Dtypes of integers narrower than a byte: torch has names for them, but no operations.
_UNCOPIED = re.compile(r"torch\.u?int[1-7]")

#: Advice for tensors of these classes.
_ADVICE = {"DTensor": GATHER, "FakeTensor": "make it outside of FakeTensorMode, with its numbers"}


def unplain_kind(tensor: Tensor) -> str | None:
    """Say why a tensor's class or layout is not plain, as the end of a sentence that begins with its name; else None.

    A subclass is plain unless it overrides `__torch_dispatch__`. A subclass that does keeps its numbers elsewhere, and
    its own data pointer is not valid.
    """
    cls = type(tensor)
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        advice = _ADVICE.get(cls.__name__, "make a plain tensor of it first")
        return f"is a {cls.__module__}.{cls.__qualname__}; only plain tensors can be stored: {advice}"
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.layout != torch.strided:
            return f"has layout {tensor.layout}; only dense tensors can be stored: call to_dense() first"
        if tensor.is_nested:
            return "is a nested tensor; only dense tensors can be stored: take its parts one by one"
        if tensor.is_quantized:
            return f"is quantized already, in {tensor.dtype}; take the float tensor that it was made from"
    return None


def not_plain(tensor: Tensor) -> str | None:
    """Say why a tensor's bytes cannot be read, as the end of a sentence that begins with its name; else None."""
    if kind := unplain_kind(tensor):
        return kind
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialized; run the model once before it is prepared"
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.dim() > MAX_AXES:
            return f"has {tensor.dim()} axes; at most {MAX_AXES} can be stored: reshape it"
        if _UNCOPIED.fullmatch(str(tensor.dtype)):
            return f"is of dtype {tensor.dtype}, which torch cannot even copy; store its numbers as int8 or uint8"
        if tensor.is_meta:
            return "is on the meta device and has no data; load the model's weights first"
        if tensor.numel() and not _has_memory(tensor):
            return "has no memory for its elements, or too little (was it freed or sharded?); restore it first"
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether all elements of a tensor lie within its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    try:
        stop = (tensor.storage_offset() + last + 1) * tensor.itemsize
        return tensor.data_ptr() != 0 and stop <= tensor.untyped_storage().nbytes()
    except RuntimeError:  # wrapper tensors, such as those of torch.func, have no storage
        return False


def plain(tensor: Tensor, name: str = "a tensor") -> Tensor:
    """Return a `torch.Tensor` over the memory of `tensor`, detached from autograd.

    Args:
        tensor: the tensor; a parameter or a subclass is allowed.
        name: the tensor's name in error messages.

    Raises:
        SourceError: if `tensor` is not plain: dense, computed by torch, with all its bytes in memory. `not_plain` lists
            the cases.
    """
    if why := not_plain(tensor):
        raise SourceError(f"{name} {why}")
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()
