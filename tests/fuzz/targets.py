"""Check every input: it ends in a fewbits error or a sound result, and files are written only on success."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits
from case import Case
from fewbits.checkpoint.folder import find_files
from fewbits.checkpoint.reading import Checkpoint
from fewbits.formats.registry import recognized

#: Bytes of memory that one input may use, beyond the memory in use before. Inputs have a few kilobytes.
MEMORY = 1 << 30

#: Maximum bytes of a written file.
FILE_SIZE = 64 << 20


class FindingError(AssertionError):
    """A violated requirement."""


class Net(nn.Module):
    """The model that some seeds contain."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


def run(case: Case, scratch: Path | None = None) -> str:
    """Run a case in a new directory, and check the result.

    Args:
        case: the input.
        scratch: parent of the new directory; None means the system's directory for temporary files.

    Returns:
        the class name of the error that the case ended in, or "ok".

    Raises:
        FindingError: if a requirement is violated.
        BaseException: any error that is not a `fewbits.FewbitsError`.
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=scratch))
    try:
        path = case.write(folder / "source")
        return _load(path, folder) if case.task == "load" else _quantize(path, case.scheme, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit the process to `MEMORY` additional bytes and to files of `FILE_SIZE`, on systems that support this."""
    try:
        import resource

        status = Path("/proc/self/status").read_text(encoding="ascii")
    except (ImportError, OSError):
        yield
        return
    now = int(re.search(r"VmData:\s*(\d+) kB", status)[1]) << 10
    limits = {resource.RLIMIT_DATA: now + MEMORY, resource.RLIMIT_FSIZE: FILE_SIZE}
    before = {kind: resource.getrlimit(kind) for kind in limits}
    try:
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, before[kind][1]))
        yield
    finally:
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)


def _attempt(call: Callable[[], Any], allowed: type[fewbits.FewbitsError]) -> Any:
    """Return the result of a call, or the error if it is of the allowed class and has a message."""
    try:
        return call()
    except allowed as error:
        if not str(error):
            raise FindingError("an error without a message") from error
        return error


def _failed(outcome: object) -> bool:
    return isinstance(outcome, BaseException)


def _require(condition: object, problem: str) -> None:
    if not condition:
        raise FindingError(problem)


# Loading.


def _load(path: Path, folder: Path) -> str:
    before = everything_in(folder)
    opened = _attempt(lambda: Checkpoint(path), fewbits.errors.CheckpointError)
    trusting = _attempt(lambda: fewbits.load(path, check="header"), fewbits.errors.CheckpointError)
    loaded = _attempt(lambda: fewbits.load(path), fewbits.errors.CheckpointError)
    report = _attempt(lambda: fewbits.verify(path), fewbits.errors.CheckpointError)
    # A checkpoint of another tool is recognized by its tensors, and has no digests.
    foreign = isinstance(_attempt(lambda: recognized(path), fewbits.errors.CheckpointError), type)
    _require(not _failed(opened) or _failed(report) or foreign, "a file that cannot be opened was verified")
    _require(not _failed(opened) or _failed(trusting) or foreign, "a file that cannot be opened was loaded")
    _require(not _failed(trusting) or _failed(loaded), "a file that fails with check='header' was loaded")
    _require(foreign or _failed(loaded) == (_failed(report) or not report.ok), "loading and verifying do not agree")
    if not _failed(opened):
        _inspect(opened)
    if not _failed(trusting):
        _decode(trusting)
    if not _failed(loaded) and not foreign:
        _check_loaded(path, opened, loaded)
    _load_into(path, loaded)
    nothing_left(folder, before)
    return type(loaded).__name__ if _failed(loaded) else "ok"


def _inspect(checkpoint: Checkpoint) -> None:
    """Render everything that the command line shows of a file."""
    ledger, metadata = checkpoint.ledger, checkpoint.metadata
    str(ledger), ledger.summary()
    figures = {name: metrics.to_dict() for name, metrics in metadata.metrics.items()}
    json.dumps([ledger.to_dict(), figures, dict(metadata.versions), metadata.architecture], allow_nan=False)


def _decode(values: dict[str, Any]) -> None:
    """Check that every tensor of a file that opens can be decoded. Digests, not this function, check the values."""
    for value in values.values():
        if isinstance(value, fewbits.QuantizedTensor):
            _require(value.dequantize().shape == value.shape, "decoded to another shape")


