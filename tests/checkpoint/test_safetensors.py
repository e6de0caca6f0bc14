"""Files as such: plain safetensors, aligned, without gaps, written whole or not at all."""

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from support.checkpoints import joined, split

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip
SHAPES = [(), (1,), (0,), (0, 3), (3,), (2, 5), (3, 1, 2)]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    """Any bytes at all, seen in any dtype: NaN payloads and signed zeros must survive too."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    count = torch.Size(shape).numel() * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def write(path, tensors, metadata=None):
    entries = {name: fewbits.extend.Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with fewbits.extend.SafetensorsSerializer().writer(path, fewbits.extend.Header(entries, metadata or {})) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.seal(metadata or {})
        writer.close()


def raw(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("written") / "file.safetensors"


@given(st.dictionaries(names, tensors(), max_size=6), st.dictionaries(names, names, max_size=3))
def test_the_safetensors_library_reads_back_names_dtypes_shapes_and_bytes(scratch, written, metadata):
    write(scratch, written, metadata)
    read = safetensors.torch.load(scratch.read_bytes())
    assert {name: (t.dtype, t.shape, raw(t)) for name, t in read.items()} == {
        name: (t.dtype, t.shape, raw(t)) for name, t in written.items()
    }
    with safetensors.safe_open(scratch, "pt") as file:
        assert (file.metadata() or {}) == metadata


@given(st.dictionaries(names, tensors(), max_size=6))
def test_our_reader_agrees_with_the_library(scratch, written):
    write(scratch, written)
    reader = fewbits.extend.SafetensorsSerializer().reader(scratch)
    assert reader.entries == {name: fewbits.extend.Entry(tuple(t.shape), t.dtype) for name, t in written.items()}
    assert all(raw(reader.read(name)) == raw(tensor) for name, tensor in written.items())


@given(st.dictionaries(names, tensors(), min_size=1, max_size=6))
def test_every_tensor_lies_at_a_multiple_of_its_element_size_and_nothing_lies_between(scratch, written):
    write(scratch, written)
    header, payload = split(scratch.read_bytes())
    start_of_payload = scratch.stat().st_size - len(payload)
    assert start_of_payload % 64 == 0
    assert len(payload) == sum(tensor.nbytes for tensor in written.values())
    for name, tensor in written.items():
        assert (start_of_payload + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(torch.arange(12.0).reshape(3, 4).T, id="transposed"),
        pytest.param(torch.arange(12)[::3], id="strided"),
        pytest.param(torch.ones(1).expand(4), id="expanded"),
        pytest.param(torch.arange(6.0)[2:], id="offset"),
        pytest.param(torch.ones(3, requires_grad=True), id="with gradient"),
        pytest.param(torch.tensor([1 + 2j, 3 - 4j]).conj(), id="conjugated lazily"),
        pytest.param(torch.tensor([1 + 2j, 3 - 4j]).conj().imag, id="negated lazily"),
    ],
)
def test_a_view_is_written_as_it_reads(scratch, view):
    write(scratch, {"view": view})
    assert safetensors.torch.load_file(scratch)["view"].tolist() == view.tolist()


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz])
def test_a_dtype_that_safetensors_lacks_is_refused_by_name_before_anything_is_written(tmp_path, dtype):
    with pytest.raises(fewbits.errors.FormatError, match=f"odd.*{str(dtype).removeprefix('torch.')}"):
        write(tmp_path / "f", {"odd": torch.zeros(2, dtype=torch.uint8).to(dtype)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__metadata__", "lone \ud800 surrogate"])
def test_a_name_that_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(fewbits.FewbitsError):
        write(tmp_path / "f", {name: torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_final_metadata_may_be_shorter_than_announced_but_not_longer(tmp_path):
    serializer, path = fewbits.extend.SafetensorsSerializer(), tmp_path / "f"
    header = fewbits.extend.Header({}, {"key": "x" * 200})
    with serializer.writer(path, header) as writer:
        writer.seal({"key": "short"})
        writer.close()
    assert serializer.reader(path).metadata == {"key": "short"}
    with serializer.writer(path, header) as writer, pytest.raises(fewbits.errors.ArgumentError, match="metadata"):
        writer.seal({"key": "x" * 300})
    assert serializer.reader(path).metadata == {"key": "short"}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.ones(2), "'b' is not in the file's header"),
        ("a", torch.ones(3), "a has shape"),
        ("a", torch.ones(2).half(), "a has shape .* float16"),
    ],
)
def test_a_writer_takes_only_what_was_announced(tmp_path, name, tensor, message):
    header = fewbits.extend.Header({"a": fewbits.extend.Entry((2,), torch.float32)}, {})
    with (
        fewbits.extend.SafetensorsSerializer().writer(tmp_path / "f", header) as writer,
        pytest.raises(fewbits.FewbitsError, match=message),
    ):
        writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


def test_a_writer_takes_each_tensor_once_and_closes_only_when_it_has_all(tmp_path):
    header = fewbits.extend.Header({name: fewbits.extend.Entry((2,), torch.float32) for name in "ab"}, {})
    with fewbits.extend.SafetensorsSerializer().writer(tmp_path / "f", header) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(fewbits.errors.ArgumentError, match="'a'"):
            writer.write("a", torch.ones(2))
        with pytest.raises(fewbits.errors.CheckpointError, match="never written: b"):
            writer.seal({})
    assert not list(tmp_path.iterdir())


def test_abort_after_close_changes_nothing(tmp_path):
    with fewbits.extend.SafetensorsSerializer().writer(tmp_path / "f", fewbits.extend.Header({}, {})) as writer:
        writer.seal({})
        writer.close()
        writer.abort()
        writer.abort()
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_changing_what_was_read_never_changes_the_file(tmp_path):
    write(tmp_path / "f", {"a": torch.zeros(1000)})
    before = (tmp_path / "f").read_bytes()
    fewbits.extend.SafetensorsSerializer().reader(tmp_path / "f").read("a").fill_(1)
    assert (tmp_path / "f").read_bytes() == before


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = {"odd": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    (tmp_path / "f").write_bytes(joined(header, bytes(3)))
    with pytest.raises(fewbits.errors.FormatError, match="F6_E2M3"):
        fewbits.extend.SafetensorsSerializer().reader(tmp_path / "f")


def test_reading_a_name_that_is_not_there_is_a_named_error(tmp_path):
    write(tmp_path / "f", {"a": torch.ones(2)})
    with pytest.raises(fewbits.errors.ArgumentError, match="'b'"):
        fewbits.extend.SafetensorsSerializer().reader(tmp_path / "f").read("b")
