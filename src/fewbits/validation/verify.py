"""Verify a file: its digests, its structure and, given the source, every element."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import chunks
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.serializer import Serializer
from fewbits.formats.compressed_checkpoint import CompressedCheckpoint
from fewbits.formats.registry import recognized
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.tensor import same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source
from fewbits.validation.checks import Known, examine
from fewbits.validation.compressed import verify_compressed_tensors
from fewbits.validation.foreign import verify_foreign
from fewbits.validation.report import Report
from fewbits.validation.tensors import CRITICAL_DB


def verify(
    path: str | os.PathLike[str] | Checkpoint,
    source: Source | None = None,
    *,
    serializer: Serializer | None = None,
    measured: Mapping[str, Measurement] | None = None,
    chunk_elements: int | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Re-read a checkpoint of fewbits or of another tool and check it.

    Codes are decoded directly, by the layout that the file states, and not by a quantized module.

    Args:
        path: the file, or the directory of several files; or a fewbits checkpoint that is already open.
        source: the source that the file was made from; None checks structure and digests only.
        serializer: reads a file of fewbits. None means safetensors, and allows checkpoints of other tools.
        measured: measurements taken when these same bytes were written, by name; those tensors are not measured again.
        chunk_elements: approximate number of elements to compare at a time; see `fewbits.checkpoint.chunks.chunks`.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        FormatError: if the checkpoint has no known format, or its parts contradict each other.
        DigestError: if its header is damaged.
    """
    if not isinstance(path, Checkpoint):
        found = recognized(path, serializer)
        if found is CompressedCheckpoint:
            return verify_compressed_tensors(path, source, chunk_elements, fail_under, progress)
        if not isinstance(found, Checkpoint):
            return verify_foreign(found(path), source, fail_under, progress)
        path = found
    checkpoint: Checkpoint = path
    no_match: tuple[list[str], dict[str, str]] = [], {}
    differences, names = no_match if source is None else _match(checkpoint.ledger, source)

    def pairs(row: LedgerRow) -> Iterator[tuple[Value, Tensor | None]]:
        # A non-persistent buffer may have no name in the source.
        compared = source is not None and not differences and row.name in names
        for chunk in chunks(row, chunk_elements):
            yield checkpoint.chunk(chunk), source.read_chunk(names[row.name], chunk) if compared else None  # type: ignore[union-attr]

    report = examine(
        checkpoint.ledger,
        pairs,
        checkpoint.nbytes,
        known=Known(measured or {}, _damaged(checkpoint), checkpoint.metadata.output_sqnr_db),
        uncompared="the source is not what the file was made from" if differences else "no source to compare with",
        fail_under=fail_under,
        progress=progress,
    )
    return attrs.evolve(report, checks=("digests", *report.checks), general=(*report.general, *differences))


def _damaged(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a sentence for each stored row whose bytes have changed, by its name."""
    wrong = set(checkpoint.damaged())
    damaged = {row.name: ", ".join(sorted(wrong & CODEC.entries(row).keys())) for row in checkpoint.ledger.stored}
    return {name: f"the bytes of {bad} are not the bytes that were written" for name, bad in damaged.items() if bad}


def _match(ledger: Ledger, source: Source) -> tuple[list[str], dict[str, str]]:
    """Compare names, shapes and dtypes of the source with the file's ledger.

    Returns:
        a sentence for each difference; and, for each stored row, its name in the source. The source may have any one
        of several tied names, as checkpoints usually store only one.
    """
    found = {info.name: (info.shape, info.dtype) for info in source.infos}
    names: dict[str, str] = {}
    problems = []
    if found and len(ledger) and not any(row.name in found for row in ledger):
        return [_nothing_in_common(ledger, source)], names
    for row in ledger:
        if row.name in found:
            names.setdefault(row.holder, row.name)
            if found[row.name] != (row.shape, row.dtype):
                problems.append(
                    f"{row.name} was {_describe(row.shape, row.dtype)} when the file was made, "
                    f"but in the source it is {_describe(*found[row.name])}"
                )
    known = {row.name for row in ledger}
    problems += [
        f"{info.name} is in the source, not in the file's ledger" for info in source.infos if info.name not in known
    ]
    problems += [
        f"{row.name} is tied to {row.alias_of} in the file, but has other values in the source"
        for row in ledger
        if row.name in found
        and row.alias_of is not None
        and not same_bits(source.read(names[row.alias_of]), source.read(row.name))
    ]
    problems += [
        f"{row.name} is in the file's ledger, not in the source"
        for row in ledger
        if row.fate not in ("alias", "merged") and row.persistent and row.name not in names
    ]
    return problems, names


def _nothing_in_common(ledger: Ledger, source: Source) -> str:
    theirs, ours = next(iter(source.infos)).name, next(iter(ledger)).name
    return (
        f"no name in the source (such as {theirs}) is in the file (such as {ours}); give the source that the file was "
        "made from"
    )


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} of shape {shape}"
