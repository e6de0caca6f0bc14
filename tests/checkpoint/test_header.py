"""Headers that lie: every one is refused by name, before a tensor is looked at."""

import io
import json
import re

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.checkpoint.header import read_header
from support.checkpoints import joined, split


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = {"a": entry(), "b": entry("U8", (3,), 8, 11)}


def raw(header_text, payload=b""):
    text = header_text if isinstance(header_text, bytes) else header_text.encode()
    return len(text).to_bytes(8, "little") + text + payload


LIES = {
    "nothing at all": (b"", "is empty"),
    "a prefix that is cut short": (b"\x01\0\0", "of its 3 bytes"),
    "a header that is longer than the file": ((100).to_bytes(8, "little") + b"{}", "of its 10 bytes"),
    "a header of eight exbibytes": ((1 << 63).to_bytes(8, "little") + b"{}", "should take 9,223,372,036,854,775,808"),
    "no JSON": (raw("{nothing"), "no JSON"),
    "a list": (raw("[]"), "does not begin with {"),
    "spaces first": (raw(" {}"), "does not begin with {"),
    "something after the JSON": (raw("{}x"), "no JSON"),
    "text that is no UTF-8": (raw(b'{"\xff": 1}'), "no JSON"),
    "nesting without end": (raw('{"a":' + "[" * 200_000), "no JSON"),
    "nested objects without end": (raw('{"a":' * 200_000), "no JSON"),
    "a number of ten thousand digits": (raw('{"a": ' + "9" * 10_000 + "}"), "no JSON"),
    "a name twice": (raw('{"a":1,"b":2,"a":1}'), "'a' is in its header twice"),
    "a field twice": (raw('{"a":{"dtype":"F32","dtype":"F64"}}'), "'dtype' is in its header twice"),
    "a string for a tensor": (joined({"a": "F32"}, b""), "'a' is not described by data_offsets, dtype, shape"),
    "a field too few": (joined({"a": {"dtype": "F32", "shape": []}}, b""), "'a' is not described by"),
    "a field too many": (joined({"a": entry() | {"more": 1}}, bytes(8)), "'a' is not described by"),
    "a dtype of another kind": (joined({"a": entry(["F32"])}, bytes(8)), "a has dtype"),
    "an unknown dtype": (joined({"a": entry("F12")}, bytes(8)), "a has dtype 'F12'"),
    "a shape that is no list": (joined({"a": entry() | {"shape": {"0": 2}}}, bytes(8)), "no lists of sizes"),
    "a negative size": (joined({"a": entry(shape=(-2, -1))}, bytes(8)), "no lists of sizes"),
    "a fraction for a size": (joined({"a": entry(shape=(2.0,))}, bytes(8)), "no lists of sizes"),
    "a truth value for a size": (joined({"a": entry(shape=(True, 2))}, bytes(8)), "no lists of sizes"),
    "NaN for a size": (raw('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)), "no lists of sizes"),
    "a size beyond 63 bits": (joined({"a": entry(shape=(1 << 63,))}, bytes(8)), "no lists of sizes"),
    "three offsets": (joined({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "no lists of sizes"),
    "a shape that needs more bytes": (joined({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes"),
    "a product of sizes that overflows 64 bits": (joined({"a": entry("U8", (1 << 33, 1 << 33), 0, 4)}, bytes(4)),
                                                  "needs 73,786,976,294,838,206,464 bytes"),
    "a shape that no tensor can have": (joined({"a": entry(shape=(1 << 62, 4, 0), end=0)}, b""), "which no tensor can"),
    "an empty shape that no tensor can have": (joined({"a": entry(shape=(0, 1 << 62, 1 << 62), end=0)}, b""),
                                               "which no tensor can"),
    "more axes than torch computes with": (joined({"a": entry(shape=[2, *[1] * 64])}, bytes(8)), "which no tensor can"),
    "offsets the wrong way round": (joined({"a": entry(start=8, end=0)}, bytes(8)), "from 8 to 0"),
    "a tensor that begins late": (joined({"a": entry(start=4, end=12)}, bytes(12)), "without gaps"),
    "a gap between tensors": (joined(GOOD | {"b": entry("U8", (3,), 9, 12)}, bytes(12)), "'b' begins at byte"),
    "tensors that overlap": (joined(GOOD | {"b": entry("U8", (3,), 7, 10)}, bytes(10)), "'b' begins at byte"),
    "two tensors in one place": (joined({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at byte"),
    "a tensor beyond the end": (joined(GOOD, bytes(10)), "its tensors end at byte"),
    "bytes after the last tensor": (joined(GOOD, bytes(12)), "its tensors end at byte"),
    "half a character in a name": (raw('{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
                                   "no text that UTF-8 can hold"),
    "half a character in the metadata": (raw('{"__metadata__":{"a":"\\udfff"}}'), "no text that UTF-8 can hold"),
    "metadata that is a list": (joined(GOOD | {"__metadata__": ["pt"]}, bytes(11)), "__metadata__ must map"),
    "metadata that is null": (joined(GOOD | {"__metadata__": None}, bytes(11)), "__metadata__ must map"),
    "metadata with a number": (joined(GOOD | {"__metadata__": {"format": 1}}, bytes(11)), "__metadata__ must map"),
    "metadata with an object": (joined(GOOD | {"__metadata__": {"format": {}}}, bytes(11)), "__metadata__ must map"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    data, message = LIES[lie]
    (tmp_path / "f.safetensors").write_bytes(data)
    with pytest.raises(fewbits.errors.FormatError, match=re.escape(message)) as refused:
        fewbits.extend.SafetensorsSerializer().reader(tmp_path / "f.safetensors")
    assert str(tmp_path / "f.safetensors") in str(refused.value)


def test_a_header_that_does_not_lie_is_read():
    header = read_header(io.BytesIO(joined(GOOD | {"__metadata__": {"format": "pt"}}, bytes(11))), "it")
    assert header.metadata == {"format": "pt"}
    assert {name: span.entry.shape for name, span in header.spans.items()} == {"a": (2,), "b": (3,)}
    assert header.spans["b"].start - header.spans["a"].start == 8


def test_a_header_beyond_the_limit_is_not_read(monkeypatch):
    monkeypatch.setattr("fewbits.checkpoint.header.MAX_HEADER", 50)

    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            self.count += size
            return super().read(size)

    file = Counting(joined(GOOD, bytes(11)))
    with pytest.raises(fewbits.errors.FormatError, match="more than 50"):
        read_header(file, "it")
    assert file.count == 8


def test_empty_tensors_may_lie_anywhere_between_others():
    entries = {"z": entry("F32", (0, 5), 0, 0), "a": entry(), "m": entry("F32", (0,), 8, 8)}
    assert set(read_header(io.BytesIO(joined(entries, bytes(8))), "it").spans) == {"z", "a", "m"}


@st.composite
def edited(draw):
    """A valid file in which something small has been changed."""
    tensors = {f"t{i}": torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)), dtype=dtype)
               for i, dtype in enumerate(draw(st.lists(st.sampled_from([torch.float32, torch.int64, torch.bool]),
                                                       max_size=3)))}  # fmt: skip
    header, payload = split(safetensors.torch.save(tensors, {"format": "pt"}))
    names = sorted(header)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names))
        described = header.get(name)
        if not isinstance(described, dict) or draw(st.integers(0, 5)) == 0:
            header[draw(st.sampled_from([*names, "new"]))] = draw(odd_values)
        else:
            key = draw(st.sampled_from([*described, "new"]))
            described[key] = draw(odd_values)
    payload = payload + bytes(draw(st.integers(0, 2)))
    return joined(header, payload[: len(payload) - draw(st.integers(0, 1))])


odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 24), st.integers(), st.floats(), st.text(max_size=3),
    st.sampled_from(["F32", "I64", "BOOL", "U8"]), st.lists(st.integers(0, 24), max_size=3),
    st.lists(st.integers(-1, 1 << 64), max_size=2),
    st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
)  # fmt: skip


@given(edited())
def test_what_is_accepted_the_safetensors_library_accepts_and_reads_alike(data):
    try:
        header = read_header(io.BytesIO(data), "it")
    except fewbits.errors.FormatError:
        return
    read = safetensors.torch.load(data)
    assert {name: span.entry for name, span in header.spans.items()} == {
        name: fewbits.extend.Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in read.items()
    }


@given(edited(), st.data())
def test_a_flipped_bit_or_a_cut_is_refused_or_changes_no_place(data, draw):
    index = draw.draw(st.integers(0, 8 * len(data) - 1))
    damaged = bytearray(data)
    damaged[index // 8] ^= 1 << index % 8
    damaged = damaged[: draw.draw(st.integers(0, len(data)))]
    try:
        header = read_header(io.BytesIO(damaged), "it")
    except fewbits.errors.FormatError:
        return
    assert sum(span.entry.nbytes for span in header.spans.values()) < len(damaged)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    reader, out = fewbits.extend.SafetensorsSerializer().reader(path), torch.empty(4)
    reader.read_into("a", 0, out)
    safetensors.torch.save_file({"b": torch.ones(4), "a": torch.zeros(4)}, path)
    for read in (lambda: reader.read_into("a", 0, out), lambda: reader.read("a")):
        with pytest.raises(fewbits.errors.CheckpointError, match="has changed since it was opened"):
            read()
    path.unlink()
    with pytest.raises(fewbits.errors.CheckpointError, match="cannot be read"):
        reader.read_into("a", 0, out)


def test_reading_by_position_reads_any_elements_and_no_others(tmp_path):
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file({"a": torch.arange(10).half(), "b": torch.arange(12).view(3, 4)}, path)
    reader = fewbits.extend.SafetensorsSerializer().reader(path)
    out = torch.empty(2, 3, dtype=torch.int64)
    reader.read_into("b", 5, out)
    assert out.tolist() == [[5, 6, 7], [8, 9, 10]]
    for start, count, dtype in [(7, 6, torch.int64), (-1, 1, torch.int64), (0, 1, torch.float32)]:
        with pytest.raises(fewbits.errors.ArgumentError, match="b has no"):
            reader.read_into("b", start, torch.empty(count, dtype=dtype))


def test_the_header_of_a_sparse_file_of_half_a_terabyte_is_read_at_once(tmp_path):
    path, count = tmp_path / "big.safetensors", 1 << 38
    text = json.dumps({"a": entry("BF16", (count,), 0, 2 * count)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + 2 * count)
    reader, out = fewbits.extend.SafetensorsSerializer().reader(path), torch.ones(3, dtype=torch.bfloat16)
    assert reader.entries["a"].nbytes == 1 << 39
    reader.read_into("a", count - 3, out)
    assert out.tolist() == [0, 0, 0]
