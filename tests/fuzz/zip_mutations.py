"""Mutations of a `torch.save` file: of its records, its pickle, or the archive's own headers."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from random import Random

Records = list[tuple[str, bytes]]

_SIGNATURES = re.compile(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07|\x07\x08)")
_BYTES = (0, 1, 2, 8, 0x7F, 0x80, 0xFE, 0xFF)
_GLOBALS = (
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage", "torch DoubleStorage",
    "torch HalfStorage", "torch BoolStorage", "torch.storage UntypedStorage", "collections OrderedDict", "torch Size",
    "torch float32", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2", "torch Tensor", "torch device",
    "torch._utils _rebuild_wrapper_subclass", "torch.nn.parameter Parameter", "builtins bytearray", "builtins set",
    "_codecs encode", "collections Counter", "os system", "builtins eval", "torch serialization", "torch.nn Module",
)  # fmt: skip
_INTEGERS = (0, 1, 2, 3, 7, 255, -1, 2**15, 2**31 - 1, -(2**31))
_LONG_INTEGERS = (2**63 - 1, 2**62, 2**40, 2**33, -1)
_OPCODES = (b"N", b")", b"]", b"}", b"0", b"2", b"(", b"\x85", b"\x86", b"\x87", b"R", b"b", b"\x89")
_TEXTS = (b"", b"0", b"1", b"cpu", b"cuda", b"meta", b"storage", b"a.weight", b"\xff")


def changed(data: bytes, rng: Random) -> bytes:
    """Apply one change to the file. If the file is no longer an archive, change its bytes."""
    if rng.random() < 0.3:
        return _archive(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    except Exception:  # zipfile raises many kinds of errors for mutated archives
        return _archive(data, rng)
    pickles = [index for index, (name, _) in enumerate(records) if name.endswith(".pkl")]
    if pickles and rng.random() < 0.75:
        index = rng.choice(pickles)
        records[index] = records[index][0], _pickle(records[index][1], rng)
    elif records:
        rng.choice((_drop, _rename, _cut, _grow, _repeat, _shuffle, _byteorder))(records, rng)
    return _zipped(records, zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED)


def _zipped(records: Records, compression: int) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        for name, content in records:
            info = zipfile.ZipInfo(name)  # has a fixed time, so that the same change gives the same bytes
            info.compress_type = compression
            archive.writestr(info, content)
    return made.getvalue()


def _archive(data: bytes, rng: Random) -> bytes:
    """Change bytes in or near one of the archive's own headers."""
    found = [match.start() for match in _SIGNATURES.finditer(data)] or [0]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(found) + rng.randrange(56)
        if at < len(changed):
            changed[at] = rng.choice(_BYTES)
    return bytes(changed)


def _pickle(data: bytes, rng: Random) -> bytes:
    """Drop, repeat, move or insert an opcode, or change its argument."""
    if not data:
        return b"."
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except Exception:  # pickletools raises many kinds of errors for mutated pickles
        starts = [*range(len(data))]
    ops = [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]
    index = rng.randrange(len(ops))
    choice = rng.randrange(7)
    if choice == 0:
        del ops[index]
    elif choice == 1:
        ops.insert(index, ops[rng.randrange(len(ops))])
    elif choice == 2:
        other = rng.randrange(len(ops))
        ops[index], ops[other] = ops[other], ops[index]
    elif choice == 3:
        ops.insert(index, rng.choice(_OPCODES))
    else:
        # Prefer opcodes with an integer, a string or a class as argument: they are rare but matter most.
        telling = [i for i, op in enumerate(ops) if op[:1] in b"KMJcX\x8a" and op]
        index = rng.choice(telling) if telling else index
        ops[index] = _argument(ops[index], rng)
    return b"".join(ops)


def _argument(op: bytes, rng: Random) -> bytes:
    code = op[:1]
    if code in (b"K", b"M", b"J", b"\x8a"):
        if rng.random() < 0.3:
            return b"\x8a\x08" + rng.choice(_LONG_INTEGERS).to_bytes(8, "little", signed=True)
        return b"J" + rng.choice(_INTEGERS).to_bytes(4, "little", signed=True)
    if code == b"c":
        return b"c" + rng.choice(_GLOBALS).replace(" ", "\n").encode() + b"\n"
    if code == b"X":
        text = rng.choice((op[5:] + b"x", op[5:-1], *_TEXTS))
        return b"X" + len(text).to_bytes(4, "little") + text
    return rng.choice((b"N", b"K\x01", b"]", b"}", b"\x88"))


def _drop(records: Records, rng: Random) -> None:
    del records[rng.randrange(len(records))]


def _rename(records: Records, rng: Random) -> None:
    index = rng.randrange(len(records))
    name, content = records[index]
    folder = name.split("/")[0]
    inside = [f"{folder}/{inner}" for inner in ("data/0", "data.pkl", "byteorder", "data/9")]
    others = ("x", *inside, name.upper(), "../x")
    records[index] = rng.choice(others), content


def _cut(records: Records, rng: Random) -> None:
    index = rng.randrange(len(records))
    name, content = records[index]
    records[index] = name, content[: rng.randrange(len(content) + 1)]


def _grow(records: Records, rng: Random) -> None:
    index = rng.randrange(len(records))
    name, content = records[index]
    records[index] = name, content + bytes(rng.randrange(64))


def _repeat(records: Records, rng: Random) -> None:
    records.insert(rng.randrange(len(records)), rng.choice(records))


def _shuffle(records: Records, rng: Random) -> None:
    rng.shuffle(records)


def _byteorder(records: Records, rng: Random) -> None:
    folder = records[0][0].split("/")[0]
    records.append((f"{folder}/byteorder", rng.choice((b"big", b"little", b"", b"\xff"))))
