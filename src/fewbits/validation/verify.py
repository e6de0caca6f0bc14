"""Verify a file: its digests, its structure, and every element against the source."""

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
from fewbits.formats.compressed_tensors import is_compressed_tensors
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.tensor import same_bits
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.base import Source
from fewbits.validation.checks import examine
from fewbits.validation.compressed import verify_compressed_tensors
from fewbits.validation.report import CRITICAL_DB, Report


def verify(
    path: str | os.PathLike[str],
    source: Source | None = None,
    *,
    serializer: Serializer | None = None,
    measured: Mapping[str, Measurement] | None = None,
    chunk_elements: int | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Re-read a fewbits file, or one of compressed-tensors, and check it.

    Codes are decoded by the layout that the file states, not through any module.

    Args:
        path: the file, or the directory of several.
        source: the checkpoint or model before quantization; None checks structure and digests only.
        serializer: reads the file; None means safetensors.
        measured: measurements taken when these bytes were written, by name; they are reused.
        chunk_elements: how many elements are compared at a time, about; see `fewbits.checkpoint.chunks.chunks`.
        fail_under: SQNR in dB below which a tensor fails.
        progress: told about every tensor, before and after it.

    Raises:
        FormatError: if it is neither fewbits' nor compressed-tensors', or its parts contradict one another.
        DigestError: if its header is damaged.
    """
    if is_compressed_tensors(path, serializer):
        return verify_compressed_tensors(
            path,
            source,
            serializer=serializer,
            chunk_elements=chunk_elements,
            fail_under=fail_under,
            progress=progress,
        )
    return verify_checkpoint(
        Checkpoint(path, serializer),
        source,
        measured=measured,
        chunk_elements=chunk_elements,
        fail_under=fail_under,
        progress=progress,
    )


def verify_checkpoint(
    checkpoint: Checkpoint,
    source: Source | None = None,
    *,
    measured: Mapping[str, Measurement] | None = None,
    chunk_elements: int | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Check a fewbits checkpoint that is open already; arguments as `verify`."""
    wrong = set(checkpoint.damaged())
    damaged = {}
    for row in checkpoint.ledger.stored:
        bad = sorted(wrong & CODEC.entries(row).keys())
        if bad:
            damaged[row.name] = f"the bytes of {', '.join(bad)} are not the bytes that were written"
    differences: list[str] = []
    names: dict[str, str] = {}
    if source is not None:
        differences, names = _match(checkpoint.ledger, source)

    def pairs(row: LedgerRow, with_source: bool) -> Iterator[tuple[Value, Tensor | None]]:
        # A buffer that no state dict holds has no name in the source.
        compared = with_source and source is not None and not differences and row.name in names
        for chunk in chunks(row, chunk_elements):
            yield checkpoint.chunk(chunk), source.read_chunk(names[row.name], chunk) if compared else None  # type: ignore[union-attr]

    report = examine(
        checkpoint.ledger,
        pairs,
        checkpoint.nbytes,
        known={**(measured or {}), **damaged},
        uncompared="the source is not what the file was made from" if differences else "no source to compare with",
        fail_under=fail_under,
        progress=progress,
    )
    return attrs.evolve(report, checks=("digests", *report.checks), general=(*report.general, *differences))


def _match(ledger: Ledger, source: Source) -> tuple[list[str], dict[str, str]]:
    """Compare names, shapes and dtypes of the source with those in the file's ledger.

    Returns:
        the differences, in words; and, for each stored row, the name to read it by in the source. Of tied names the
        source may have any: checkpoints commonly hold one of them.
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
                    f"in the source it is {_describe(*found[row.name])}"
                )
    known = {row.name for row in ledger}
    problems += [
        f"{info.name} is in the source, not in the file's ledger" for info in source.infos if info.name not in known
    ]
    problems += [
        f"{row.name} is {row.alias_of} in the file, and has other values in the source"
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
