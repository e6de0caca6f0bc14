"""What must hold for every input: a named error or a sound result, and nothing written unless a call succeeded."""

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
from fewbits.formats.compressed_tensors import is_compressed_tensors

#: What a process may take while one input is tried, beyond what it has: inputs have some kilobytes.
MEMORY = 1 << 30

#: The largest file that may be written.
FILE_SIZE = 64 << 20


class FindingError(AssertionError):
    """Something that must not happen."""


class Net(nn.Module):
    """The model that some of the seeds were made from."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


def run(case: Case, scratch: Path | None = None) -> str:
    """Do what a case asks for in a directory of its own, and hold the result against what must be.

    Args:
        case: the input.
        scratch: where to make the directory; None stands for the system's place for temporary files.

    Returns:
        the name of the error that it ended in, or "ok".

    Raises:
        FindingError: if something is not as it must be.
        BaseException: whatever escaped that is no `fewbits.FewbitsError`.
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=scratch))
    try:
        path = case.write(folder / "source")
        return _load(path, folder) if case.task == "load" else _quantize(path, case.scheme, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Hold the process to `MEMORY` more than it has, and to files of `FILE_SIZE`, where the system can do that."""
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
    """What a call returns, or the error that it may end in."""
    try:
        return call()
    except allowed as error:
        if not str(error):
            raise FindingError("an error without a message") from error
        return error


def _failed(outcome: object) -> bool:
    return isinstance(outcome, BaseException)


def _require(condition: object, what: str) -> None:
    if not condition:
        raise FindingError(what)


# Loading.


def _load(path: Path, folder: Path) -> str:
    before = everything_in(folder)
    opened = _attempt(lambda: Checkpoint(path), fewbits.errors.CheckpointError)
    trusting = _attempt(lambda: fewbits.load(path, check="header"), fewbits.errors.CheckpointError)
    loaded = _attempt(lambda: fewbits.load(path), fewbits.errors.CheckpointError)
    report = _attempt(lambda: fewbits.verify(path), fewbits.errors.CheckpointError)
    # What another tool has written is verified, and not loaded.
    foreign = not _failed(report) and is_compressed_tensors(path)
    _require(not _failed(opened) or _failed(report) or foreign, "what cannot be opened was verified")
    _require(not _failed(opened) or _failed(trusting), "what cannot be opened was loaded")
    _require(not _failed(trusting) or _failed(loaded), "what cannot be trusted was loaded")
    _require(foreign or _failed(loaded) == (_failed(report) or not report.ok), "loading and verifying do not agree")
    if not _failed(opened):
        _inspect(opened)
    if not _failed(trusting):
        _decode(trusting)
    if not _failed(loaded):
        _check_loaded(path, opened, loaded)
    _load_into(path, loaded)
    nothing_left(folder, before)
    return type(loaded).__name__ if _failed(loaded) else "ok"


def _inspect(checkpoint: Checkpoint) -> None:
    """What the command line shows of a file."""
    ledger, metadata = checkpoint.ledger, checkpoint.metadata
    str(ledger), ledger.summary()
    figures = {name: metrics.to_dict() for name, metrics in metadata.metrics.items()}
    json.dumps([ledger.to_dict(), figures, dict(metadata.versions), metadata.architecture], allow_nan=False)


def _decode(values: dict[str, Any]) -> None:
    """Whatever opens can be decoded; what the numbers are is for the digests to say."""
    for value in values.values():
        if isinstance(value, fewbits.QuantizedTensor):
            _require(value.dequantize().shape == value.shape, "decoded to another shape")


def _check_loaded(path: Path, checkpoint: Checkpoint, loaded: dict[str, Any]) -> None:
    """What was loaded is what the ledger says, and its bytes have the digests that the files state, read otherwise."""
    stated: dict[str, str] = {}
    found: dict[str, str] = {}
    for file in find_files(path, (".safetensors",)).paths:
        header, payload = _split(file.read_bytes())
        metadata = header.pop("__metadata__")
        stated |= json.loads(metadata["fewbits.digests"], object_pairs_hook=_unique)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[name] = hashlib.sha256(payload[start:stop]).hexdigest()
    _require(found == stated, "loaded, and the digests are not those of the bytes")
    _require([*loaded] == [row.name for row in checkpoint.ledger], "what is loaded is not what the ledger lists")
    for row in checkpoint.ledger:
        value = loaded[row.name]
        tensor = value.dequantize() if isinstance(value, fewbits.QuantizedTensor) else value
        _require(tuple(tensor.shape) == row.shape, f"{row.name!r} has another shape")
        _require(tensor.numel() == math.prod(row.shape), f"{row.name!r} has other elements")
        if isinstance(value, fewbits.QuantizedTensor):
            _require(bool(torch.isfinite(value.scale).all() and (value.scale != 0).all()), f"{row.name!r} has a scale")


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length], object_pairs_hook=_unique), data[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len(dict(pairs)) == len(pairs), "loaded with a key that is there twice")
    return dict(pairs)


def _load_into(path: Path, loaded: object) -> None:
    """Into a model: all of it or nothing."""
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = _attempt(lambda: fewbits.load(path, into=model), fewbits.errors.CheckpointError)
    if _failed(outcome):
        same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        _require(same and type(model.up) is nn.Linear, "refused, and the model is another")
    else:
        _require(not _failed(loaded), "loaded into a model, and not without one")
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
        return "ValidationError"  # which comes after the result is written, and says why not to use it
    if _failed(result):
        nothing_left(folder, before)
        return type(result).__name__
    after = everything_in(folder)
    _require(before.items() <= after.items(), "the source was changed")
    _require(all(name.split("/")[0] == "out" for name in after.keys() - before.keys()), "something lies beside it")
    _require(not _failed(planned), "what could not be planned was quantized")
    _require(planned.ledger == result.ledger, "the plan was another")
    loaded = fewbits.load(folder / "out")
    _require(loaded.keys() == {row.name for row in result.ledger.present}, "the result holds something else")
    for name, value in loaded.items():
        if isinstance(value, fewbits.QuantizedTensor):
            _require(bool(torch.isfinite(value.dequantize()).all()), f"{name!r} is not finite")
    return "ok"


def _follow_advice(path: Path, scheme: str, refused: object) -> None:
    """An entry that an error advises to take is there."""
    if advised := re.search(r"or entry=('[^']*'|\"[^\"]*\")$", str(refused)):
        entry = ast.literal_eval(advised[1])
        outcome = _attempt(lambda: fewbits.plan(path, scheme, entry=entry, min_elements=1), fewbits.FewbitsError)
        _require("has no entry" not in str(outcome), f"advised to take the entry {entry!r}, which is not there")


# What lies in a directory.


def nothing_left(folder: Path, before: dict[str, object]) -> None:
    """After a refusal nothing has been written, neither the output nor anything beside it, nor has anything changed.

    Raises:
        FindingError: naming what is there.
    """
    after = everything_in(folder)
    _require(after == before, f"refused, and there is {sorted(after.keys() ^ before.keys()) or 'another source'}")


def everything_in(folder: Path) -> dict[str, object]:
    """Everything below a directory by its path there, with what tells whether it has changed."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            status.st_ino,
            0 if path.is_dir() and not path.is_symlink() else (status.st_size, status.st_mtime_ns),
        )
    return found
