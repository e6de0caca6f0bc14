"""Verifying a file: its digests, its structure, and, against the source, every element of it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from fewbits.checkpoint.metadata import row_entries
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.serializer import Serializer
from fewbits.numerics.metrics import Measurement
from fewbits.selection.ledger import Ledger, Progress, no_progress
from fewbits.sources.base import Source
from fewbits.validation.checks import examine
from fewbits.validation.report import CRITICAL_DB, Report


def verify(
    path: str | os.PathLike[str],
    source: Source | None = None,
    *,
    serializer: Serializer | None = None,
    measured: Mapping[str, Measurement] | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Re-read a fewbits file and check it.

    Codes are decoded by the layout that the file states, not through any module.

    Args:
        path: the file.
        source: what it was made from; None checks structure and digests only.
        serializer: reads the file; None stands for safetensors.
        measured: measurements taken when these same bytes were written, by name; these are not taken again.
        fail_under: SQNR in dB below which a tensor fails.
        progress: told about every tensor.

    Raises:
        FormatError: if it is not a fewbits file, or its parts contradict one another.
        DigestError: if its header is damaged.
    """
    checkpoint = Checkpoint(path, serializer)
    wrong = set(checkpoint.damaged())
    damaged = {}
    for row in checkpoint.stored_rows():
        bad = sorted(wrong & row_entries(row).keys())
        if bad:
            damaged[row.name] = f"the bytes of {', '.join(bad)} are not the bytes that were written"
    differences = [] if source is None else _differences(checkpoint.ledger, source)
    comparable = source is not None and not differences
    report = examine(
        checkpoint.ledger,
        checkpoint.value,
        source.read if source is not None and comparable else None,
        measured=measured,
        damaged=damaged,
        fail_under=fail_under,
        progress=progress,
    )
    return attrs.evolve(report, checks=("digests", *report.checks), failures=(*report.failures, *differences))


def _differences(ledger: Ledger, source: Source) -> list[str]:
    """Where the source is not the one that the file was made from, by names, shapes and dtypes."""
    described = {row.name: (row.shape, row.dtype) for row in ledger if row.persistent}
    found = {info.name: (info.shape, info.dtype) for info in source.infos if info.persistent}
    problems = []
    for name in sorted(described.keys() | found.keys()):
        if name not in found:
            problems.append(f"{name} is in the file's ledger, not in the source")
        elif name not in described:
            problems.append(f"{name} is in the source, not in the file's ledger")
        elif described[name] != found[name]:
            problems.append(f"{name} was {described[name]} when the file was made, in the source it is {found[name]}")
    return problems