def _check_loaded(path: Path, checkpoint: Checkpoint, loaded: dict[str, Any]) -> None:
    """Check loaded tensors against the ledger, and the files' bytes against their digests, with a parser of its own."""
    stated: dict[str, str] = {}
    found: dict[str, str] = {}
    for file in find_files(path, (".safetensors",)).paths:
        header, payload = _split(file.read_bytes())
        metadata = header.pop("__metadata__")
        stated |= json.loads(metadata["fewbits.digests"], object_pairs_hook=_unique)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[name] = hashlib.sha256(payload[start:stop]).hexdigest()
    _require(found == stated, "loaded, but the digests do not match the bytes")
    _require([*loaded] == [row.name for row in checkpoint.ledger], "the loaded names are not those in the ledger")
    for row in checkpoint.ledger:
        value = loaded[row.name]
        tensor = value.dequantize() if isinstance(value, fewbits.QuantizedTensor) else value
        _require(tuple(tensor.shape) == row.shape, f"{row.name!r} has another shape")
        _require(tensor.numel() == math.prod(row.shape), f"{row.name!r} has other elements")
        if isinstance(value, fewbits.QuantizedTensor):
            _require(bool(torch.isfinite(value.scale).all() and (value.scale != 0).all()), f"{row.name!r}: a bad scale")


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length], object_pairs_hook=_unique), data[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len(dict(pairs)) == len(pairs), "loaded with a duplicate key")
    return dict(pairs)


def _load_into(path: Path, loaded: object) -> None:
    """Check that loading into a model loads everything or changes nothing."""
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = _attempt(lambda: fewbits.load(path, into=model), fewbits.errors.CheckpointError)
    if _failed(outcome):
        same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        _require(same and type(model.up) is nn.Linear, "refused, but the model has changed")
    else:
        _require(not _failed(loaded), "loaded into a model, but not without one")
        with torch.no_grad():  # with gradients the first layer would import torch's compiler
            _require(tuple(model(torch.ones(2, 24)).shape) == (2, 4), "the loaded model does not compute")


# Quantizing.


def _quantize(path: Path, scheme: str, folder: Path) -> str:
    before = everything_in(folder)
    several = {"max_shard_size": 500} if path.is_dir() else {}
    output = fewbits.Output(folder / "out", threads=1, **several)
    planned = _attempt(lambda: fewbits.plan(path, scheme, output=output, min_elements=1), fewbits.FewbitsError)
    _follow_advice(path, scheme, planned)
    nothing_left(folder, before)
    result = _attempt(lambda: fewbits.quantize(path, scheme, output=output, min_elements=1), fewbits.FewbitsError)
    if isinstance(result, fewbits.errors.ValidationError):
        return "ValidationError"  # raised after the result is written
    if _failed(result):
        nothing_left(folder, before)
        return type(result).__name__
    after = everything_in(folder)
    _require(before.items() <= after.items(), "the source was changed")
    _require(all(name.split("/")[0] == "out" for name in after.keys() - before.keys()), "a file lies beside the output")
    _require(not _failed(planned), "quantized, but planning failed")
    _require(planned.ledger == result.ledger, "the plan has another ledger")
    loaded = fewbits.load(folder / "out")
    _require(loaded.keys() == {row.name for row in result.ledger.present}, "the result has other names than its ledger")
    for name, value in loaded.items():
        if isinstance(value, fewbits.QuantizedTensor):
            _require(bool(torch.isfinite(value.dequantize()).all()), f"{name!r} is not finite")
    return "ok"


def _follow_advice(path: Path, scheme: str, refused: object) -> None:
    """Check that the entry that an error message recommends exists."""
    if advised := re.search(r"or entry=('[^']*'|\"[^\"]*\")$", str(refused)):
        entry = ast.literal_eval(advised[1])
        outcome = _attempt(lambda: fewbits.plan(path, scheme, entry=entry, min_elements=1), fewbits.FewbitsError)
        _require("has no entry" not in str(outcome), f"the error recommends the entry {entry!r}, which does not exist")


# The contents of a directory.


def nothing_left(folder: Path, before: dict[str, object]) -> None:
    """Check that a refused call has written and changed nothing, neither the output nor any file beside it.

    Raises:
        FindingError: if a file was added, removed or changed; the message lists names.
    """
    after = everything_in(folder)
    _require(after == before, f"refused, but there is {sorted(after.keys() ^ before.keys()) or 'another source'}")


def everything_in(folder: Path) -> dict[str, object]:
    """All paths below a directory, each with data that changes when the file changes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            status.st_ino,
            0 if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns),
        )
    return found
