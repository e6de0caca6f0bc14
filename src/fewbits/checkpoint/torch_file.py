"""`TorchFile`: a state dict that `torch.save` wrote, read by position. Nothing in it is ever executed.

The format is a zip archive: one record of pickled structure, and one, not compressed, for the bytes of every storage.
Torch does not read these files here, since it calls functions named in the file if it considers them safe: a file of a
kilobyte can make torch take any amount of memory or time. Opening a file here takes memory for its structure only.
"""

from __future__ import annotations

import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoint import state_dicts
from fewbits.checkpoint.header import MAX_HEADER, is_possible
from fewbits.checkpoint.pickled import Made, SavedTensor, read_pickle
from fewbits.checkpoint.raw import FileBytes, as_checkpoint_error
from fewbits.checkpoint.recognition import ARCHIVE, OLD_TORCH_FILE, RESAVE, recognised, with_paths
from fewbits.checkpoint.serializer import ChunkReader, Entry, find_entry
from fewbits.errors import FormatError
from fewbits.nn.storage import View
from fewbits.numerics.tensor import tensor_bytes

#: How the names of such files commonly end.
SUFFIXES = (".bin", ".pt", ".pth")

#: The bytes of a record's own header in the archive, without the two parts of any length that follow.
_LOCAL_HEADER = 30

#: The first byte of something in the file, and how many there are.
_Place = tuple[int, int]


