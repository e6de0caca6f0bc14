"""Hostile cases made by hand, which mutations alone would take long to find."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from case import Case, Item
from seeds import safetensors_file, seeds, torch_file
from support.checkpoints import forged, forged_tensor, joined, sign, split

_MODEL = "model.safetensors"
_FLOAT = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def hostile() -> dict[str, Case]:
    """All hostile cases, by names that describe their defects."""
    valid = seeds()
    return dict([*_headers(), *_folders(valid["folder"]), *_forgeries(valid), *_pickles(), *_others()])


def _headers() -> Iterator[tuple[str, Case]]:
    huge = _FLOAT | {"shape": [1 << 33, 1 << 33]}
    headers = {
        "nested-without-end": b'{"a":' + b"[" * 10_000,
        "number-without-end": b'{"a":' + b"9" * 10_000 + b"}",
        "name-twice": b'{"a":1,"a":2}',
        "no-object": b"[]",
        "half-a-character": b'{"\\ud800":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}}',
        "overlapping": json.dumps({"a": _FLOAT, "b": _FLOAT}).encode(),
        "shape-overflows": json.dumps({"a": huge}).encode(),
        "shape-of-nothing": json.dumps({"a": _FLOAT | {"shape": [1 << 62, 4, 0], "data_offsets": [0, 0]}}).encode(),
        "negative": json.dumps({"a": _FLOAT | {"shape": [-2, -4]}}).encode(),
        "dtype": json.dumps({"a": _FLOAT | {"dtype": "F12"}}).encode(),
        "metadata": json.dumps({"__metadata__": {"format": 1}, "a": _FLOAT}).encode(),
        "no-tensors": b"{}",
    }
    for name, text in headers.items():
        data = len(text).to_bytes(8, "little") + text + bytes(32)
        yield f"header-{name}", _file(data if name != "no-tensors" else data[:-32])
    for name, length in {"of-exbibytes": 1 << 63, "beyond-the-end": 1 << 20}.items():
        yield f"header-{name}", _file(length.to_bytes(8, "little") + b"{}")
    yield "header-cut-short", _file(b"\2\0")


def _file(data: bytes, task: str = "quantize") -> Case:
    return Case(task, "int8", _MODEL, (Item("file", _MODEL, data),))


def _others() -> Iterator[tuple[str, Case]]:
    """Files of other formats, and a state dict that contains itself."""
    files = {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "protobuf": b"\x08\x08\x12\7pytorch",
        "pickle": b"\x80\4K\1.",
        "noise": b"\xff\xfe\0\1",
    }
    for name, data in files.items():
        yield f"other-{name}", _file(data)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.npy", b"")
    yield "other-archive", _file(made.getvalue(), "load")
    one, two = b"X\1\0\0\0a", b"X\1\0\0\0b"
    yield "pickle-within-itself", _torch(_with_pickle(b"\x80\2}q\0" + one + b"h\0s" + two + b"}" + one + b"h\0ss."))


def _folders(valid: Case) -> Iterator[tuple[str, Case]]:
    for name, target in {
        "above": "../../x.safetensors",
        "absolute": "/etc/x.safetensors",
        "no-weights": "a.txt",
    }.items():
        yield (
            f"index-names-{name}",
            _with_index(valid, lambda index, target=target: index["weight_map"].update(a=target)),
        )
    yield "index-names-missing", _with_index(valid, lambda index: index["weight_map"].update(a="a.safetensors"))
    yield "index-of-wrong-type", _with_index(valid, lambda index: index.update(weight_map=[1]))
    yield "index-names-another-file", _with_index(valid, lambda index: index["weight_map"].update(_turned(index)))
    yield "index-names-no-tensor", _with_index(valid, lambda index: index["weight_map"].update(_more(index)))
    links = {"above": b"../../../etc/passwd", "itself": _MODEL.encode(), "device": b"/dev/zero"}
    for name, target in links.items():
        yield f"link-{name}", Case("quantize", "int8", ".", (Item("link", _MODEL, target),))
    yield "pipe", Case("quantize", "int8", ".", (Item("pipe", _MODEL),))
    yield "nothing", Case("quantize", "int8", ".", ())
    shards = [item for item in valid.items if not item.name.endswith(".index.json")]
    yield "shards-without-index", attrs.evolve(valid, items=(*shards,))
    yield "shard-alone", attrs.evolve(valid, items=(*shards[1:],))


def _with_index(case: Case, edit: Callable[[dict[str, Any]], object]) -> Case:
    """The case with an edited index."""

    def edited(item: Item) -> Item:
        if not item.name.endswith(".index.json"):
            return item
        index = json.loads(item.data)
        edit(index)
        return attrs.evolve(item, data=json.dumps(index).encode())

    return attrs.evolve(case, items=tuple(map(edited, case.items)))


def _turned(index: dict[str, Any]) -> dict[str, str]:
    """An index entry that places one tensor in the file of another."""
    names, files = [*index["weight_map"]], [*index["weight_map"].values()]
    return {names[0]: files[-1]}


def _more(index: dict[str, Any]) -> dict[str, str]:
    return {"more": next(iter(index["weight_map"].values()))}


def _forgeries(valid: dict[str, Case]) -> Iterator[tuple[str, Case]]:
    """Changed fewbits files, signed again so that the header's digest is right."""
    data = valid["ours-int8-channel"].items[0].data
    shape = split(data)[0]["up.weight_scale"]["shape"]
    scales = struct.pack("f", float("nan")) * shape[0]
    yield "scale-nan", _file(forged_tensor(data, "up.weight_scale", scales), "load")
    yield "shape-part", _file(forged_tensor(data, "up.weight_shape", bytes(16)), "load")
    for key in ("ledger", "digests", "metrics", "versions", "architecture", "format_version"):
        yield f"{key}-missing", _file(forged(data, lambda strings, key=key: strings.pop(f"fewbits.{key}")), "load")
        yield (
            f"{key}-wrong",
            _file(forged(data, lambda strings, key=key: strings.update({f"fewbits.{key}": "3"})), "load"),
        )
    yield "digest-missing", _file(forged(data, lambda strings: strings.update({"fewbits.digests": "{}"})), "load")
    twice = '{"up.weight_packed":"0",' + split(data)[0]["__metadata__"]["fewbits.digests"][1:]
    yield "digest-twice", _file(forged(data, lambda strings: strings.update({"fewbits.digests": twice})), "load")
    figures = '{"up.weight":{"sqnr_db":NaN,"max_abs_error":0,"cosine":1,"worst_bound_ratio":0}}'
    yield "metric-nan", _file(forged(data, lambda strings: strings.update({"fewbits.metrics": figures})), "load")
    header, payload = split(data)
    header["stowaway"] = {"dtype": "I32", "shape": [1], "data_offsets": [len(payload), len(payload) + 4]}
    sign(header)
    yield "stowaway", _file(joined(header, payload + bytes(4)), "load")
    folder = valid["ours-folder"]
    yield "shards-of-another-index", _with_index(folder, lambda index: index["metadata"].update({"fewbits.shards": {}}))
    yield "index-of-another-version", _with_index(folder, lambda index: index["metadata"].clear())
    yield "index-misplaces", _with_index(folder, lambda index: index["weight_map"].update(_turned(index)))


