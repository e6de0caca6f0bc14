"""`SafetensorsSerializer`: one safetensors file, written atomically, read through a mapping.

The format is https://github.com/huggingface/safetensors: eight bytes of header length (little-endian), a JSON header
that may end in spaces, the tensors' bytes without gaps. Reading is left to the safetensors library. Writing is done
here, because the library wants all tensors and the final metadata at once, and we learn the digests as we write.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.checkpoint.serializer import Entry, Header, Reader, Serializer, Writer
from fewbits.errors import ArgumentError, CheckpointError, FewbitsError, FormatError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.tensor import in_memory

#: The payload starts at a multiple of this, so that mapped codes are aligned for any kernel.
ALIGNMENT = 64

#: The safetensors library refuses longer headers.
MAX_HEADER = 100_000_000

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
_TO_TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPES.items() if hasattr(torch, name)
}
_FROM_TORCH = {dtype: code for code, dtype in _TO_TORCH.items()}


class SafetensorsSerializer(Serializer):
    """Writes and reads safetensors files."""

    def writer(self, path: str | os.PathLike[str], header: Header) -> Writer:
        """Begin a file beside `path`; it takes its name when it is closed."""
        return _SafetensorsWriter(Path(path), header)

    def reader(self, path: str | os.PathLike[str]) -> Reader:
        """Open and map a file."""
        return _SafetensorsReader(Path(path))


class _SafetensorsWriter(Writer):
    def __init__(self, path: Path, header: Header) -> None:
        with _as_checkpoint_error(f"{path} cannot be written"):
            # A link stays one: the file that it points to is replaced.
            self._path = path = path.resolve() if path.is_symlink() else path
        # Widest dtypes first: every tensor then starts at a multiple of its element's size.
        self._entries = dict(sorted(header.entries.items(), key=lambda item: -item[1].dtype.itemsize))
        self._missing = set(self._entries)
        self._offsets: dict[str, int] = {}
        position = 0
        for name, entry in self._entries.items():
            self._offsets[name] = position
            position += entry.nbytes
        reserved = len(self._header(header.metadata))
        if reserved > MAX_HEADER:
            raise FormatError(
                f"{path}: the header would have up to {reserved:,} bytes, more than the {MAX_HEADER:,} that "
                "safetensors allows; store the model in several files"
            )
        self._payload = -(-(8 + reserved) // ALIGNMENT) * ALIGNMENT
        self._temporary = path.parent / f".fewbits-{secrets.token_hex(8)}.tmp"
        with _as_checkpoint_error(f"{path} cannot be written"):
            if path.is_dir():
                raise ArgumentError(f"{path} is a directory; give the path of the file to write")
            if path.exists() and not path.is_file():
                raise ArgumentError(f"{path} is not a regular file, and would be replaced by one; give another path")
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115  (closed by close or abort)
            try:
                os.truncate(self._file.fileno(), self._payload + position)
            except OSError:
                self.abort()
                raise

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        fields: dict[str, object] = {"__metadata__": dict(metadata)}
        for name, entry in self._entries.items():
            if name == "__metadata__":
                raise FormatError(f"{self._path}: no tensor in a safetensors file may be named {name!r}; rename it")
            start = self._offsets[name]
            fields[name] = {
                "dtype": _code_of(entry.dtype, name),
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.nbytes],
            }
        try:
            return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{self._path}: a name cannot be written as UTF-8: {error}") from None

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes at its place."""
        entry = self._entries.get(name)
        if entry is None or name not in self._missing:
            raise ArgumentError(f"{name!r} is not in the file's header, or has been written already")
        if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
            raise FormatError(
                f"{name} has shape {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}; the header of {self._path} "
                f"announces {entry.shape} in {dtype_name(entry.dtype)}"
            )
        tensor = in_memory(tensor)
        with _as_checkpoint_error(f"{self._path}: writing {name} failed"):
            self._put(tensor_bytes(tensor), self._payload + self._offsets[name])
        self._missing.discard(name)

    def seal(self, metadata: Mapping[str, str]) -> Reader:
        """Write the header and make everything durable; the file still has its temporary name."""
        if self._missing:
            raise CheckpointError(f"{self._path}: never written: {', '.join(sorted(self._missing))}")
        header = self._header(metadata)
        room = self._payload - 8
        if len(header) > room:
            raise ArgumentError(f"the metadata needs {len(header)} bytes where {room} were announced")
        with _as_checkpoint_error(f"{self._path} cannot be written"):
            self._put(memoryview(room.to_bytes(8, "little") + header.ljust(room)), 0)
            os.fsync(self._file.fileno())
        return _SafetensorsReader(self._temporary)

    def close(self) -> None:
        """Give the file its name."""
        self._file.close()
        with _as_checkpoint_error(f"{self._path} cannot be written"):
            os.replace(self._temporary, self._path)
            _sync_directory(self._path.parent)

    def _put(self, data: memoryview, position: int) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def abort(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


class _SafetensorsReader(Reader):
    def __init__(self, path: Path) -> None:
        self._path = path
        with _as_checkpoint_error(f"{path} cannot be read"):
            if not path.is_file():
                what = "is a directory" if path.is_dir() else "does not exist"
                raise CheckpointError(f"{path} {what}; give the path of a safetensors file")
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            opened: Any = safe_open  # the library's stubs leave its methods untyped
            self._file = opened(path, framework="pt")
            self.metadata = self._file.metadata() or {}
            self.entries = {name: self._entry(name) for name in self._file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            hint = "; convert it with safetensors.torch.save_file" if path.suffix in (".pt", ".pth", ".bin") else ""
            raise FormatError(f"{path} is not a valid safetensors file: {error}{hint}") from None

    def _entry(self, name: str) -> Entry:
        described = self._file.get_slice(name)
        code = described.get_dtype()
        if code not in _TO_TORCH:
            raise FormatError(f"{self._path}: {name} has dtype {code}, which this version of torch does not know")
        return Entry(tuple(described.get_shape()), _TO_TORCH[code])

    def read(self, name: str) -> Tensor:
        """One tensor, an alias of the mapped file (copy on write: changing it never changes the file)."""
        if name not in self.entries:
            raise ArgumentError(f"{self._path} has no tensor named {name!r}")
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory, not copied; they live as long as the tensor does."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _code_of(dtype: torch.dtype, name: str) -> str:
    if dtype not in _FROM_TORCH:
        raise FormatError(f"{name} has dtype {dtype_name(dtype)}, which safetensors cannot store")
    return _FROM_TORCH[dtype]


def _sync_directory(path: Path) -> None:
    """Make a rename durable, where the system lets directories be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Wrap an error of the system once, with what was being done. A path with a NUL in it is a ValueError."""
    try:
        yield
    except FewbitsError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: {getattr(error, 'strerror', None) or error}") from error
