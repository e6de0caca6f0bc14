"""`TorchFile`: a state dict that `torch.save` wrote, read by position. Nothing in it is ever executed.

The format is a zip archive: one record of pickled structure, and one, not compressed, for the bytes of every storage.
torch reads the structure (with ``weights_only=True``) and tells where storages lie; the bytes are read here, so that a
file of any size takes no memory.
"""

from __future__ import annotations

import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.raw import FileBytes, as_checkpoint_error, tensor_bytes
from fewbits.checkpoint.serializer import ChunkReader, Entry
from fewbits.errors import ArgumentError, FormatError
from fewbits.nn.storage import View
from fewbits.numerics.dtypes import dtype_name

#: How the names of such files commonly end.
SUFFIXES = (".bin", ".pt", ".pth")

#: How a file begins that `torch.save` wrote before there was the zip format: a pickle of its magic number.
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

#: How a record of an archive begins, and so the archive.
_ARCHIVE = b"PK\x03\x04"

#: The bytes of a record's own header in the archive, without the two parts of any length that follow.
_LOCAL_HEADER = 30


class TorchFile(ChunkReader):
    """A file of `torch.save`, with a mapping of names to tensors in it.

    Attributes:
        views: what of the file's bytes each tensor shows: tied tensors are the same view.

    Raises:
        FormatError: if it is none, is in the old format, or holds something else than dense tensors under names.
        CheckpointError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = FileBytes(path)
        self.metadata: Mapping[str, str] = {}
        # What torch cannot take is found first: of a file with its bytes the other way round it crashes.
        records = dict(_records(self._bytes))
        tensors = _structure(path)
        self.views = {name: _view(path, name, tensor, records) for name, tensor in tensors.items()}
        self.entries = {name: Entry(view.shape, view.dtype) for name, view in self.views.items()}
        self._gathered: tuple[str, Tensor] | None = None
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        view = self._view(name)
        out = torch.empty(view.shape, dtype=view.dtype, device="cpu")
        self.read_into(name, 0, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Some elements of a tensor; one that does not lie in order is read as a whole for that."""
        view, entry = self._view(name), self.entries[name]
        if out.dtype != entry.dtype or not 0 <= start <= start + out.numel() <= entry.numel:
            raise ArgumentError(
                f"{self._bytes.path}: {name} has no {out.numel()} elements in {dtype_name(out.dtype)} from {start} on; "
                f"it is {entry}"
            )
        if _in_order(view):
            self._bytes.read_into(tensor_bytes(out), view.start + start * entry.dtype.itemsize)
        else:
            out.view(-1).copy_(self._whole(name, view).view(-1)[start : start + out.numel()])

    def _whole(self, name: str, view: View) -> Tensor:
        """A tensor put in order; the last one is kept, because its chunks are asked for one after the other."""
        with self._lock:
            if self._gathered is None or self._gathered[0] != name:
                memory = torch.empty((view.stop - view.start) // view.dtype.itemsize, dtype=view.dtype, device="cpu")
                self._bytes.read_into(tensor_bytes(memory), view.start)
                self._gathered = name, memory.as_strided(view.shape, view.stride).contiguous()
            return self._gathered[1]

    def _view(self, name: str) -> View:
        if name not in self.views:
            raise ArgumentError(f"{self._bytes.path} has no tensor named {name!r}")
        return self.views[name]


def is_torch_file(path: Path) -> bool:
    """Whether a file is one of `torch.save`, in the old format or the new.

    Raises:
        CheckpointError: if it cannot be read.
    """
    with as_checkpoint_error(f"{path} cannot be read"):
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            start = file.read(len(_OLD_FORMAT))
            # An archive is known by its end; what does not begin as one is not read there: it may be a tensor's bytes.
            return start == _OLD_FORMAT or (start.startswith(_ARCHIVE) and zipfile.is_zipfile(file))


def _records(source: FileBytes) -> Iterator[tuple[int, int]]:
    """Where the bytes of each storage begin, and how many there are."""
    with source.opened() as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    if record.compress_type != zipfile.ZIP_STORED:
                        raise FormatError(f"{source.path} is compressed; write it again with torch.save")
                    if record.filename.endswith("byteorder") and archive.read(record) != b"little":
                        raise FormatError(f"{source.path} was written with big-endian numbers; write it again")
                    yield _data_offset(file, record.header_offset), record.file_size
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise FormatError(
                f"{source.path} is in the format that torch.save wrote before torch 1.6, or damaged ({error}); load it "
                "with torch.load(path, weights_only=True) and save it again"
            ) from None


def _data_offset(file: FileIO, record: int) -> int:
    """Where the bytes of a record begin: after its own header, whose last two parts have a length each."""
    file.seek(record)
    name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER).ljust(_LOCAL_HEADER, b"\0")[-4:])
    return record + _LOCAL_HEADER + int(name) + int(extra)


def _structure(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without their bytes."""
    # Imported late: it brings in a good part of the compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises of a file that may hold anything
        first = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path} is not a state dict that torch.load reads with weights_only=True: {first}") from None
    if not isinstance(loaded, Mapping):
        kind = "Tensor" if isinstance(loaded, Tensor) else type(loaded).__name__
        raise FormatError(f"{path} holds a {kind}, not a state dict that maps names to tensors")
    return dict(_tensors(path, loaded))


def _tensors(path: Path, loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            inner = " Is it the state dict? Save that alone, with torch.save." if isinstance(tensor, Mapping) else ""
            raise FormatError(
                f"{path}: the entry {name!r} is a {type(tensor).__name__}; a state dict maps names to tensors.{inner}"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise FormatError(f"{path}: {name} is not a plain dense tensor; make it one, and save it again")
        yield name, tensor


def _view(path: Path, name: str, tensor: Tensor, records: Mapping[int, int]) -> View:
    start: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
    shape, stride = tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride()))
    if not tensor.numel():
        return View(str(path), 0, shape, stride, tensor.dtype, name)
    view = View(str(path), start + offset, shape, stride, tensor.dtype)
    if start not in records or view.stop > start + records[start]:
        raise FormatError(f"{path}: {name} shows bytes that its storage does not have; the file is damaged")
    return view


def _in_order(view: View) -> bool:
    """Whether the elements lie one after the other."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