def _pickles() -> Iterator[tuple[str, Case]]:
    doubled = b")" + b"".join(b"q%ch%c\x86" % (index, index) for index in range(48))
    pickles = {
        "bytearray": b"X\1\0\0\0acbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85R",
        "system": b"X\1\0\0\0acos\nsystem\nX\1\0\0\0a\x85R",
        "tuple-for-a-name": doubled + b"N",
        "tuples": b"X\1\0\0\0a" + doubled,
        "lists": b"X\1\0\0\0a" + b"]" * 8_000 + b"a" * 7_999,
        "memo": b"X\1\0\0\0aNr\xff\xff\xff\x7f",
        "dict": b"X\1\0\0\0a}",
    }
    for name, body in pickles.items():
        yield f"pickle-{name}", _torch(_with_pickle(b"\x80\2}" + body + b"s."))
    whole = {"pickle-of-a-list": b"\x80\2].", "pickle-of-a-call": b"\x80\2cos\ngetcwd\n)R."}
    for name, body in whole.items():
        yield name, _torch(_with_pickle(body))
    tensors = {
        "expanded": torch.zeros(1).expand(1 << 30),
        "sparse": torch.eye(2).to_sparse(),
        "conjugated": torch.ones(2, 2, dtype=torch.complex64).conj(),
        "of-a-late-dtype": torch.ones(2, 2, dtype=torch.uint16),
    }
    for name, tensor in tensors.items():
        yield f"tensor-{name}", _torch(torch_file({"a.weight": tensor, "b.weight": torch.ones(2, 4)}))
    noted = torch.ones(2, 4)
    noted.note = "a note"
    yield "tensor-with-a-note", _torch(torch_file({"a.weight": noted}))
    archive = torch_file({"a.weight": torch.ones(2, 4)})
    yield "archive-cut-short", _torch(archive[:-30])
    listed = archive.index(b"PK\x01\x02")
    yield "archive-that-lies", _torch(archive[: listed + 42] + b"\1" + archive[listed + 43 :])
    yield "archive-and-safetensors", _file(safetensors_file({"a.weight": torch.ones(2, 4)}) + archive)
    codes = {"a.weight_packed": torch.ones(2, 1, dtype=torch.int32), "a.weight_scale": torch.ones(2, 1)}
    for name, data in (("float", archive), ("quantized", torch_file(codes)), ("list", _with_pickle(b"\x80\2]."))):
        yield f"loaded-as-a-result-{name}", _file(data, "load")


def _torch(data: bytes) -> Case:
    return Case("quantize", "int8", "model.bin", (Item("file", "model.bin", data),))


def _with_pickle(pickle: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
    return made.getvalue()
