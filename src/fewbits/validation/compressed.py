"""Verify a checkpoint that another tool wrote in a format of compressed-tensors against its source.

A weight that cannot be read is one failure in the report; the others are still compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import chunks
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.serializer import Entry
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.numerics.dtypes import FLOAT_DTYPES
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source
from fewbits.validation.checks import Pairs, check_fail_under
from fewbits.validation.foreign import examined, missing
from fewbits.validation.report import Report
from fewbits.validation.tensors import TensorReport


def verify_compressed_tensors(
    path: str | os.PathLike[str],
    source: Source | None,
    chunk_elements: int | None,
    fail_under: float,
    progress: Progress,
) -> Report:
    """Read every tensor of a compressed-tensors checkpoint, and compare it with its source.

    Args:
        path: the file, the directory, or the index in it.
        source: the source that the checkpoint was made from; None checks structure and scales only.
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
    checkpoint = CompressedTensors(path, originals)

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
    there = {row.name for row in checkpoint.ledger} | checkpoint.problems.keys()
    failures = [*_unexplained(checkpoint), *([] if source is None else missing(source, there))]
    compared = () if source is None else ("SQNR", "constant rows", "kept tensors")
    return Report(
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        checks=("structure", "scales", *compared),
        bytes_before=checkpoint.ledger.bytes_before if source is None else sum(storages.values()),
        bytes_after=checkpoint.tensors.nbytes,
        unchecked=tuple(_unchecked(checkpoint, source)),
        general=tuple(failures),
        about=checkpoint.about,
        ledger=checkpoint.ledger,
    )


def _examined(row: LedgerRow, pairs: Pairs, checkpoint: CompressedTensors, fail_under: float) -> TensorReport:
    found = examined(row, pairs, fail_under)
    weight = checkpoint.weights.get(row.name)
    return found if weight is None else attrs.evolve(found, scheme=weight.weight.scheme)


def _unexplained(checkpoint: CompressedTensors) -> Iterator[str]:
    """Failures of tensors that are neither weights nor kept."""
    for name in checkpoint.unknown:
        yield f"{name} is in the result, but it is not part of a weight and not in the source"
    for name in checkpoint.of_activations:
        values = checkpoint.tensors.read_whole(name)
        if values.dtype in FLOAT_DTYPES and not bool((torch.isfinite(values) & (values != 0)).all()):
            yield f"{name} is zero, NaN or Inf"


def _unchecked(checkpoint: CompressedTensors, source: Source | None) -> Iterator[str]:
    yield "digests: a checkpoint of compressed-tensors has none"
    if source is None:
        yield "errors and kept tensors: no source to compare with"
    if checkpoint.problems:
        yield f"{len(checkpoint.problems)} tensors that cannot be read or compared, each a failure"
    if checkpoint.of_activations:
        yield f"{len(checkpoint.of_activations)} scales and zero points of activations: the source has none"
