"""`InputCapture`: sees the inputs that weights are multiplied with, in any module or function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewbits.numerics.layout import Layout

aten = torch.ops.aten

#: Takes the name of a weight, the rows of its matrix that are multiplied, and their inputs, (inputs, columns).
Receive = Callable[[str, slice, Tensor], None]


@attrs.frozen(eq=False)
class Watched:
    """A weight whose inputs are looked for.

    Attributes:
        name: its name in the model.
        tensor: the parameter.
        layout: how it is cut into rows and columns.
    """

    name: str
    tensor: Tensor
    layout: Layout

    def rows_of(self, operand: Tensor) -> slice | None:
        """Return the rows of the weight's matrix that a matrix shares memory with, in order; None for other memory.

        Args:
            operand: (outputs, inputs), perhaps a view of the weight.
        """
        columns = self.layout.columns
        if operand.shape[1] != columns or not self._is_view(operand) or not self.tensor.is_contiguous():
            return None
        strides = torch.empty(self.layout.view, device="meta").permute(self.layout.permutation).stride()
        rows, inputs = strides[: self.layout.row_axes], strides[self.layout.row_axes :]
        if columns > 1 and (len(inputs) != 1 or operand.stride(1) != inputs[0]):
            return None
        first = self._row_at(operand, rows)
        last = self._row_at(operand[-1:], rows)
        if first is None or last is None or last - first != len(operand) - 1:
            return None
        return slice(first, last + 1)

    def _is_view(self, operand: Tensor) -> bool:
        return operand.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()

    def _row_at(self, operand: Tensor, strides: tuple[int, ...]) -> int | None:
        """Return the row of the weight with which a view of it starts; None if it starts within a row."""
        offset = int(operand.storage_offset() - self.tensor.storage_offset())
        row = start = 0
        for axis, stride in zip(self.layout.permutation, strides, strict=False):
            # The weight is contiguous, so its axes divide the offset like the digits of a number.
            index = offset // stride % self.layout.view[axis]
            row = row * self.layout.view[axis] + index
            start += index * stride
        return row if start == offset else None


class InputCapture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the inputs of weights, while it is entered.

    It looks at the products that torch computes: matrix products and convolutions with a weight, or with some rows of
    it, as experts and attention projections are used. Products with anything that was computed from a weight, such as a
    dequantized or normalized weight, are not seen.

    Args:
        weights: the weights to look for.
        receive: called before each product with one of them.
    """

    def __init__(self, weights: list[Watched], receive: Receive) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._receive = receive
        self._weights: dict[int, list[Watched]] = {}
        for weight in weights:
            self._weights.setdefault(weight.tensor.untyped_storage().data_ptr(), []).append(weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Look at one operation, then run it."""
        find = _PRODUCTS.get(func)
        if find is not None and any(self._of(arg) for arg in args):
            for x, operand in find(*args):
                self._show(x, operand)
        elif func is aten.convolution.default and (weights := self._of(args[1])):
            for weight in weights:
                if args[1].shape == weight.tensor.shape and args[1].data_ptr() == weight.tensor.data_ptr():
                    for rows, x in _convolved(weight, args):
                        self._receive(weight.name, rows, x)
        return func(*args, **(kwargs or {}))

    def _of(self, operand: object) -> list[Watched]:
        if not isinstance(operand, Tensor) or not self._weights:
            return []
        return self._weights.get(operand.untyped_storage().data_ptr(), [])

    def _show(self, x: Tensor, operand: Tensor) -> None:
        for weight in self._of(operand):
            rows = weight.rows_of(operand)
            if rows is not None and x.numel():
                self._receive(weight.name, rows, x)


Pairs = Iterator[tuple[Tensor, Tensor]]


def _product(left: Tensor, right: Tensor) -> Pairs:
    """Yield (inputs, the other operand as (outputs, inputs)) for both ways to read a product of two matrices."""
    yield left, right.mT
    yield right.mT, left


def _batched(left: Tensor, right: Tensor) -> Pairs:
    for pair in zip(left, right, strict=True):
        yield from _product(*pair)


def _grouped(left: Tensor, right: Tensor, ends: Tensor | None = None, *_: object) -> Pairs:
    if ends is None or left.dim() != 2 or right.dim() != 3:
        return
    start = 0
    for stop, own in zip(ends.tolist(), right, strict=True):
        yield left[start:stop], own.mT
        start = stop


_PRODUCTS: dict[Any, Callable[..., Pairs]] = {
    aten.mm.default: _product,
    aten.addmm.default: lambda _, left, right: _product(left, right),
    aten.bmm.default: _batched,
    aten.baddbmm.default: lambda _, left, right: _batched(left, right),
    aten.mv.default: lambda left, right: _product(left, right.unsqueeze(1)),
    aten.addmv.default: lambda _, left, right: _product(left, right.unsqueeze(1)),
}
if hasattr(aten, "_grouped_mm"):  # torch 2.6 has no grouped products
    _PRODUCTS[aten._grouped_mm.default] = _grouped


def _convolved(weight: Watched, arguments: tuple[Any, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each group of a convolution, with their inputs, a sample at a time."""
    x, _, _, stride, padding, dilation, transposed, output_padding, groups = arguments
    rows, kernel = weight.layout.rows // groups, tuple(weight.tensor.shape[2:])
    for sample in x if x.dim() == len(stride) + 2 else x.unsqueeze(0):
        for group, channels in enumerate(sample.chunk(groups)):
            if transposed:
                # The same as a convolution of the input, with zeros between its elements, with the flipped kernel.
                sides = [dilation[axis] * (size - 1) - padding[axis] for axis, size in enumerate(kernel)]
                ends = [(side, side + more) for side, more in zip(sides, output_padding, strict=True)]
                patches = _patches(_spread(channels, stride), kernel, [1] * len(kernel), ends, dilation)
                patches = patches.flip(list(range(2, patches.dim())))
            else:
                patches = _patches(channels, kernel, stride, [(size, size) for size in padding], dilation)
            yield slice(group * rows, (group + 1) * rows), patches.flatten(1)


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """Put zeros between the elements of (channels, ...)."""
    shape = [(size - 1) * step + 1 for size, step in zip(x.shape[1:], stride, strict=True)]
    spread = x.new_zeros(len(x), *shape)
    spread[(slice(None), *(slice(None, None, step) for step in stride))] = x
    return spread


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[tuple[int, int]], dilation: list[int]
) -> Tensor:
    """Return the inputs of a convolution at each position, (positions, channels, *kernel)."""
    # Negative padding, which a transposed convolution may have, cuts off the ends.
    x = F.pad(x, [end for ends in reversed(padding) for end in ends])
    for axis, size in enumerate(kernel):
        width = (size - 1) * dilation[axis] + 1
        x = x.unfold(1 + axis, width, stride[axis])[..., :: dilation[axis]]
    axes = range(1, 1 + len(kernel))
    return x.permute(*axes, 0, *range(1 + len(kernel), x.dim())).flatten(0, len(kernel) - 1)
