"""`SafetensorsSerializer`: one safetensors file, written atomically, read through a mapping or by position.

Mapping a file is left to the safetensors library. Writing is done here, because the library wants all tensors and the
final metadata at once, and we learn the digests as we write; `fewbits.checkpoint.header` has both sides of the header.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewbits.checkpoint.folder import FOREIGN_SUFFIXES
from fewbits.checkpoint.header import ALIGNMENT, MAX_HEADER, PREFIX, dump_header, read_header
from fewbits.checkpoint.publishing import beside, check_place
from fewbits.checkpoint.raw import FileBytes, as_checkpoint_error, sync_directory
from fewbits.checkpoint.recognition import recognised
from fewbits.checkpoint.serializer import ChunkReader, Entry, Header, ResumableWriter, Serializer, find_entry
from fewbits.checkpoint.torch_file import is_torch_file, use_of
from fewbits.errors import ArgumentError, CheckpointError, FormatError
from fewbits.numerics.tensor import in_memory, tensor_bytes


class SafetensorsSerializer(Serializer):
    """Writes and reads safetensors files."""

    foreign_suffixes = FOREIGN_SUFFIXES

    def writer(self, path: str | os.PathLike[str], header: Header) -> ResumableWriter:
        """Begin a file beside `path`; it takes its name when it is closed."""
        path = check_place(Path(path), folder=False, replace=True)  # a link stays one: the file behind it is replaced
        return _SafetensorsWriter(path, header, at=beside(path))

    def resumable(self, path: str | os.PathLike[str], header: Header) -> ResumableWriter:
        """Begin a file at its path; its header is empty until it is sealed."""
        path = check_place(Path(path), folder=False, replace=True)
        return _SafetensorsWriter(path, header, at=path)

    def reader(self, path: str | os.PathLike[str]) -> ChunkReader:
        """Open a file. It is mapped when a whole tensor is read, not before."""
        return _SafetensorsReader(Path(path))


class _SafetensorsWriter(ResumableWriter):
    """Writes a file at the path `at`; when it is closed, it gets the name `path`, which may be the same."""

    def __init__(self, path: Path, header: Header, *, at: Path) -> None:
        self._path, self._at = path, at
        # Widest dtypes first: every tensor then starts at a multiple of its element's size.
        self._entries = dict(sorted(header.entries.items(), key=lambda item: -item[1].dtype.itemsize))
        self._written: dict[str, int] = {}
        reserved = len(dump_header(header.metadata, self._entries, path))
        if reserved > MAX_HEADER:
            raise FormatError(
                f"{path}: the header would have up to {reserved:,} bytes, more than the {MAX_HEADER:,} that "
                "safetensors allows; store the model in several files"
            )
        self._payload = end = -(-(PREFIX + reserved) // ALIGNMENT) * ALIGNMENT
        self._starts: dict[str, int] = {}
        for name, entry in self._entries.items():
            self._starts[name] = end
            end += entry.nbytes
        with as_checkpoint_error(f"{path} cannot be written"):
            self._file = open(at, "r+b" if at == path and path.exists() else "x+b", buffering=0)  # noqa: SIM115
            try:
                self._begin(end)
            except OSError:
                self.abort()
                raise

    def _begin(self, size: int) -> None:
        """Make the file as long as it will be, with no header: one that an earlier writer has sealed loses its own."""
        os.truncate(self._file.fileno(), size)
        self._put(memoryview(bytes(PREFIX)), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes at its place."""
        entry = self._entries.get(name)
        if entry is None or name in self._written:
            raise ArgumentError(f"{name!r} is not in the file's header, or has been written already")
        found = Entry(tuple(tensor.shape), tensor.dtype)
        if found != entry:
            raise FormatError(f"{name} has {found.in_words}; the header of {self._path} announces {entry.in_words}")
        self.append(name, tensor)

    def append(self, name: str, chunk: Tensor) -> None:
        """Write the next bytes of a tensor at their place."""
        done = self._written.get(name, 0)
        entry = find_entry(self._entries, name, self._path, done, chunk)
        chunk = in_memory(chunk)
        with as_checkpoint_error(f"{self._path}: writing {name} failed"):
            self._put(tensor_bytes(chunk), self._starts[name] + done * entry.dtype.itemsize)
        self._written[name] = done + chunk.numel()

    def read_back(self, name: str, start: int, out: Tensor) -> None:
        """Read the unfinished file by position."""
        entry = find_entry(self._entries, name, self._path, start, out)
        with as_checkpoint_error(f"{self._path} cannot be read"):
            self._file.seek(self._starts[name] + start * entry.dtype.itemsize)
            buffer = tensor_bytes(out)
            while buffer and (count := self._file.readinto(buffer)):
                buffer = buffer[count:]

    def take_over(self, name: str, elements: int) -> None:
        """The next chunk goes behind them."""
        self._written[name] = elements

    def seal(self, metadata: Mapping[str, str]) -> ChunkReader:
        """Write the header and make everything durable; the file still has its temporary name."""
        missing = [name for name, entry in self._entries.items() if self._written.get(name) != entry.numel]
        if missing:
            raise CheckpointError(f"{self._path}: never written: {', '.join(sorted(missing))}")
        header = dump_header(metadata, self._entries, self._path)
        room = self._payload - PREFIX
        if len(header) > room:
            raise ArgumentError(f"the metadata needs {len(header)} bytes where {room} were announced")
        with as_checkpoint_error(f"{self._path} cannot be written"):
            self._put(memoryview(room.to_bytes(PREFIX, "little") + header.ljust(room)), 0)
            os.fsync(self._file.fileno())
        return _SafetensorsReader(self._at)

    def close(self) -> None:
        """Give the file its name."""
        self._file.close()
        with as_checkpoint_error(f"{self._path} cannot be written"):
            if self._at != self._path:
                os.replace(self._at, self._path)
            sync_directory(self._path.parent)

    def _put(self, data: memoryview, position: int) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def abort(self) -> None:
        """Close the file, and remove it if it has a temporary name."""
        self._file.close()
        if self._at != self._path:
            self._at.unlink(missing_ok=True)  # after `close` there is no file of that name


