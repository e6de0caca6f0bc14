"""Read a pickle of `torch.save` without importing or calling anything that it names.

A state dict needs few of the opcodes of protocol 2, and few names of classes and functions. Tensors become descriptions
of where their bytes are. Any other object that a named class or function would make becomes a `Made`.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch

from fewbits.errors import FormatError
from fewbits.numerics.dtypes import dtype_from_name
from fewbits.numerics.layout import MAX_AXES

#: Errors that opcodes in an invalid order may raise.
_UNREADABLE = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, EOFError, struct.error, pickle.UnpicklingError,
)  # fmt: skip

#: The opcodes that work here as in Python's own unpickler.
_OPCODES = (
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINSTRING", "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT",
    "APPEND", "APPENDS", "GLOBAL", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
)  # fmt: skip

#: The dtypes of the classes of storage. An untyped storage holds bytes.
_STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128, "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip


@attrs.frozen
class Name:
    """A class or a function, by its dotted name."""

    dotted: str


@attrs.frozen
class Made:
    """A stand-in for the result of a class or function; nothing is called. It ignores all that is put into it."""

    maker: str

    def append(self, value: object) -> None:
        """Ignore an element."""

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore an entry."""


@attrs.frozen
class Storage:
    """Some bytes, by the name of their record."""

    key: str
    dtype: torch.dtype


@attrs.frozen
class SavedTensor:
    """A tensor as the file describes it: its storage may have fewer bytes than the tensor would need.

    Attributes:
        storage: the bytes of the tensor.
        offset: the place of the first element in the storage, in elements.
        shape: the shape.
        stride: the strides, in elements.
        dtype: the dtype.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def read_pickle(data: bytes, where: object) -> object:
    """Return the object that some bytes describe.

    Args:
        data: A pickle of protocol 2.
        where: the name of the file in errors.

    Raises:
        FormatError: if they are no pickle, or one that no state dict needs.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _UNREADABLE as error:
        why = f"{type(error).__name__}: {error}"
        raise FormatError(f"{where} holds no pickle that torch.save would write of a state dict: {why}") from None


# Python's own unpickler, written in Python: the one in C takes memory for as many objects as a number in the file says.
class _Unpickler(pickle._Unpickler):
    """Knows the opcodes that a state dict needs; others are a KeyError. Imports and calls nothing that a file names."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, identity: Any) -> Storage | Made:
        kind, name, key, _location, _count = identity
        if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str):
            raise TypeError("there is no storage where one should be")
        dtype = _STORAGES.get(name.dotted)
        return Made(name.dotted) if dtype is None else Storage(key, dtype)

    def call(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        self.stack.append(_made(maker, arguments))

    def skip_attributes(self) -> None:
        """Skip attributes of the last object, such as the versions in a state dict; they are not needed."""
        self.stack.pop()

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        # To hash a tuple of tuples of tuples, each twice the one before, would take for ever.
        if not isinstance(key, (str, int, float, type(None))):
            raise TypeError(f"a {type(key).__name__} is the name of an entry")
        self.stack[-1][key] = value

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES)},
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: skip_attributes,
    }


def _made(maker: Name, arguments: tuple[Any, ...]) -> object:
    """Evaluate a call to a state dict, a tensor, a part of a tensor, or `Made`."""
    name = maker.dotted
    if name == "torch._tensor._rebuild_from_type_v2":
        # A tensor with attributes.
        inner, kind, arguments, _ = arguments
        name = inner.dotted if kind in _TENSORS else kind.dotted
    if name == "collections.OrderedDict" and not arguments:
        return OrderedDict()
    if name == "torch.Size" and isinstance(arguments[0], tuple):
        return arguments[0]
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return _tensor(name, *arguments)
    return Made(name)


_TENSORS = (Name("torch.Tensor"), Name("torch.nn.parameter.Parameter"), Name("torch.nn.parameter.Buffer"))


def _tensor(
    maker: str, storage: object, offset: Any, shape: Any, stride: Any, _grad: object, _hooks: object, *more: Any
) -> SavedTensor | Made:
    """A tensor; `Made` if its storage is of a kind that holds no plain numbers, or something is left to be computed."""
    if isinstance(storage, Made):
        return storage
    if not isinstance(storage, Storage) or not all(map(_are_sizes, ((offset,), shape, stride))):
        raise TypeError("a tensor has no storage, or sizes that are none")
    if len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} has the strides {stride}")
    dtype = storage.dtype
    if maker.endswith("_v3"):  # its storage holds bytes
        dtype, more = dtype_from_name(more[0].dotted.removeprefix("torch.")), more[1:]
    if any(more):  # a conjugation or a negation
        return Made(maker)
    return SavedTensor(storage, offset, shape, stride, dtype)


def _are_sizes(values: object) -> bool:
    # Many tensors can have one long shape between them: all of them would be looked at for each.
    if not isinstance(values, tuple) or len(values) > MAX_AXES:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)
