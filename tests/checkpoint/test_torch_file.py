"""Files of torch.save: read by position, in any strides, tied or not, and never executed."""

import io
import os
import warnings
import zipfile

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits.checkpoint.torch_file import TorchFile, is_torch_file
from fewbits.errors import FormatError
from support.lifecycle_helpers import FEWER_EXAMPLES, TiedLM, files_in, mlp, quantize_small

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.uint16,
]  # fmt: skip


@st.composite
def state_dicts(draw):
    """Tensors and views of them: transposed, strided, tied, interleaved, expanded, empty, scalars."""
    tensors = {}
    for index in range(draw(st.integers(1, 5))):
        name = f"{draw(st.text(min_size=1, max_size=3))}{index}"
        if tensors and draw(st.booleans()):
            other = draw(st.sampled_from(list(tensors.values())))
            views = [other, other.t() if other.dim() == 2 else other, other[1:] if other.dim() else other]
            views += [other[..., ::2]] if other.dim() else [other.expand(3)]
            tensors[name] = draw(st.sampled_from(views))
            continue
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(count).reshape(shape).to(dtype)
    return tensors


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("torch") / "model.bin"


@given(state_dicts(), st.data())
def test_every_tensor_and_any_elements_of_it_are_read_as_torch_reads_them(scratch, tensors, data):
    torch.save(tensors, scratch)
    expected = torch.load(scratch, weights_only=True)
    file = TorchFile(scratch)
    assert file.entries == {name: fewbits.extend.Entry(tuple(t.shape), t.dtype) for name, t in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(file.read(name), tensor)
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        out = torch.empty(stop - start, dtype=tensor.dtype)
        file.read_into(name, start, out)
        assert torch.equal(out, tensor.reshape(-1)[start:stop])


@given(state_dicts())
def test_names_have_one_view_exactly_if_they_have_in_memory(scratch, tensors):
    torch.save(tensors, scratch)
    loaded, views = torch.load(scratch, weights_only=True), TorchFile(scratch).views
    tied = fewbits.nn.storage.View.of
    for a in loaded:
        for b in loaded:
            assert (views[a] == views[b]) == (tied(loaded[a]) == tied(loaded[b]))


EMPTY, PAIR = torch.zeros(0), torch.zeros(2)


@FEWER_EXAMPLES
@given(state_dicts(), st.sampled_from(["int8", "int4", "fp16"]))
@example({"a": EMPTY, "b": EMPTY, "c": torch.ones(1, 1)}, "int8")
@example({"a": PAIR, "b": PAIR[::2], "c": torch.ones(1, 1)}, "int8")  # of one element, with a stride of two
def test_the_result_is_that_of_the_state_dict_in_memory(tmp_path_factory, tensors, scheme):
    folder = tmp_path_factory.mktemp("model")
    torch.save(tensors, folder / "model.bin")
    try:
        expected = quantize_small(torch.load(folder / "model.bin", weights_only=True), scheme, on_failure="ignore")
    except fewbits.FewbitsError as error:
        with pytest.raises(type(error)):
            quantize_small(folder / "model.bin", scheme, output=folder / "out", on_failure="ignore")
        return
    expected.save(folder / "expected")
    quantize_small(folder / "model.bin", scheme, output=folder / "out", on_failure="ignore")
    assert (folder / "out").read_bytes() == (folder / "expected").read_bytes()


def test_a_directory_of_them_is_quantized_and_tied_tensors_stay_tied(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(TiedLM().state_dict(), folder / "pytorch_model.bin")
    torch.save({"lr": 1}, folder / "training_args.bin")
    (folder / "config.json").write_text("{}")
    result = quantize_small(folder, "int8", output=tmp_path / "out")
    assert files_in(tmp_path / "out").keys() == {"config.json", "model.safetensors"}
    assert result.quantizer.left_behind == ("training_args.bin",)
    loaded = fewbits.load(tmp_path / "out", into=TiedLM())
    assert loaded.lm_head.weight_stored is loaded.embed_tokens.weight_stored
    assert fewbits.verify(tmp_path / "out", folder).ok


def test_parameters_and_files_without_an_ending_are_read(tmp_path):
    torch.save(dict(nn.Linear(32, 32).named_parameters()), tmp_path / "weights")
    assert quantize_small(tmp_path / "weights", "int8", output=tmp_path / "out").ledger.count("quantized") == 1


class Malicious:
    """Pickled, it says: call this."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def old_format(path):
    torch.save({"a": torch.ones(3, 3)}, path, _use_new_zipfile_serialization=False)


def rewritten(path, change):
    """The archive with its records changed: `change` gets name and bytes, and returns bytes, or None for none."""
    torch.save({"a": torch.arange(9.0).view(3, 3)}, path)
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for record in old.infolist():
            data = change(record.filename, old.read(record))
            if data is not None:
                new.writestr(record.filename, data)
    path.write_bytes(made.getvalue())


def compressed(path):
    torch.save({"a": torch.zeros(30, 30)}, path)
    data = {}
    with zipfile.ZipFile(path) as old:
        data = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in data.items():
            new.writestr(name, content)


def moved(path):
    """The list at the end of the archive says of a record that it begins one byte later."""
    torch.save({"a": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    listed = data.index(b"PK\x01\x02")
    data[listed + 42] += 1
    path.write_bytes(data)


def doubled(path):
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model/data/0", bytes(12))


def pickled(path, value, key=b"X\1\0\0\0a", end=b"s."):
    """A file whose pickle maps a name to the result of some opcodes."""
    rewritten(path, lambda name, data: b"\x80\2}" + key + value + end if name.endswith("data.pkl") else data)


def tensor(*sizes):
    """The opcodes of a tensor of float32 of that shape, whose strides are 1."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x09tQ"
    shape, stride = b"(" + b"".join(sizes) + b"t", b"(" + b"K\1" * len(sizes) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + stride + b"\x89}tR"


#: A tuple of two tuples of two tuples, 48 times: few bytes, and more elements than anyone can look at.
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (index, index) for index in range(48))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will lose such tensors
        return torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)