class TorchFile(ChunkReader):
    """A file of `torch.save`, with a mapping of names to tensors in it.

    Args:
        path: the path of the file.
        entry: the name of the state dict in the file, if the file holds more than that; a dot leads from an entry to
            one within.

    Attributes:
        views: the bytes of each tensor in the file; tied tensors have the same view.

    Raises:
        FormatError: if it is not such a file, has the old format, or holds anything but dense tensors under names.
        CheckpointError: if it cannot be read.
        ArgumentError: if it has no entry of that name.
    """

    def __init__(self, path: Path, entry: str | None = None) -> None:
        self._bytes = FileBytes(path)
        self.metadata: Mapping[str, str] = {}
        records = _records(self._bytes)
        folder = _folder(path, records)
        byteorder = records.get(f"{folder}/byteorder")
        if byteorder is not None and _content(self._bytes, byteorder) != b"little":
            raise FormatError(f"{path} was written with big-endian numbers; write it again")
        saved = read_pickle(_content(self._bytes, records[f"{folder}/data.pkl"]), path)
        if entry is not None:
            saved = state_dicts.entry_of(saved, entry, SavedTensor, path)
        self.views = {
            name: _view(self._bytes, name, tensor, records.get(f"{folder}/data/{tensor.storage.key}"))
            for name, tensor in _tensors(path, saved)
        }
        self.entries = {name: Entry(view.shape, view.dtype) for name, view in self.views.items()}
        # The last tensor that does not lie in order, put in order, and how many of its elements nobody has asked for.
        self._gathered: dict[str, Tensor] = {}
        self._missing = 0
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = find_entry(self.entries, name, self._bytes.path)
        out = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        self.read_into(name, 0, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Some elements of a tensor; one that does not lie in order is read as a whole for that."""
        entry, view = find_entry(self.entries, name, self._bytes.path, start, out), self.views[name]
        if _in_order(view):
            self._bytes.read_into(tensor_bytes(out), view.start + start * entry.dtype.itemsize)
        else:
            out.view(-1).copy_(self._whole(name, view, start, out.numel()).view(-1)[start : start + out.numel()])

    def gathered_bytes(self, name: str) -> int:
        """Extra memory in bytes that reading any part of a tensor takes; 0 if its elements lie in order."""
        view = self.views[name]
        return 0 if _in_order(view) else view.stop - view.start + self.entries[name].nbytes

    def _whole(self, name: str, view: View, start: int, count: int) -> Tensor:
        """A tensor put in order. It is kept until all of it from here on has been asked for, in chunks of any order."""
        with self._lock:
            if name not in self._gathered:
                self._gathered.clear()  # its memory is free before more is taken
                memory = torch.empty((view.stop - view.start) // view.dtype.itemsize, dtype=view.dtype, device="cpu")
                self._bytes.read_into(tensor_bytes(memory), view.start)
                self._gathered[name] = memory.as_strided(view.shape, view.stride).contiguous()
                self._missing = self.entries[name].numel - start
            tensor = self._gathered[name]
            self._missing -= count
            if self._missing <= 0:
                self._gathered.clear()
            return tensor


def is_torch_file(path: Path) -> bool:
    """Whether a file is one of `torch.save`, in the old format or the new.

    Raises:
        CheckpointError: if it cannot be read.
    """
    with as_checkpoint_error(f"{path} cannot be read"):
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            first = file.read(len(OLD_TORCH_FILE))
    # A safetensors file begins with a length, which can be any number; its ninth byte is a brace. That of an archive
    # says how its first record is compressed.
    return first == OLD_TORCH_FILE or (first.startswith(ARCHIVE) and first[8:9] != b"{")


def use_of(path: Path) -> str:
    """Explain, for an error message, how to use a file of `torch.save` given in place of a result of fewbits."""
    try:
        names = TorchFile(path).entries
    except FormatError as error:
        return str(error)
    if any(name.endswith("_packed") and name.removesuffix("packed") + "scale" in names for name in names):
        return (
            f"{path} holds a quantized state dict that torch.save wrote; model.load_state_dict(torch.load(path, "
            "weights_only=True)) puts it into a model that was quantized in the same way. A file that can be loaded "
            "into a float model is written by result.save"
        )
    return (
        f"{path} holds a float state dict that torch.save wrote: quantize(path, ...) takes it as a source. A result is "
        "what result.save or output= wrote"
    )


def _records(source: FileBytes) -> dict[str, _Place]:
    """Where the bytes of every record are, by its name."""
    path, size = source.path, source.identity[2]
    with source.opened() as file:
        if other := recognised(path):
            raise FormatError(other)
        try:
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
        except Exception as error:  # zipfile may raise anything for an invalid file
            raise FormatError(f"{path} is a damaged file of torch.save ({error}); fetch or write it again") from None
        if any(record.compress_type != zipfile.ZIP_STORED for record in listed):
            raise FormatError(f"{path} is compressed; {with_paths(RESAVE, path)}")
        records: dict[str, _Place] = {}
        for record in listed:
            start = _data_offset(file, record.header_offset)
            if start is None or start + record.file_size > size or record.filename in records:
                raise FormatError(
                    f"{path} is damaged: {record.filename!r} is not where its archive says, or twice there"
                )
            records[record.filename] = start, record.file_size
    return records


def _data_offset(file: FileIO, record: int) -> int | None:
    """Where the bytes of a record begin: after its own header, whose last two parts have a length each."""
    if not 0 <= record < 1 << 62:
        return None
    file.seek(record)
    header = file.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or not header.startswith(ARCHIVE):
        return None
    name, extra = struct.unpack("<HH", header[-4:])
    return record + _LOCAL_HEADER + int(name) + int(extra)


def _folder(path: Path, records: Mapping[str, _Place]) -> str:
    """Return the folder of the archive's only data.pkl."""
    found = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise FormatError(f"{path} is a zip archive that torch.save did not write: it has {len(found)} data.pkl files")
    return found[0]


def _content(source: FileBytes, place: _Place) -> bytes:
    """The bytes of a record."""
    start, size = place
    if size > MAX_HEADER:
        raise FormatError(f"{source.path} describes its tensors in {size:,} bytes, more than {MAX_HEADER:,}")
    content = bytearray(size)
    source.read_into(memoryview(content), start)
    return bytes(content)


def _tensors(path: Path, saved: object) -> Iterator[tuple[str, SavedTensor]]:
    if not isinstance(saved, Mapping):
        raise FormatError(
            f"{path} holds a {_kind(saved)}, not a state dict that maps names to tensors; if it is a model, and you "
            "trust the file, take the result of torch.load(path, weights_only=False)"
        )
    for name, tensor in saved.items():
        if isinstance(name, str) and isinstance(tensor, SavedTensor):
            yield name, tensor
            continue
        if hint := state_dicts.advice(saved, SavedTensor):
            raise FormatError(f"{path} holds more than a state dict, as a training checkpoint does{hint}")
        if isinstance(tensor, Made) and isinstance(name, str):
            raise FormatError(
                f"{path}: {name} is not a plain dense tensor, but the result of {tensor.maker}, which is not called; "
                "make it one, and save it again"
            )
        raise FormatError(f"{path}: the entry {name!r} is a {_kind(tensor)}; a state dict maps names to tensors")


def _kind(saved: object) -> str:
    """Name the kind of an object in a file."""
    if isinstance(saved, Made):
        return saved.maker
    return "Tensor" if isinstance(saved, SavedTensor) else type(saved).__name__


def _view(source: FileBytes, name: str, tensor: SavedTensor, place: _Place | None) -> View:
    """The place of a tensor in the file.

    Raises:
        FormatError: if its shape is one that no tensor can have, it repeats few elements to more than fits anywhere, or
            it has bytes that the file does not have.
    """
    where, entry = f"{source.path}: {name}", Entry(tensor.shape, tensor.dtype)
    if not is_possible(entry):
        raise FormatError(f"{where} has shape {entry.shape}, which no tensor can have")
    if entry.nbytes > source.identity[2]:
        raise FormatError(
            f"{where} has {entry.nbytes:,} bytes, more than its file: it is expanded; save tensor.contiguous()"
        )
    if not entry.numel:
        # As in memory: of one without elements there is no other, but the same object can have two names.
        return View(str(source.path), 0, tensor.shape, tensor.stride, tensor.dtype, id(tensor))
    start, size = place or (0, 0)
    first = start + tensor.offset * tensor.dtype.itemsize
    view = View(str(source.path), first, tensor.shape, tensor.stride, tensor.dtype)
    if view.stop > start + size:
        raise FormatError(f"{where} shows bytes that its storage does not have; the file is damaged")
    return view


def _in_order(view: View) -> bool:
    """Whether the elements lie one after the other."""
    return torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta").is_contiguous()
