"""Verify a checkpoint of another tool, tensor by tensor, against its source.

There is no error bound for such a checkpoint: the tool may have clipped or scaled weights, compensated errors, or
rounded in a narrower dtype. An error beyond half a step is therefore a note; only errors that no rounding explains are
failures.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.errors import FormatError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.spec import CastSpec
from fewbits.numerics.tensor import same_bits
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source
from fewbits.validation.checks import Pairs, check_fail_under, examine_tensor
from fewbits.validation.report import Report
from fewbits.validation.tensors import TensorReport


def verify_foreign(
    checkpoint: ForeignCheckpoint, source: Source | None, fail_under: float, progress: Progress
) -> Report:
    """Read every tensor of a checkpoint, and compare it with its source.

    Args:
        checkpoint: the checkpoint.
        source: the source that the checkpoint was made from; None checks structure and scales only.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        ArgumentError: if `fail_under` is not a number of decibels.
    """
    check_fail_under(fail_under)
    infos = {} if source is None else {info.name: info for info in source.infos}
    differences = [
        f"{row.name} has shape {row.shape} in the result, {infos[row.name].shape} in the source"
        for row in checkpoint.ledger.stored
        if row.name in infos and infos[row.name].shape != row.shape
    ]
    differences += [] if source is None else missing(source, {row.name for row in checkpoint.ledger})

    def pairs(row: LedgerRow) -> Iterator[tuple[Value, Tensor | None]]:
        compared = row.name in infos and infos[row.name].shape == row.shape
        found = source.read_chunk(row.name, Chunk.whole(row)) if source is not None and compared else None
        yield checkpoint.value(row.name), found

    rows = [_measurable(row, checkpoint) for row in checkpoint.ledger.stored]
    tensors = [examined(row, pairs, fail_under) for row in followed("validate", rows, progress)]
    compared = () if source is None else ("SQNR", "constant rows", "kept tensors")
    unchecked = [f"digests: a checkpoint of {checkpoint.format} has none"]
    return Report(
        tensors=tuple(tensors),
        checks=("structure", "scales", *compared),
        bytes_before=checkpoint.ledger.bytes_before,
        bytes_after=checkpoint.ledger.bytes_after,
        unchecked=(*unchecked, *(["errors and kept tensors: no source to compare with"] if source is None else [])),
        general=tuple(differences),
        about=checkpoint.about,
        ledger=checkpoint.ledger,
    )


def examined(row: LedgerRow, pairs: Pairs, fail_under: float) -> TensorReport:
    """Compare one tensor with its source; a tensor that cannot be read is a failure."""
    try:
        if row.spec is None:
            return _kept(row, pairs)
        return examine_tensor(row, pairs, None, bounded=False).judged(fail_under)
    except FormatError as error:
        return TensorReport(row.name, row.fate, row.scheme, failures=(str(error),))


def missing(source: Source, names: set[str]) -> list[str]:
    """Return failures for tensors of the source that the result has under none of their tied names."""
    storages = {info.storage for info in source.infos if info.name in names}
    absent = (info for info in source.infos if info.name not in names and info.storage not in storages)
    return [
        f"{info.name} is in the source, not in the result"
        for info in absent
        if info.persistent and info.merged_into is None
    ]


def _measurable(row: LedgerRow, checkpoint: ForeignCheckpoint) -> LedgerRow:
    """Describe a weight that is dequantized on reading as a cast: it is measured, and need not equal the source."""
    if row.spec is not None or row.name not in checkpoint.of_linear:
        return row
    return attrs.evolve(row, fate="cast", spec=CastSpec(row.dtype))


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
