"""Files that are no checkpoint: told by their content, by every call that opens one, with advice."""

import gzip
import io
import json
import pickle
import tarfile
import warnings
import zipfile

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.checkpoint.recognition import recognised
from support.lifecycle_helpers import quantize_small

LAYER = nn.Linear(32, 32)


def archive(path, **records):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in records.items():
            made.writestr(name.replace("__", "/"), data)


def numbers(path, save, **arrays):
    with path.open("wb") as file:  # of a path, numpy would change the ending
        save(file, **arrays)


def tar(path):
    with tarfile.open(path, "w") as made:
        made.addfile(tarfile.TarInfo("weights"), io.BytesIO())


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out, and its files are still there
        torch.jit.script(LAYER).save(str(path))


def old(path, location="cpu"):
    torch.save(LAYER.state_dict(), path, _use_new_zipfile_serialization=False)
    saved = b"X\x03\0\0\0cpu"
    assert saved in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(saved, b"X" + len(location).to_bytes(4, "little") + location.encode()))


FILES = {
    "nothing": (lambda p: p.write_bytes(b""), "is empty"),
    "a Git LFS pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\nsize 1"), "git lfs pull"),
    "a web page": (lambda p: p.write_text("\n<!DOCTYPE html><html></html>"), "is a web page"),
    "an error as XML": (lambda p: p.write_text("<?xml version='1.0'?><Error>AccessDenied</Error>"), "is a web page"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + bytes(100)), "is (not )?a GGUF file"),
    "ONNX": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x053.0.0" + bytes(50)), "ONNX model"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "is an HDF5 file"),
    "TFLite": (lambda p: p.write_bytes(b"\x1c\0\0\0TFL3" + bytes(50)), "is a TFLite model"),
    "npz": (lambda p: numbers(p, numpy.savez, a=numpy.ones(3)), "is a NumPy archive"),
    "compressed npz": (lambda p: numbers(p, numpy.savez_compressed, a=numpy.ones(3)), "is a NumPy archive"),
    "npy": (lambda p: numbers(p, numpy.save, arr=numpy.ones(3)), "is a NumPy array"),
    "Keras": (lambda p: archive(p, **{"config.json": "{}", "model.weights.h5": ""}), "is a Keras archive"),
    "TorchScript": (scripted, "is a TorchScript archive"),
    "a program": (lambda p: archive(p, m__archive_format="pt2"), "is a program of torch.export"),
    "a zip archive": (lambda p: archive(p, photo="x"), "is a zip archive that torch.save did not write; unpack it"),
    "a tar archive": (tar, "is a compressed file or archive; unpack it"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), "is a compressed file or archive; unpack it"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "is a pickle that torch.save did not write"),
    "an index with another name": (lambda p: p.write_text(json.dumps({"weight_map": {"a": "b"}})), "is text, which"),
    "text": (lambda p: p.write_text("é" * 300), "is text"),
    "an old file of torch.save": (old, "before torch 1.6"),
}

OPENERS = {
    "quantize": lambda path: fewbits.quantize(path, "int8", output=path.with_name("out")),
    "plan": lambda path: fewbits.plan(path, "int8"),
    "load": fewbits.load,
    "verify": fewbits.verify,
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_checkpoint_is_named_in_a_sentence_by_every_call_that_opens_one(tmp_path, what):
    write, message = FILES[what]
    path = tmp_path / "model.safetensors"
    write(path)
    for opened in OPENERS.values():
        with pytest.raises(fewbits.errors.FormatError, match=message) as refused:
            opened(path)
        assert str(path) in str(refused.value)
        assert "header" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [path]


@given(st.binary(max_size=600))
def test_whatever_a_file_begins_with_it_is_recognised_or_not(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    found = recognised(path)
    assert found is None or found.startswith(f"{path} is ")


def test_a_file_of_torch_save_is_not_loaded_but_called_a_source(tmp_path):
    torch.save(LAYER.state_dict(), tmp_path / "model.bin")
    with pytest.raises(fewbits.errors.FormatError, match=r"holds a float state dict that torch\.save wrote: quantize"):
        fewbits.load(tmp_path / "model.bin")


def deflated(path):
    torch.save(LAYER.state_dict(), path)
    with zipfile.ZipFile(path) as saved:
        records = {record.filename: saved.read(record) for record in saved.infolist()}
    archive(path, **records)


LINES = {
    "an old file": old,
    "an old file of a GPU": lambda path: old(path, "cuda:0"),
    "a compressed file": deflated,
    "TorchScript": scripted,
    "npz": lambda p: numbers(p, numpy.savez, **{n: t.numpy() for n, t in LAYER.state_dict().items()}),
}


@pytest.mark.parametrize("kind", LINES)
def test_the_line_of_python_that_a_message_prints_makes_a_file_that_is_quantized(tmp_path, kind):
    path = tmp_path / "it's {a} model.pt"
    LINES[kind](path)
    with pytest.raises(fewbits.errors.FormatError, match="with this line of Python: ") as refused:
        fewbits.plan(path, "int8")
    line = str(refused.value).partition("with this line of Python: ")[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        exec(line)
    made = tmp_path / "it's {a} model-resaved.pt"
    assert quantize_small(made, "int8", output=tmp_path / "out").ledger["weight"].fate == "quantized"


def test_a_directory_without_weights_is_told_what_it_has(tmp_path):
    with pytest.raises(fewbits.errors.FormatError, match="give the path of the directory, or the file, that has one"):
        fewbits.plan(tmp_path, "int8")
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(fewbits.errors.FormatError, match=r"give the path of one of last\.ckpt"):
        fewbits.plan(tmp_path, "int8")
