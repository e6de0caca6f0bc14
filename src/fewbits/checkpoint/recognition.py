"""Recognise files that are no readable checkpoint by their content, and advise how to proceed."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

import attrs

from fewbits.checkpoint.raw import as_checkpoint_error

#: How many of a file's first bytes are looked at.
_HEAD = 512

#: How a zip archive begins.
ARCHIVE = b"PK\x03\x04"

#: How a file begins that `torch.save` wrote before there was the zip format: a pickle of its magic number.
OLD_TORCH_FILE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

#: Advice for a file of `torch.save` that only torch reads, on any device.
RESAVE = (
    "write it again, with this line of Python: import torch; "
    "torch.save(torch.load({path!r}, map_location='cpu', weights_only=True), {saved!r})"
)

_AS_FLOATS = "give the float checkpoint that it was made from, as safetensors"
_FETCH = "fetch the file itself again"


@attrs.frozen
class _Kind:
    """A kind of file.

    Attributes:
        what: the kind of file, in words.
        advice: the next step; a line of Python in it may name the file, `{path!r}`, and a new file, `{saved!r}`.
        fits: whether the first bytes of a file, or the names of an archive's records, are those of the kind.
    """

    what: str
    advice: str
    fits: Callable[..., bool]

    def sentence(self, path: Path) -> str:
        return f"{path} is {self.what}; {with_paths(self.advice, path)}"


def with_paths(advice: str, path: Path) -> str:
    """Advice with the path of the file, and that of a new one beside it."""
    return advice.format(path=str(path), saved=str(path.with_name(f"{path.stem}-resaved.pt")))


def _begins(*beginnings: bytes, at: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(beginnings, at)


def _is_page(head: bytes) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _is_protobuf_of_onnx(head: bytes) -> bool:
    """Whether a message begins with the version of ONNX, a small number in field 1, and another of the fields to 8."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] in b'\x12\x1a"(2:B'


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


#: By the first bytes of a file; the first kind that fits counts.
_FILES = (
    _Kind("empty", f"a download or a copy is incomplete: {_FETCH}", lambda head: not head),
    _Kind("a Git LFS pointer, not the file itself", "fetch that: git lfs pull", _begins(b"version https://git-lfs")),
    _Kind("a web page, not the file that was to be downloaded", _FETCH, _is_page),
    _Kind(
        "a GGUF file, whose tensors are commonly quantized already",
        f"{_AS_FLOATS}; or read it with fewbits.load(path, dequantize=True) and quantize that",
        _begins(b"GGUF"),
    ),
    _Kind(
        "an HDF5 file, as Keras and TensorFlow write them",
        "load it there, and save its tensors with safetensors.torch.save_file",
        _begins(b"\x89HDF\r\n\x1a\n"),
    ),
    _Kind("a TFLite model", _AS_FLOATS, _begins(b"TFL3", at=4)),
    _Kind(
        "a NumPy array (.npy), a tensor without a name",
        "give it one, with this line of Python: import numpy, torch; "
        "torch.save({{'weight': torch.from_numpy(numpy.load({path!r}))}}, {saved!r})",
        _begins(b"\x93NUMPY"),
    ),
    _Kind(
        "a compressed file or archive",
        "unpack it, and give the path of the weights in it",
        lambda head: (
            head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf"))
            or head[257:262] == b"ustar"
        ),
    ),
    _Kind("a file in the format that torch.save wrote before torch 1.6", RESAVE, _begins(OLD_TORCH_FILE)),
    _Kind(
        "a pickle that torch.save did not write, and nothing in it is executed here",
        "if you trust it, load it in Python, and save its tensors with torch.save",
        _begins(*(bytes([0x80, protocol]) for protocol in range(2, 6))),
    ),
    _Kind("a protobuf message, as of an ONNX model", _AS_FLOATS, _is_protobuf_of_onnx),
    _Kind("text, which holds no tensors", "give the path of the file of tensors, or of its directory", _is_text),
)


def _has(*endings: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name.endswith(endings) for name in names)


#: By the names of the records of a zip archive.
_ARCHIVES = (
    _Kind(
        "a TorchScript archive, a program with its weights",
        "save these alone, with this line of Python: import torch; "
        "torch.save(torch.jit.load({path!r}, map_location='cpu').state_dict(), {saved!r})",
        _has("/constants.pkl"),
    ),
    _Kind(
        "a program of torch.export with its weights",
        "save these alone, with this line of Python: import torch; "
        "torch.save(dict(torch.export.load({path!r}).state_dict), {saved!r})",
        _has("archive_format", "serialized_exported_program.json"),
    ),
    _Kind(
        "a NumPy archive (.npz)",
        "save its arrays as tensors, with this line of Python: import numpy, torch; "
        "torch.save({{n: torch.from_numpy(a) for n, a in numpy.load({path!r}).items()}}, {saved!r})",
        lambda names: bool(names) and all(name.endswith(".npy") for name in names),
    ),
    _Kind(
        "a Keras archive",
        "load it in Keras, and save its tensors with safetensors.torch.save_file",
        _has("model.weights.h5"),
    ),
    _Kind(
        "a zip archive that torch.save did not write",
        "unpack it, and give the path of the weights in it",
        lambda names: not _has("/data.pkl")(names),
    ),
)


def recognised(path: Path) -> str | None:
    """Describe a file and the next step in one sentence.

    Returns:
        None if that is not known, or `torch.save` wrote it in the format of today.

    Raises:
        CheckpointError: if it cannot be read.
    """
    with as_checkpoint_error(f"{path} cannot be read"), open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(ARCHIVE):
        return next((kind.sentence(path) for kind in _FILES if kind.fits(head)), None)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile may raise anything for an invalid file
        return None
    return next((kind.sentence(path) for kind in _ARCHIVES if kind.fits(names)), None)
