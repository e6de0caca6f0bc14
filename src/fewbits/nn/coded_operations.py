"""Operations on coded tensors that need no numbers, and products that kernels compute.

A function here computes one operation of torch. It returns NotImplemented for arguments that it does not take; then the
operation is computed with numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fewbits.kernels.reference import is_transformed
from fewbits.nn import recurrent
from fewbits.nn.coded import CODED_DTYPES, OF_CODED, OF_FUNCTIONS, OF_REPEATED, CodedTensor, plainly

aten = torch.ops.aten


def _shape(weight: CodedTensor) -> tuple[int, ...]:
    """Return the shape, without a call of torch, of a weight that is not repeated."""
    return weight._stack.tensor_shape


def _transpose(weight: CodedTensor, *axes: int) -> Any:
    count = len(_shape(weight))
    if not all(-count <= axis < count for axis in axes):
        return NotImplemented  # torch's own error
    both = {axis % count for axis in axes or (0, 1)}
    is_last = both == {count - 2, count - 1}
    return weight.with_stack(weight._stack.transposed) if is_last else NotImplemented


def _permute(weight: CodedTensor, axes: Sequence[int]) -> Any:
    count = len(_shape(weight))
    if not all(-count <= axis < count for axis in axes):
        return NotImplemented
    order = [axis % count for axis in axes]
    *first, before, last = range(count)
    return weight.with_stack(weight._stack.transposed) if order == [*first, last, before] else NotImplemented


def _same(weight: CodedTensor) -> CodedTensor:
    return weight.with_stack(weight._stack)


def _has_first_axis(weight: CodedTensor, axis: int) -> bool:
    """Whether an axis is the first of the stack's shape, so that it can be cut without decoding."""
    count = len(_shape(weight))
    return axis % count == 0 and not (count == 2 and weight._stack.is_transposed)


def _select(weight: CodedTensor, axis: int, index: int) -> Any:
    shape = _shape(weight)
    if len(shape) != 3 or not _has_first_axis(weight, axis) or not -shape[0] <= index < shape[0]:
        return NotImplemented
    return weight.with_stack(weight._stack.matrix(index % shape[0]))


