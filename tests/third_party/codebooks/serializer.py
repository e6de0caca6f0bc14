"""`ZipSerializer`: the raw bytes of every tensor in a zip archive, with a header in JSON."""

import json
import os
import secrets
import zipfile
from pathlib import Path

import torch

from fewbits import FewbitsError
from fewbits.errors import CheckpointError, FormatError
from fewbits.extend import Entry, Reader, Serializer, Writer


class ZipSerializer(Serializer):
    """Reads and writes zip archives."""

    def writer(self, path, header):
        return _Writer(Path(path), header)

    def reader(self, path):
        return _Reader(Path(path))


class _Writer(Writer):
    def __init__(self, path, header):
        self._path, self._missing, self._stored = path, dict(header.entries), {}
        self._temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            self._archive = zipfile.ZipFile(self._temporary, "x")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    def write(self, name, tensor):
        entry = self._missing.pop(name, None)
        if entry != Entry(tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(f"{name} was announced as {entry}")
        # A tensor of one element may have any stride; a new contiguous one has 1, and can be viewed as bytes.
        flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        self._put(f"tensors/{len(self._stored)}", flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        self._stored[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)

    def seal(self, metadata):
        if self._missing:
            raise CheckpointError(f"{self._path}: never written: {', '.join(self._missing)}")
        self._put("header.json", json.dumps({"tensors": self._stored, "metadata": dict(metadata)}).encode())
        self._archive.close()
        return _Reader(self._temporary)

    def close(self):
        os.replace(self._temporary, self._path)

    def abort(self):
        self._archive.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, name, data):
        try:
            # Given only a name, zipfile would store the time of day.
            self._archive.writestr(zipfile.ZipInfo(name), data)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error}") from error


class _Reader(Reader):
    def __init__(self, path):
        self._path = path
        header = self._guarded(lambda: json.loads(self._data("header.json")))
        self.metadata, self.entries = self._guarded(lambda: (header["metadata"], _entries(header["tensors"])))
        self._order = list(self.entries)

    def read(self, name):
        data, entry = self._guarded(lambda: self._data(f"tensors/{self._order.index(name)}")), self.entries[name]
        if len(data) != entry.nbytes:
            raise FormatError(f"{self._path}: {name} has {len(data)} bytes, not {entry.nbytes}")
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(bytearray(data), dtype=entry.dtype).reshape(entry.shape)

    def _data(self, name):
        with zipfile.ZipFile(self._path) as archive:
            return archive.read(name)

    def _guarded(self, read):
        try:
            return read()
        except FewbitsError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {error}") from error
        except Exception as error:  # a damaged archive raises errors of many classes
            raise FormatError(f"{self._path} is not an archive of this serializer: {error}") from error


def _entries(described):
    return {name: Entry(tuple(shape), getattr(torch, dtype)) for name, (dtype, shape) in described.items()}
