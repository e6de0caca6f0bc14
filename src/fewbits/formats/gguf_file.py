"""`GGUFFile`: the keys and tensors of a GGUF file, read with the ``gguf`` package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError, CheckpointError, FewbitsError, FormatError
from fewbits.formats.gguf_blocks import BLOCK_TYPES, BlockType

#: What the package raises for a malformed file.
_MALFORMED = (ValueError, LookupError, ArithmeticError, RecursionError, MemoryError, TypeError)

_PLAIN = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")


def gguf_package() -> Any:
    """Import the ``gguf`` package.

    Raises:
        ArgumentError: if it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ArgumentError(f"GGUF files need the package gguf; pip install 'fewbits[gguf]' ({error})") from None


@attrs.frozen(eq=False)
class StoredTensor:
    """A tensor in a GGUF file.

    Attributes:
        name: its name in the file.
        type: the name of its type, such as ``"F16"`` or ``"Q4_K"``.
        shape: its shape, with the axis of the blocks last, as in torch.
        data: a mapped array of the package: numbers, or the bytes of (..., blocks of a row).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Any

    @property
    def block_type(self) -> BlockType | None:
        """The type of its blocks, if fewbits has the same codes."""
        return BLOCK_TYPES.get(self.type)

    @property
    def is_plain(self) -> bool:
        """Whether torch has its dtype."""
        return self.type in _PLAIN

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its numbers; float32 if it holds blocks."""
        if self.type == "BF16":
            return torch.bfloat16
        return torch.from_numpy(self.data[:0].copy()).dtype if self.is_plain else torch.float32

    def read(self) -> Tensor:
        """Return a copy: numbers, or uint8 of (rows, bytes of a row)."""
        data = torch.from_numpy(self.data.copy())
        if self.is_plain:
            return data.view(self.dtype).reshape(self.shape)
        return data.reshape(-1, data.shape[-1])

    def decode(self) -> Tensor:
        """Return the numbers, decoded by the package if they are in blocks; float32 then.

        Raises:
            FormatError: if the package does not decode blocks of this type.
        """
        return self.read() if self.is_plain else decode(self.data, self.type).reshape(self.shape)


def decode(data: Any, type_name: str) -> Tensor:
    """Decode an array of blocks with the package, to float32.

    Raises:
        FormatError: if the package does not decode blocks of this type.
    """
    import numpy as np

    gguf = gguf_package()
    try:
        with np.errstate(all="ignore"):
            return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[type_name]))
    except NotImplementedError as error:
        raise FormatError(f"the package gguf does not decode {type_name} blocks: {error}") from None


class GGUFFile:
    """A GGUF file, mapped. The keys and the descriptions of the tensors are read at once.

    Args:
        path: the file.

    Attributes:
        path: the file.
        fields: the keys with their values, in the form that the package has for them.
        tensors: the tensors by name, in the order of the file.
        architecture: the architecture of the model.
        alignment: the multiple of bytes at which tensors begin.

    Raises:
        FormatError: if it is not a GGUF file of one part for little-endian machines, or malformed.
        CheckpointError: if it cannot be read.
        ArgumentError: if the package ``gguf`` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        reader = _opened(path)
        self.fields: Mapping[str, Any] = reader.fields
        self.alignment = int(reader.alignment)
        self.tensors = {
            tensor.name: StoredTensor(
                tensor.name, tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())), tensor.data
            )
            for tensor in reader.tensors
        }
        self._check(reader)
        architecture = self.value("general.architecture")
        if not isinstance(architecture, str):
            raise FormatError(f"{path} is not a GGUF file of a model: the key general.architecture is {architecture!r}")
        self.architecture: str = architecture

    def _check(self, reader: Any) -> None:
        if reader.byte_order != "I":
            raise FormatError(f"{self.path} is a GGUF file for big-endian machines")
        if self.number("split.count", 1) != 1:
            raise FormatError(f"{self.path} is one of several parts; join them with: llama-gguf-split --merge")
        end = reader.data_offset
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            if tensor.data_offset < end:
                raise FormatError(f"{self.path}: {tensor.name} shares bytes with another tensor or with the header")
            end = tensor.data_offset + tensor.n_bytes

    def value(self, key: str) -> Any:
        """Return the value of a key; None if the file does not have the key."""
        field = self.fields.get(key)
        with _as_format_error(self.path):
            return None if field is None else field.contents()

    def number(self, key: str, default: int, block: int = 0) -> int:
        """Return the value of a key that is a whole number, or a list with one for each block.

        Raises:
            FormatError: if it is something else.
        """
        value = self.value(key)
        if isinstance(value, list) and block < len(value):
            value = value[block]
        if value is None:
            return default
        if not isinstance(value, int) or value < 0:
            raise FormatError(f"{self.path}: the key {key} is {value!r}, not a whole number")
        return value


def _opened(path: str | os.PathLike[str]) -> Any:
    """Open a file with the package's reader."""
    import numpy as np

    with _as_format_error(path), np.errstate(all="ignore"):
        return _bounded(gguf_package().GGUFReader)(path)


def _bounded(reader: type) -> type:
    """Make a subclass of the package's reader that refuses to read past the end of the file.

    The package itself reads an array that claims 2^60 elements until memory runs out.
    """
    import numpy as np

    def get(self: Any, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.data = np.asarray(self.data)  # cutting pieces out of a plain array is faster
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends too early")
        return reader._get(self, offset, dtype, count, override_order)  # type: ignore[attr-defined]

    return type("BoundedReader", (reader,), {"_get": get})


@contextmanager
def _as_format_error(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except _MALFORMED as error:
        if isinstance(error, FewbitsError):
            raise
        raise FormatError(f"{path} is not a GGUF file that can be read: {error}") from error
