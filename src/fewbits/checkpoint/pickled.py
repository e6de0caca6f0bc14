"""Read a pickle of `torch.save` without importing or calling anything that it names.

A state dict takes few of the opcodes of protocol 2, and a handful of the names that they can bring. Tensors become
descriptions of where their bytes are; any other object that a name would make becomes `Made`, and stays that.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from fewbits.errors import FormatError
from fewbits.numerics.dtypes import dtype_from_name
from fewbits.numerics.layout import MAX_AXES

#: Errors that opcodes in an invalid order may raise.
_UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError)

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
    """A stand-in for the result of a class or function; nothing is called."""

    maker: str


@attrs.frozen
class Storage:
    """Some bytes, by the name of their record."""

    key: str
    dtype: torch.dtype


@attrs.frozen
class SavedTensor:
    """A tensor as it was saved. Its numbers are as the file has them: nothing says that its storage holds them.

    Attributes:
        storage: where its bytes are.
        offset: of its first element, in elements.
        shape: of the tensor.
        stride: of the tensor, in elements.
        dtype: of the tensor.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def read_pickle(data: bytes, where: object) -> object:
    """The object that some bytes describe.

    Args:
        data: a pickle of protocol 2.
        where: names the file in errors.

    Raises:
        FormatError: if they are no pickle, or one that no state dict needs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except _UNREADABLE as error:
        raise FormatError(f"{where} holds no pickle that torch.save would write of a state dict: {error}") from None


class _Machine:
    """The stack of objects that opcodes work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one opcode."""
        if opcode in _PUSHED:
            self.stack.append(argument)
        elif opcode in _NEW:
            self.stack.append(_NEW[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        else:
            raise ValueError(f"the opcode {opcode} is not one of them")

    def mark(self, _: object) -> None:
        self._marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        """Everything since the last mark."""
        start = self._marks.pop()
        taken, self.stack[start:] = self.stack[start:], []
        return taken

    def remember(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def name(self, text: str) -> None:
        self.stack.append(Name(".".join(text.split(" ", 1))))

    def tuple_of_marked(self, _: object) -> None:
        self.stack.append(tuple(self._marked()))

    def tuple_of(self, count: int) -> None:
        taken, self.stack[-count:] = tuple(self.stack[-count:]), []
        if len(taken) != count:
            raise IndexError("the stack is too short")
        self.stack.append(taken)

    def append(self, _: object) -> None:
        self._extend([self.stack.pop()])

    def append_marked(self, _: object) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], Made):
            self.stack[-1].extend(values)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_marked(self, _: object) -> None:
        items = self._marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        # To hash a tuple of tuples of tuples, each twice the one before, would take for ever.
        if not isinstance(key, (str, int, float, type(None))):
            raise TypeError(f"a {type(key).__name__} is the name of an entry")
        if not isinstance(self.stack[-1], Made):
            self.stack[-1][key] = value

    def storage(self, _: object) -> None:
        kind, name, key, _location, _count = self.stack.pop()
        if kind != "storage" or not isinstance(name, Name) or not isinstance(key, str):
            raise TypeError("there is no storage where one should be")
        dtype = _STORAGES.get(name.dotted)
        self.stack.append(Made(name.dotted) if dtype is None else Storage(key, dtype))

    def call(self, _: object) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        self.stack.append(_made(maker, arguments))

    def build(self, _: object) -> None:
        """Skip attributes of the last object, such as the versions in a state dict; they are not needed."""
        self.stack.pop()


_PUSHED = frozenset({"BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_NEW: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}  # fmt: skip
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda _, __: None,
    "STOP": lambda _, __: None,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.name,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_marked,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_marked,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
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
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride, _, _, *rest = arguments
        return _tensor(name, storage, offset, shape, stride, None, *rest)
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, stride, _, _, dtype, *rest = arguments
        return _tensor(name, storage, offset, shape, stride, dtype, *rest)
    return Made(name)


_TENSORS = (Name("torch.Tensor"), Name("torch.nn.parameter.Parameter"), Name("torch.nn.parameter.Buffer"))


def _tensor(
    maker: str,
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    dtype: Name | None,
    pending: object = None,
) -> SavedTensor | Made:
    """A tensor; `Made` if its storage is of a kind that holds no plain numbers, or something is left to be computed."""
    if isinstance(storage, Made):
        return storage
    if not isinstance(storage, Storage) or not _are_sizes((offset,)) or not _are_sizes(shape) or not _are_sizes(stride):
        raise TypeError("a tensor has no storage, or sizes that are none")
    if len(shape) != len(stride):  # type: ignore[arg-type]
        raise ValueError(f"a tensor of shape {shape} has the strides {stride}")
    if pending:
        return Made(maker)
    kind = storage.dtype if dtype is None else dtype_from_name(dtype.dotted.removeprefix("torch."))
    return SavedTensor(storage, offset, shape, stride, kind)  # type: ignore[arg-type]


def _are_sizes(values: object) -> bool:
    # Many tensors can have one long shape between them: all of them would be looked at for each.
    if not isinstance(values, tuple) or len(values) > MAX_AXES:
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)
