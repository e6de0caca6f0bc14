"""Forged files of one tensor: consistent, but not written by any scheme."""

import hashlib
import struct

import attrs
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from case import Case, Item
from fewbits.checkpoint.codec import CODEC
from fewbits.checkpoint.metadata import Metadata
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from support.checkpoints import DTYPE_NAMES, joined
from targets import run

CODES = {name: code for code, name in DTYPE_NAMES.items()}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def specs():
    return st.builds(
        lambda bits, granularity, group, symmetric, scale, activations: fewbits.QuantSpec(
            bits,
            granularity,
            group_size=group if granularity == "group" else None,
            symmetric=symmetric,
            scale_dtype=scale,
            activations=None if granularity == "group" else activations,
        ),
        st.integers(2, 8),
        st.sampled_from(["tensor", "channel", "group"]),
        st.sampled_from([1, 3, 1 << 62]),
        st.booleans(),
        st.sampled_from([None, *DTYPES]),
        st.sampled_from([None, "static", "dynamic"]),
    )


@st.composite
def layouts(draw):
    """Any layout of a small tensor, including unusual views and permutations."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 33]), max_size=4) | st.just([1] * 64))
    views = [shape, [*shape, 1][:64], [*shape[:-2], shape[-2] * shape[-1]] if len(shape) > 1 else shape]
    view = draw(st.sampled_from(views))
    permutation = draw(st.permutations(range(len(view))))
    return fewbits.extend.Layout(shape, view, permutation, draw(st.integers(0, len(view))))


def forged_file(row):
    """A file with this row only: all scales are one, and all codes are the lowest."""
    entries = dict(sorted(CODEC.entries(row).items(), key=lambda item: -item[1].dtype.itemsize))
    row = attrs.evolve(row, bytes_after=sum(entry.nbytes for entry in entries.values()))
    header, payload, digests = {}, b"", {}
    for name, entry in entries.items():
        content = bytes(entry.nbytes)
        if name.endswith("_shape"):
            content = struct.pack(f"<{len(row.shape)}q", *row.shape)
        if name.endswith("_scale"):
            content = bytes(torch.ones(entry.shape, dtype=entry.dtype).view(-1).view(torch.uint8).tolist())
        place = [len(payload), len(payload) + len(content)]
        code = CODES[str(entry.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": place}
        payload += content
        digests[name] = hashlib.sha256(content).hexdigest()
    metadata = Metadata(Ledger([row]), None, {}, digests)
    header["__metadata__"] = metadata.to_strings(entries)
    return Case("load", "int8", "f.safetensors", (Item("file", "f.safetensors", joined(header, payload)),))


@given(layouts(), specs(), st.sampled_from(DTYPES))
def test_any_layout_and_any_spec_can_be_loaded_and_verified(tmp_path_factory, layout, spec, dtype):
    nbytes = torch.Size(layout.shape).numel() * dtype.itemsize
    row = LedgerRow("a.weight", layout.shape, dtype, "quantized", "forged", nbytes, 0, spec, layout)
    assert run(forged_file(row), tmp_path_factory.getbasetemp()) == "ok"