BAD = {
    "the old format": (old_format, "before torch 1.6"),
    "an object that is executed": (lambda p: torch.save({"a": Malicious()}, p), r"the result of posix\.mkdir"),
    "an archive of something else": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"),
                                     "archive that torch.save did not write"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "holds a list"),
    "a tensor": (lambda p: torch.save(torch.ones(2), p), "holds a Tensor"),
    "a state dict inside of another": (lambda p: torch.save({"model": {"a": torch.ones(2)}}, p),
                                       "the entry 'model' looks like a state dict: take it with --entry model"),
    "a number": (lambda p: torch.save({"a": torch.ones(2), "step": 3}, p), "'step' is a int"),
    "a tensor that is not computed completely": (
        lambda p: torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, p), "a is not a plain dense tensor"),
    "a quantized tensor": (lambda p: torch.save({"a": quantized()}, p), "a is not a plain dense tensor"),
    "a number for a name": (lambda p: torch.save({3: torch.ones(2)}, p), "the entry 3"),
    "a sparse tensor": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a is not a plain dense tensor"),
    "a storage cut short": (lambda p: rewritten(p, lambda name, data: data[:8] if "/data/" in name else data),
                            "a shows bytes that its storage does not have"),
    "a storage that is missing": (lambda p: rewritten(p, lambda name, data: None if "/data/" in name else data),
                                  "a shows bytes that its storage does not have"),
    "another order of bytes": (lambda p: rewritten(p, lambda name, data: b"big" if "byteorder" in name else data),
                               "big-endian numbers"),
    "compressed bytes": (compressed, "is compressed"),
    "no pickle": (lambda p: rewritten(p, lambda name, data: b"x" if "pkl" in name else data), "holds no pickle"),
    "a record that is not where it should be": (moved, "is not where its archive says"),
    "a record that is there twice": (doubled, "twice there"),
    "a tensor larger than its file": (lambda p: torch.save({"a": torch.zeros(1).expand(1 << 40)}, p),
                                      "a has 4,398,046,511,104 bytes, more than its file"),
    "an empty tensor of any size": (lambda p: pickled(p, tensor(b"\x8a\x08" + bytes(7) + b"\x40", b"K\0")),
                                    "which no tensor can have"),
    "sizes that are none": (lambda p: pickled(p, tensor(b"J\xff\xff\xff\xff", b"K\1")), "holds no pickle"),
    "more axes than torch computes with": (lambda p: pickled(p, tensor(*[b"K\1"] * 65)), "holds no pickle"),
    "a list for a size, which would be copied": (lambda p: pickled(p, b"ctorch\nSize\n]\x85R"),
                                                 r"the result of torch\.Size"),
    "a class that would take any memory": (lambda p: pickled(p, b"cbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85R"),
                                           "the result of builtins.bytearray"),
    "a name that takes for ever to look up": (lambda p: pickled(p, b"N", key=DOUBLED),
                                               "a tuple is the name of an entry"),
    "tuples of tuples without end": (lambda p: pickled(p, DOUBLED), "the entry 'a' is a tuple"),
    "lists in lists without end": (lambda p: pickled(p, b"]" * 100_000 + b"a" * 99_999), "the entry 'a' is a list"),
    "a pickle of a later protocol": (lambda p: pickled(p, b"\x8c\1x"), "holds no pickle .*KeyError: 140"),
    "a pickle that ends early": (lambda p: pickled(p, b"}", end=b""), "holds no pickle"),
    "a pickle that takes more than there is": (lambda p: pickled(p, b"\x87"), "holds no pickle"),
    "half a file": (lambda p: (old_format(p), p.write_bytes(p.read_bytes()[:100])), "before torch 1.6"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_what_is_no_state_dict_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    write, message = BAD[how]
    write(tmp_path / "model.bin")
    with pytest.raises(fewbits.errors.FormatError, match=message) as refused:
        quantize_small(tmp_path / "model.bin", "int8", output=tmp_path / "out")
    assert "model.bin" in str(refused.value)
    assert os.listdir(tmp_path) == ["model.bin"]


def test_tensors_with_attributes_are_read_without_them(tmp_path):
    plain, parameter = torch.arange(4.0), nn.Parameter(torch.ones(2, 2))
    plain.note = parameter.note = "a note"
    torch.save({"plain": plain, "parameter": parameter}, tmp_path / "model.bin")
    file = TorchFile(tmp_path / "model.bin")
    assert torch.equal(file.read("plain"), plain)
    assert torch.equal(file.read("parameter"), parameter)


def test_what_cannot_be_read_is_named(tmp_path):
    assert not is_torch_file(tmp_path / "missing.bin")
    torch.save({"a": torch.ones(3, 3)}, tmp_path / "model.bin")
    file, out = TorchFile(tmp_path / "model.bin"), torch.empty(2)
    for name, start, into in [("b", 0, out), ("a", 8, out), ("a", 0, out.double())]:
        with pytest.raises(fewbits.errors.ArgumentError, match=rf"{name}"):
            file.read_into(name, start, into)
    with pytest.raises(fewbits.errors.CheckpointError, match="does not exist"):
        fewbits.quantize(tmp_path / "missing.bin", "int8", output=tmp_path / "out")


def test_a_safetensors_file_whose_header_has_the_length_of_a_pickle_is_none(tmp_path):
    """The first byte of a file is the lowest of its header's length, and that of a pickle is 128."""
    text = b'{"m.weight":{"dtype":"F32","shape":[32,32],"data_offsets":[0,4096]}}'.ljust(0x280)
    (tmp_path / "in").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4096))
    assert (tmp_path / "in").read_bytes().startswith(b"\x80\x02")
    assert quantize_small(tmp_path / "in", "int8", output=tmp_path / "out").ledger.count("quantized") == 1


