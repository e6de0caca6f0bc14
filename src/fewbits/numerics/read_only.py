"""`ReadOnlyTensor`: a tensor that can be computed with, but not changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import ReadOnlyWeightError

#: Operators that change their left side, though their names do not end in a single underscore.
_OPERATORS = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
_CHANGING = {"__setitem__", *(f"__i{operator}__" for operator in _OPERATORS.split())}

#: Torch's names for the argument that an in-place function changes, if it is passed by keyword.
_CHANGED_NAMES = ("self", "input", "tensor")

#: Attributes that may be set, and to which value: libraries freeze all weights and drop all gradients.
_HARMLESS = (("requires_grad", False), ("grad", None))

_AS_NUMPY = (Tensor.numpy, Tensor.__array__)


class ReadOnlyTensor(Tensor):
    """A tensor that raises on every attempt to change it, because no one would ever read the changed memory.

    Computing with it gives plain tensors. Tensors that share its memory (views, `detach`, `data`) are read-only too.
    Copies, `deepcopy` and pickles are plain. Memory that leaves torch other than through numpy is not guarded.

    Torch never sees the subclass: every function is called with the plain tensor behind it. So results, modes and
    transforms are the same as with a plain tensor.
    """

    #: A plain tensor over the same memory.
    plain: Tensor
    _what: str

    @classmethod
    def of(cls, plain: Tensor, what: str) -> Tensor:
        """Return a read-only tensor over the same memory; other subclasses of `Tensor` are returned unchanged.

        Args:
            plain: the tensor.
            what: the first words of the error message, such as ``"Linear.weight is quantized"``.
        """
        if type(plain) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(plain):
            return plain
        guarded = plain.as_subclass(cls)
        guarded.plain, guarded._what = plain, what
        return guarded

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with plain tensors.

        Raises:
            ReadOnlyWeightError: if `func` would change a read-only tensor.
        """
        if not all(issubclass(kind, Tensor) for kind in types):
            return NotImplemented
        named = dict(kwargs or {})
        if torch.compiler.is_compiling():  # the compiler cannot trace the code below
            return func(*_plain(tuple(args)), **_plain(named))
        for changed in _read_only_in(_changed_by(func, args, named)):
            raise ReadOnlyWeightError(
                f"{changed._what}; reading it gives a copy, and changes to the copy would be lost: get a float model "
                "with fewbits.dequantize(model) first, or a tensor of your own with .clone()"
            )
        result = func(*_plain(tuple(args)), **_plain(named))
        if func in _AS_NUMPY and result.base is not None:
            result.flags.writeable = False
        return _guarded(result, list(_read_only_in([*args, *named.values()])))

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the rows, read-only."""
        return iter(self.unbind(0))


def _changed_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument that a call changes, judged by the name of the function; None if it changes none."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else next((kwargs[known] for known in _CHANGED_NAMES if known in kwargs), None)
    if name == "__set__":
        return None if any(func.__self__.__name__ == key and args[1] is value for key, value in _HARMLESS) else first
    if name == "requires_grad_":
        return first if [*args[1:], *kwargs.values()] != [False] else None
    in_place = name in _CHANGING or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    return first if in_place else kwargs.get("out")


def _read_only_in(value: Any) -> Iterator[ReadOnlyTensor]:
    if isinstance(value, ReadOnlyTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _read_only_in(part)


def _plain(value: Any) -> Any:
    """Replace read-only tensors in `value` by their plain tensors."""
    if isinstance(value, ReadOnlyTensor):
        return value.plain
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    return _like(value, [_plain(part) for part in value])


def _guarded(result: Any, arguments: Sequence[ReadOnlyTensor]) -> Any:
    """Make a result read-only where it shares memory with a read-only argument."""
    if isinstance(result, (list, tuple)) and any(isinstance(part, Tensor) for part in result):
        return _like(result, [_guarded(part, arguments) for part in result])
    if type(result) is not Tensor or result.layout is not torch.strided:
        return result
    for argument in arguments:
        if result is argument.plain:
            return argument
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(result)
        if not wrapped and torch._C._is_alias_of(result, argument.plain):  # type: ignore[attr-defined]
            return ReadOnlyTensor.of(result, argument._what)
    return result


def _like(value: Any, parts: list[Any]) -> Any:
    """Return a list, tuple or named tuple of the same class with other parts."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