class _SafetensorsReader(ChunkReader):
    def __init__(self, path: Path) -> None:
        with as_checkpoint_error(f"{path} cannot be read"):
            if not path.is_file():
                there = "is no regular file" if path.exists() else "does not exist"
                what = "is a directory" if path.is_dir() else there
                raise CheckpointError(f"{path} {what}; give the path of a file of tensors")
        self._bytes = FileBytes(path)
        try:
            with self._bytes.opened() as file:
                header = read_header(file, path)
        except FormatError:
            if known := recognised(path) or (use_of(path) if is_torch_file(path) else None):
                raise FormatError(known) from None
            raise
        self.metadata, self._spans = header.metadata, header.spans
        self.entries = {name: span.entry for name, span in header.spans.items()}
        self._mapped: Any = None

    def read(self, name: str) -> Tensor:
        """One tensor, an alias of the mapped file (copy on write: changing it never changes the file)."""
        path = self._bytes.path
        find_entry(self.entries, name, path)
        with as_checkpoint_error(f"{path} cannot be read"):
            try:
                if self._mapped is None:
                    self._mapped = safe_open(path, framework="pt")
                    self._bytes.check_unchanged()
                tensor: Tensor = self._mapped.get_tensor(name)
            except SafetensorError as error:
                raise FormatError(f"{path} is not a valid safetensors file: {error}") from None
        return tensor

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Some elements of a tensor, read by position: the file is not mapped for that."""
        entry = find_entry(self.entries, name, self._bytes.path, start, out)
        self._bytes.read_into(tensor_bytes(out), self._spans[name].start + start * entry.dtype.itemsize)
