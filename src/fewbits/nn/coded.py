"""`CodedTensor`: what a forward gets that reads a quantized weight; products with it go to kernels.

Fused experts, attention projections and many other forwards read a weight as an attribute, take a part of it, and
multiply. A coded tensor looks like the float weight. It knows its codes until an operation needs its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fewbits.errors import ReadOnlyWeightError
from fewbits.kernels.base import PreparedWeight
from fewbits.kernels.ops import product
from fewbits.kernels.stack import Stack

#: The dtypes of inputs that kernels take.
CODED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

#: Called with the weight, the part of it, and the input of each product that a kernel computes; for `explain`.
noted_by: ContextVar[Callable[[Any, PreparedWeight, Tensor], object] | None] = ContextVar("noted_by", default=None)

#: What computes operations from codes; `fewbits.nn.coded_operations` fills them. A function returns NotImplemented for
#: arguments that it does not take.
OF_CODED: dict[Any, Callable[..., Any]] = {}
#: The same for matrices that are repeated along a first axis.
OF_REPEATED: dict[Any, Callable[..., Any]] = {}
#: What computes functions of torch from codes, whose operations in C++ would need numbers.
OF_FUNCTIONS: dict[Any, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {}

#: Methods that give the memory of a tensor to somebody else.
_OF_MEMORY = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.tolist}

#: Methods that give a tensor another shape or other memory in place, which a coded tensor cannot follow.
_REBINDING = {
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.resize_,
    Tensor.resize_as_,
    Tensor.t_,
    Tensor.transpose_,
    Tensor.swapaxes_,
    Tensor.squeeze_,
    Tensor.unsqueeze_,
    Tensor.as_strided_,
}
_REFUSED = (
    "this weight is quantized; its shape and its memory cannot be replaced in place. Take a tensor of your own, with "
    ".clone()"
)


class Coded(Protocol):
    """The weight behind a coded tensor: see `fewbits.nn.packed.PackedWeight`."""

    def part(self, rows: slice) -> PreparedWeight | None: ...

    def matrix_rows(self, where: slice | Tensor, dtype: torch.dtype) -> Tensor: ...


class CodedTensor(Tensor):
    """A float weight whose numbers are decoded when an operation needs them.

    Products of an input with the weight, or with matrices or rows of it, are computed by kernels from the codes.
    Transposing, indexing and splitting the first axis give coded tensors again. Any other operation decodes what it
    needs, and computes with plain tensors. A forward may write to the weight that it has read, as to any copy; from
    then on the numbers count.

    Torch's functions in C++ for whole attention layers look for subclasses like this one, and let Python compute.
    """

    # To ask a coded tensor for its dtype or shape is a function of torch, which costs as much as a small operation.
    _stored: Coded
    _stack: Stack
    _numbers: torch.dtype
    _copies: int
    _whole: CodedTensor | None
    _floats: Tensor | None

    @staticmethod
    def __new__(
        cls, stored: Coded, stack: Stack, dtype: torch.dtype, root: CodedTensor | None = None, copies: int = 0
    ) -> CodedTensor:
        """Make the tensor of a weight or, with a root, of a part of it.

        Args:
            cls: this class.
            stored: the weight.
            stack: the matrix or the matrices that the tensor consists of.
            dtype: the dtype of the tensor.
            root: the tensor of the whole weight; None for that tensor itself.
            copies: the length of a first axis along which a matrix is repeated; 0 for no such axis.
        """
        shape, strides = stack.tensor_shape, stack.strides_in(stack if root is None else root._stack)
        if copies:
            shape, strides = (copies, *shape), (0, *strides)
        device = torch.device("cpu")
        made: CodedTensor = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        made._stored, made._stack, made._numbers, made._copies, made._floats = stored, stack, dtype, copies, None
        made._whole = root  # None for the whole weight: a tensor that held itself would wait for the garbage collector
        return made

    @property
    def _root(self) -> CodedTensor:
        """The tensor of the whole weight."""
        return self if self._whole is None else self._whole

    @property
    def floats(self) -> Tensor:
        """The numbers. Those of the whole weight are decoded once, those of a part each time."""
        root = self._root
        if root is self and self._floats is None:
            self._floats = self._decoded()
        whole = root._floats
        own = self._decoded() if whole is None else _view(whole, root._stack, self._stack)
        return own.expand(self._copies, *own.shape) if self._copies else own

    @property
    def writable(self) -> Tensor:
        """The numbers, in the memory of the whole weight, so that all parts see what is written to them."""
        _ = self._root.floats
        return self.floats

    def _decoded(self) -> Tensor:
        """Decode this part, with the strides that it has in the weight."""
        whole, rows = self._root._stack, self._stored.matrix_rows(self._stack.rows, self._numbers)
        matrices = rows.reshape(self._stack.shape)
        matrices = matrices.mT.contiguous().mT if whole.is_transposed else matrices
        return matrices.mT if self._stack.is_transposed else matrices

    def with_stack(self, stack: Stack) -> CodedTensor:
        """Return a part of this weight, or the transposed weight."""
        return CodedTensor(self._stored, stack, self._numbers, self._root)

    def repeated(self, copies: int) -> CodedTensor:
        """Return this matrix with a first axis along which it is repeated."""
        return CodedTensor(self._stored, self._stack, self._numbers, self._root, copies)

    def product(self, x: Tensor) -> Tensor | None:
        """Return ``x @ matrix.T``, for a matrix (outputs, inputs) and x (rows, inputs); None if no kernel computes."""
        stack = self._stack
        fits = len(stack.shape) == x.dim() == 2 and x.shape[1] == stack.shape[1] and x.shape[0] > 0
        is_plain = type(x) is Tensor and x.layout is torch.strided and x.dtype == self._numbers and x.is_cpu
        if self._root._floats is not None or not fits or not is_plain:
            return None
        prepared = self._stored.part(stack.rows)
        if prepared is None:
            return None
        if (note := noted_by.get()) is not None:
            note(self._stored, prepared, x)
        return product(x, prepared.weight, prepared.kernels).to(x.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call functions as they are; `__torch_dispatch__` sees the operations inside. Memory needs numbers."""
        if func in _OF_MEMORY:
            args = [args[0].writable, *args[1:]]
        elif func in _REBINDING:
            raise ReadOnlyWeightError(_REFUSED)
        elif func in OF_FUNCTIONS:
            return OF_FUNCTIONS[func](func, args, kwargs or {})
        return plainly(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute one operation: from codes if possible, otherwise from numbers."""
        named = dict(kwargs or {})
        repeats = any(isinstance(value, CodedTensor) and value._copies for value in args)
        compute = (OF_REPEATED if repeats else OF_CODED).get(func)
        result = NotImplemented if compute is None else compute(*args, **named)
        if result is NotImplemented:
            result = func.decompose(*args, **named)  # into operations that are looked at one by one
        return _from_floats(func, args, named) if result is NotImplemented else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain tensor."""
        return self.floats.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a plain tensor."""
        return self.floats.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.floats)


def plainly(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function of torch; the operations inside it come to `CodedTensor.__torch_dispatch__`."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _view(floats: Tensor, whole: Stack, part: Stack) -> Tensor:
    """Return a part of a weight as a view."""
    matrices = floats.mT if whole.is_transposed else floats
    first = part.start - whole.start
    if len(whole.shape) > len(part.shape):
        matrices, first = matrices[first // whole.height], first % whole.height
    rows = matrices[first // part.height : first // part.height + part.shape[0]]
    return rows.mT if part.is_transposed else rows


def _from_floats(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation with plain tensors. An operation in place changes the numbers of a coded tensor."""
    if func._schema.name == "aten::set_":
        raise ReadOnlyWeightError(_REFUSED)
    changes = func._schema.is_mutable
    # A forward may write to a view that it takes of a weight.
    shares = changes or any(found.alias_info is not None for found in func._schema.returns)
    plain: dict[int, CodedTensor] = {}

    def of(tensor: CodedTensor) -> Tensor:
        floats = tensor.writable if shares else tensor.floats
        plain[id(floats)] = tensor
        return floats

    given = tree_map_only(CodedTensor, of, (list(args), dict(kwargs)))
    result = func(*given[0], **given[1])
    return tree_map_only(Tensor, lambda found: plain.get(id(found), found), result) if changes else result