def _slice(weight: CodedTensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    if not _has_first_axis(weight, axis) or step != 1:
        return NotImplemented
    first, last, _ = slice(start, stop).indices(_shape(weight)[0])
    return weight.with_stack(weight._stack.part(first, last - first)) if last > first else NotImplemented


def _split(weight: CodedTensor, size: int | Sequence[int], axis: int = 0) -> Any:
    if not _has_first_axis(weight, axis) or (isinstance(size, int) and size < 1):
        return NotImplemented
    length = _shape(weight)[0]
    sizes = [min(size, length - start) for start in range(0, length, size)] if isinstance(size, int) else size
    if sum(sizes) != length or min(sizes) < 1:
        return NotImplemented
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return [weight.with_stack(weight._stack.part(start, count)) for start, count in zip(starts, sizes, strict=True)]


def _unbind(weight: CodedTensor, axis: int = 0) -> Any:
    shape = _shape(weight)
    if len(shape) != 3 or not _has_first_axis(weight, axis):
        return NotImplemented
    return [weight.with_stack(weight._stack.matrix(index)) for index in range(shape[0])]


def _to_copy(weight: CodedTensor, *, dtype: torch.dtype | None = None, **rest: Any) -> Any:
    """Change the dtype, as autocast does."""
    others = [name for name, value in rest.items() if value not in (None, False)]
    # Decoding a weight of a narrow dtype in a wider one would skip the rounding to its own.
    keeps_rounding = weight._numbers in (torch.float32, dtype)
    if dtype not in CODED_DTYPES or not keeps_rounding or weight._root._floats is not None or others:
        return NotImplemented
    return CodedTensor(weight._stored, weight._stack, dtype)


def _mm(left: Tensor, right: Tensor) -> Any:
    output = None
    if isinstance(right, CodedTensor) and right._stack.is_transposed:
        output = right.product(left)
    elif isinstance(left, CodedTensor) and not left._stack.is_transposed and type(right) is Tensor:
        turned = left.product(right.mT.contiguous())
        output = None if turned is None else turned.mT
    return NotImplemented if output is None else output


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or isinstance(bias, CodedTensor):
        return NotImplemented
    output = _mm(left, right)
    if output is NotImplemented or not _adds(bias, output):
        return NotImplemented
    return output + bias


def _adds(bias: Tensor, output: Tensor) -> bool:
    """Whether a bias has the dtype and a shape with which it can be added in a product."""
    if bias.dtype != output.dtype or bias.dim() > output.dim():
        return False
    return all(own in (1, size) for own, size in zip(reversed(bias.shape), reversed(output.shape), strict=False))


def _mv(matrix: CodedTensor, vector: Tensor) -> Any:
    output = _mm(vector.unsqueeze(0), matrix.t()) if isinstance(matrix, CodedTensor) else NotImplemented
    return output if output is NotImplemented else output.squeeze(0)


def _bmm(left: Tensor, right: Tensor) -> Any:
    if not isinstance(right, CodedTensor):
        return NotImplemented
    outputs = [_mm(x, matrix) for x, matrix in zip(left, right.unbind(), strict=True)]
    return NotImplemented if any(output is NotImplemented for output in outputs) else torch.stack(outputs)


def _expand(weight: CodedTensor, shape: Sequence[int], *, implicit: bool = False) -> Any:
    """Repeat a matrix, as `torch.matmul` does for inputs of three axes with gaps."""
    same = [asked in (-1, size) for asked, size in zip(shape[1:], _shape(weight), strict=False)]
    is_matrix = len(_shape(weight)) == 2 and len(shape) == 3 and all(same) and shape[0] > 0
    return weight.repeated(shape[0]) if is_matrix else NotImplemented


def _view_repeated(weight: CodedTensor, shape: Sequence[int]) -> Any:
    return weight.repeated(weight._copies) if tuple(shape) == tuple(weight.shape) else NotImplemented


def _bmm_repeated(left: Tensor, right: Tensor) -> Any:
    if not isinstance(right, CodedTensor) or not right._stack.is_transposed or len(left) != len(right):
        return NotImplemented
    output = right.product(left.reshape(-1, left.shape[2]))
    return NotImplemented if output is None else output.view(*left.shape[:2], -1)


# The next two save operations: torch would show a transposition, a product and a selection one by one.


def _linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute a linear layer without gradients."""
    output = None if kwargs else _direct(*args)
    return plainly(func, args, kwargs) if output is None else output


def _direct(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    known = type(x) is Tensor and isinstance(weight, CodedTensor) and not isinstance(bias, CodedTensor)
    if not known or x.layout is not torch.strided or is_transformed(x):
        return None
    shape = _shape(weight)
    if weight._copies or len(shape) != 2 or weight._stack.is_transposed or torch.is_autocast_enabled("cpu"):
        return None
    if not x.dim() or x.shape[-1] != shape[1] or _records(x, weight, bias):
        return None
    output = weight.product(x.reshape(-1, x.shape[-1]))
    if output is None:
        return None
    if bias is not None:
        if bias.dim() != 1 or not _adds(bias, output):
            return None
        output = torch.add(output, bias)
    shaped: Tensor = output.view(*x.shape[:-1], output.shape[1])
    return shaped


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _item(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Select a matrix of a stack by its number."""
    weight, index = args
    is_known = isinstance(weight, CodedTensor) and not weight._copies and not _records(weight)
    if type(index) is int and is_known and weight._root._floats is None:
        found = _select(weight, 0, index)
        if found is not NotImplemented:
            return found
    return plainly(func, args, kwargs)


def _recurrent(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute few steps of a recurrent layer from codes; decode the weights once for more."""
    result = recurrent.steps(func, args)
    if result is not NotImplemented:
        return result
    args, kwargs = tree_map_only(CodedTensor, lambda weight: weight.floats, (list(args), dict(kwargs)))
    return func(*args, **kwargs)


def _grouped_mm(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Any:
    """Multiply the rows of each group, which end at `offs`, with a matrix of their own."""
    if not isinstance(weight, CodedTensor) or x.dim() != 2 or offs is None or bias is not None:
        return NotImplemented
    shape = _shape(weight)
    if len(shape) != 3 or len(offs) != shape[0] or out_dtype not in (None, x.dtype) or x.shape[1] != shape[1]:
        return NotImplemented
    output, start = x.new_zeros(x.shape[0], shape[2]), 0
    for index, stop in enumerate(offs.tolist()):
        if stop > start:
            matrix = weight.with_stack(weight._stack.matrix(index))
            part = _mm(x[start:stop], matrix)
            output[start:stop] = x[start:stop] @ matrix.floats if part is NotImplemented else part
        start = stop
    return output


def _index(weight: CodedTensor, indices: Sequence[Tensor | None]) -> Any:
    """Decode the matrices, or the rows, that an index names."""
    (first, *rest) = indices
    if rest or first is None or first.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    if weight._root._floats is not None or not _has_first_axis(weight, 0):
        return NotImplemented
    length = _shape(weight)[0]
    named, places = torch.unique(torch.where(first < 0, first + length, first), return_inverse=True)
    if named.numel() and not 0 <= int(named.min()) <= int(named.max()) < length:
        return NotImplemented  # torch's own error
    height = weight._stack.height
    rows = (named[:, None] * height + torch.arange(height) + weight._stack.start).flatten()
    found = weight._stored.matrix_rows(rows, weight._numbers).reshape(len(named), *weight._stack.shape[1:])
    return (found.mT.contiguous() if weight._stack.is_transposed else found)[places]


OF_CODED |= {
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten._to_copy.default: _to_copy,
    aten.expand.default: _expand,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.mv.default: _mv,
    aten.bmm.default: _bmm,
    aten.index.Tensor: _index,
}

if hasattr(aten, "_grouped_mm"):  # torch 2.6 has no grouped products
    OF_CODED[aten._grouped_mm.default] = _grouped_mm

OF_REPEATED |= {
    aten.view.default: _view_repeated,
    aten._unsafe_view.default: _view_repeated,
    aten.bmm.default: _bmm_repeated,
}

OF_FUNCTIONS |= {F.linear: _linear, Tensor.__getitem__: _item}
OF_FUNCTIONS |= dict.fromkeys(recurrent.OPERATIONS, _recurrent)
