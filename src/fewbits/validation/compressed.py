"""Verify a checkpoint that another tool wrote in a format of compressed-tensors against its source.

There is no error bound for such a checkpoint: the tool may have clipped weights, compensated errors, or rounded in a
narrower dtype. An error beyond half a step is therefore a note; only errors that no rounding explains are failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import chunks
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.serializer import Entry, Serializer
from fewbits.errors import FormatError
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.tensor import same_bits
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source
from fewbits.validation.checks import Pairs, check_fail_under, examine_tensor
from fewbits.validation.report import Report
from fewbits.validation.tensors import TensorReport


def verify_compressed_tensors(
    path: str | os.PathLike[str],
    source: Source | None,
    serializer: Serializer | None,
    chunk_elements: int | None,
    fail_under: float,
    progress: Progress,
) -> Report:
    """Read every tensor of a compressed-tensors checkpoint, and compare it with its source.

    Args:
        path: the file, the directory, or the index in it.
        source: the source that the checkpoint was made from; None checks structure and scales only.
        serializer: reads the files; None means safetensors.
        chunk_elements: approximate number of elements to compare at a time; see `fewbits.checkpoint.chunks.chunks`.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        FormatError: if the index or the config is invalid. (A tensor that cannot be read is a failure in the report.)
        ArgumentError: if `fail_under` is not a number of decibels.
    """
    check_fail_under(fail_under)
    originals = None
    if source is not None:
        present = [info for info in source.infos if info.merged_into is None]
        originals = {info.name: Entry(info.shape, info.dtype) for info in present}
    checkpoint = CompressedTensors(path, serializer, originals)

    def pairs(row: LedgerRow) -> Iterator[tuple[Value, Tensor | None]]:
        for chunk in chunks(row, chunk_elements):
            found = None if source is None else source.read_chunk(row.name, chunk)
            yield checkpoint.chunk(chunk), None if found is None else checkpoint.in_order(row, found)

    rows = followed("validate", checkpoint.ledger.stored, progress)
    tensors = [_examined(row, pairs, checkpoint, fail_under) for row in rows]
    tensors += [
        TensorReport(name, fate, "", failures=(problem,)) for name, (fate, problem) in checkpoint.problems.items()
    ]
    storages = {} if source is None else {info.storage: info.nbytes for info in source.infos}
    failures = [*_unexplained(checkpoint), *([] if source is None else _missing(checkpoint, source))]
    compared = () if source is None else ("SQNR", "constant rows", "kept tensors")
    return Report(
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        checks=("structure", "scales", *compared),
        bytes_before=checkpoint.ledger.bytes_before if source is None else sum(storages.values()),
        bytes_after=checkpoint.tensors.nbytes,
        unchecked=tuple(_unchecked(checkpoint, source)),
        general=tuple(failures),
        about=checkpoint.about,
    )


def _examined(row: LedgerRow, pairs: Pairs, checkpoint: CompressedTensors, fail_under: float) -> TensorReport:
    """Compare one tensor with its source; a tensor that cannot be read is a failure."""
    try:
        if row.spec is None:
            return _kept(row, pairs)
        found = examine_tensor(row, pairs, None, bounded=False).judged(fail_under)
    except FormatError as error:
        return TensorReport(row.name, row.fate, row.scheme, failures=(str(error),))
    return attrs.evolve(found, scheme=checkpoint.weights[row.name].weight.scheme)


def _kept(row: LedgerRow, pairs: Pairs) -> TensorReport:
    failures, notes = set[str](), set[str]()
    for value, source in pairs(row):
        if source is None or not isinstance(value, Tensor):
            continue
        cast, narrow = source.to(value.dtype), dtype_name(value.dtype)
        if not same_bits(cast, value):
            failures.add("not quantized, but not equal to the source")
        if source.dtype != value.dtype:
            notes.add(f"{dtype_name(source.dtype)} in the source, compared after a cast to {narrow}")
            if not torch.equal(torch.isfinite(cast), torch.isfinite(source)):
                failures.add(f"some of its numbers are beyond {narrow}")
    return TensorReport(row.name, row.fate, row.scheme, failures=tuple(sorted(failures)), notes=tuple(notes))


def _unexplained(checkpoint: CompressedTensors) -> Iterator[str]:
    """Failures of tensors that are neither weights nor kept."""
    for name in checkpoint.unknown:
        yield f"{name} is in the result, but it is not part of a weight and not in the source"
    for name in checkpoint.of_activations:
        values = checkpoint.tensors.read_whole(name)
        if values.dtype in FLOAT_DTYPES and not bool((torch.isfinite(values) & (values != 0)).all()):
            yield f"{name} is zero, NaN or Inf"


def _missing(checkpoint: CompressedTensors, source: Source) -> Iterator[str]:
    """Failures for tensors of the source that the result has under none of their tied names."""
    there = {row.name for row in checkpoint.ledger} | checkpoint.problems.keys()
    storages = {info.storage for info in source.infos if info.name in there}
    for info in source.infos:
        merged = info.merged_into is not None
        if info.name not in there and info.storage not in storages and info.persistent and not merged:
            yield f"{info.name} is in the source, not in the result"


def _unchecked(checkpoint: CompressedTensors, source: Source | None) -> Iterator[str]:
    yield "digests: a checkpoint of compressed-tensors has none"
    if source is None:
        yield "errors and kept tensors: no source to compare with"
    if checkpoint.problems:
        yield f"{len(checkpoint.problems)} tensors that cannot be read or compared, each a failure"
    if checkpoint.of_activations:
        yield f"{len(checkpoint.of_activations)} scales and zero points of activations: the source has none"
