"""Serializers that are wrong in one way each, and the check that finds it."""

import shutil
from pathlib import Path

import pytest
import torch
from caught import caught, covered

from fewbits.extend import Reader, SafetensorsSerializer, Serializer, Writer
from fewbits.testing import check_serializer
from support.lifecycle_helpers import JsonSerializer


class Changed(Serializer):
    """Safetensors, through a writer and a reader that can be changed."""

    def writer(self, path, header):
        return ChangedWriter(self, Path(path), header)

    def reader(self, path):
        return ChangedReader(self, SafetensorsSerializer().reader(path))

    def written(self, tensor):
        return tensor

    def read(self, tensor):
        return tensor

    def sealed(self, metadata):
        return metadata


class ChangedWriter(Writer):
    def __init__(self, serializer, path, header):
        self.serializer, self.path, self.inner = serializer, path, SafetensorsSerializer().writer(path, header)

    def write(self, name, tensor):
        self.inner.write(name, self.serializer.written(tensor))

    def seal(self, metadata):
        return ChangedReader(self.serializer, self.inner.seal(self.serializer.sealed(metadata)))

    def close(self):
        self.inner.close()

    def abort(self):
        self.inner.abort()


class ChangedReader(Reader):
    def __init__(self, serializer, inner):
        self.serializer, self.inner = serializer, inner
        self.metadata, self.entries = inner.metadata, inner.entries

    def read(self, name):
        return self.serializer.read(self.inner.read(name))


class ThroughFloat16(Changed):
    def written(self, tensor):
        return tensor.half().to(tensor.dtype) if tensor.dtype == torch.float32 else tensor


class NoScalars(Changed):
    def read(self, tensor):
        return tensor.reshape(1) if tensor.dim() == 0 else tensor


class ZerosForNaN(Changed):
    def read(self, tensor):
        return tensor.nan_to_num(0) if tensor.is_floating_point() else tensor


class Latin(Changed):
    def sealed(self, metadata):
        return {key: value.encode("latin-1", "replace").decode("latin-1") for key, value in metadata.items()}


class Strips(Changed):
    def sealed(self, metadata):
        return {key: value.strip() for key, value in metadata.items()}


class Early(Changed):
    """Writes to the path itself."""

    def writer(self, path, header):
        writer = super().writer(path, header)
        seal = writer.seal

        def published(metadata):
            reader = seal(metadata)
            shutil.copy(writer.inner._at, path)
            return reader

        writer.seal = published
        return writer


class Empties(Changed):
    """Begins with an empty file at the path."""

    def writer(self, path, header):
        writer = super().writer(path, header)
        Path(path).write_bytes(b"")
        return writer


class Litters(Changed):
    def writer(self, path, header):
        writer = super().writer(path, header)
        writer.abort = lambda: (writer.inner.abort(), Path(path).with_suffix(".log").touch())
        return writer


class RemovesWhatWasPublished(Changed):
    def writer(self, path, header):
        writer = super().writer(path, header)
        writer.abort = lambda: (writer.inner.abort(), Path(path).unlink(missing_ok=True))
        return writer


class Remembers(Changed):
    """Never looks at a file again that it has read once."""

    def __init__(self):
        self.seen = {}

    def __deepcopy__(self, memo):
        return self

    def reader(self, path):
        name = Path(path).name.removeprefix("damaged").lstrip("-0123456789")
        if name not in self.seen:
            self.seen[name] = super().reader(path)
        return self.seen[name]


class MapsForWriting(Changed):
    """Reads tensors that are the file."""

    def reader(self, path):
        reader = super().reader(path)
        start, size = Path(path).read_bytes().find(torch.arange(12.0).numpy().tobytes()), 12
        read = reader.read

        def mapped(name):
            if name != "layers.0.weight" or start < 0 or start % 4:
                return read(name)
            whole = torch.from_file(str(path), shared=True, size=start // 4 + size, dtype=torch.float32)
            return whole[start // 4 :].reshape(3, 4)

        reader.read = mapped
        return reader


class TakesStringsOnly(Changed):
    def reader(self, path):
        return super().reader(path.removesuffix("/"))


CASES = [
    pytest.param(ThroughFloat16, "tensors_come_back", "read back with other bits", id="through-float16"),
    pytest.param(ZerosForNaN, "tensors_come_back", "read back with other bits", id="zeros-for-nan"),
    pytest.param(NoScalars, "tensors_come_back", "read back with other bits", id="no-scalars"),
    pytest.param(Latin, "metadata_comes_back", "metadata .* is read back as", id="latin"),
    pytest.param(Strips, "metadata_comes_back", "metadata .* is read back as", id="strips"),
    pytest.param(Early, "a_file_appears_at_close", "the path has changed before close", id="early"),
    pytest.param(Empties, "a_file_appears_at_close", "the path has changed before write", id="empties"),
    pytest.param(Litters, "a_file_appears_at_close", "abort leaves", id="litters"),
    pytest.param(RemovesWhatWasPublished, "a_file_appears_at_close", "abort leaves", id="removes"),
    pytest.param(Empties, "a_failed_write_leaves_the_old_file", "an error while writing changes", id="old-file"),
    pytest.param(
        JsonSerializer,
        "a_failed_write_leaves_the_old_file",
        "without most of its tensors can be sealed",
        id="incomplete",
    ),
    pytest.param(Remembers, "damage_is_found", "verify finds none", id="remembers"),
    pytest.param(JsonSerializer, "damage_is_found", "(JSON|Unicode)DecodeError", id="errors-of-json"),
    pytest.param(JsonSerializer, "unreadable_files_are_errors", "FileNotFoundError, not", id="raw-errors"),
    pytest.param(MapsForWriting, "tensors_come_back", "changes the file", id="maps-for-writing"),
    pytest.param(TakesStringsOnly, "models_are_saved_and_loaded", "removesuffix", id="strings-only"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_the_fault_is_found(make, name, match):
    caught(check_serializer(make(), max_examples=60), name, match)


def test_every_check_fails_for_some_fault():
    covered(check_serializer(Changed()), CASES)


def test_the_serializer_passes_without_its_faults():
    for check in check_serializer(Changed()):
        check()