def test_a_safetensors_file_whose_last_tensor_is_an_archive_is_none(tmp_path):
    """An archive is known by its end, and a safetensors file ends with the bytes of its last tensor."""
    torch.save({"a": torch.ones(3, 3)}, tmp_path / "inner.bin")
    inner = torch.frombuffer(bytearray((tmp_path / "inner.bin").read_bytes()), dtype=torch.uint8)
    save_file({"m.weight": torch.randn(32, 32), "z": inner}, tmp_path / "in")
    assert zipfile.is_zipfile(tmp_path / "in")
    assert not is_torch_file(tmp_path / "in")
    quantize_small(tmp_path / "in", "int8", output=tmp_path / "out")
    assert torch.equal(fewbits.load(tmp_path / "out")["z"], inner)


# Where a result of fewbits is expected, the error gives the right use of such a file.


def refused(path):
    """The messages of all that read results."""
    messages = set()
    for read in (fewbits.load, lambda p: fewbits.load(p, into=mlp()), fewbits.verify):
        with pytest.raises(FormatError) as caught:
            read(path)
        messages.add(str(caught.value))
    (message,) = messages
    return message


def test_a_float_state_dict_that_is_loaded_is_said_to_be_a_source(tmp_path):
    torch.save(mlp().state_dict(), path := tmp_path / "model.pt")
    assert "holds a float state dict that torch.save wrote: quantize(path, ...) takes it" in refused(path)
    quantize_small(path, output=tmp_path / "model.safetensors")
    assert fewbits.load(tmp_path / "model.safetensors", into=mlp())[0].weight.shape == (32, 16)


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4"])
def test_a_quantized_state_dict_that_is_loaded_is_said_to_go_into_a_quantized_model(scheme, tmp_path):
    quantized = quantize_small(mlp(), scheme).model
    torch.save(quantized.state_dict(), path := tmp_path / "model.pt")
    message = refused(path)
    assert "holds a quantized state dict" in message
    assert "model.load_state_dict(torch.load(path, weights_only=True))" in message
    model = quantize_small(mlp(seed=1), scheme).model
    model.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(model[0].weight, quantized[0].weight)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_whole_model_that_is_loaded_is_said_to_be_one(is_quantized, tmp_path):
    model = quantize_small(mlp()).model if is_quantized else mlp()
    torch.save(model, path := tmp_path / "model.pt")
    assert "Sequential, not a state dict" in refused(path)
    assert "take the result of torch.load(path, weights_only=False)" in refused(path)
    assert torch.equal(torch.load(path, weights_only=False)[0].weight, model[0].weight)


def test_a_damaged_safetensors_file_is_not_taken_for_one_of_torch_save(tmp_path):
    (path := tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "torch.save" not in refused(path)
