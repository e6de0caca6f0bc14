"""Histograms of the weights and the errors of a few tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk, chunks
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import FormatError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.pages.charts import Histogram
from fewbits.pages.content import Spread, decibels
from fewbits.selection.row import LedgerRow
from fewbits.sources.base import Source
from fewbits.validation.page_tensors import Judged, shortened

#: The number of tensors that get histograms.
_WORST = 6


def spreads_of(
    judged: Sequence[Judged], checkpoint: Checkpoint | ForeignCheckpoint, source: Source | None
) -> list[Spread]:
    """Make histograms for the tensors with the lowest SQNR.

    Tensors that are exact, or that cannot be read or compared, have none.

    Args:
        judged: all tensors.
        checkpoint: the checkpoint that has them.
        source: the source that it was made from; None makes no histograms of errors.
    """
    lossy = [one for one in judged if one.deciding is not None and one.deciding < math.inf]
    worst = sorted(lossy, key=lambda one: one.order[2])[:_WORST]
    found = [_spread(one, one.row, checkpoint, source) for one in worst if one.row is not None]
    return [spread for spread in found if spread is not None]


def _spread(
    one: Judged, row: LedgerRow, checkpoint: Checkpoint | ForeignCheckpoint, source: Source | None
) -> Spread | None:
    try:
        weights = Histogram.of(lambda: (decoded for _, decoded in _decoded(row, checkpoint)))
        name = None if source is None else _name_in(source, row, checkpoint)
        errors = None
        if source is not None and name is not None:
            errors = Histogram.of(lambda: _errors(row, checkpoint, source, name))
    except FormatError:  # a tensor that cannot be read is a failure in the report already
        return None
    figure = "SQNR" if one.output_sqnr_db is None else "output SQNR"
    about = f"{figure} {decibels(one.deciding)} dB, {one.scheme}"
    return None if weights is None else Spread(shortened([one.name])[0], about, weights, errors)


def _decoded(row: LedgerRow, checkpoint: Checkpoint | ForeignCheckpoint) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield the chunks of a tensor with their values in float64; one chunk, where a format has no others."""
    for chunk in chunks(row) if isinstance(checkpoint, Checkpoint) else [Chunk.whole(row)]:
        value = checkpoint.chunk(chunk) if isinstance(checkpoint, Checkpoint) else checkpoint.value(row.name)
        yield chunk, value.dequantize(torch.float64) if isinstance(value, QuantizedTensor) else value.double()


def _errors(row: LedgerRow, checkpoint: Checkpoint | ForeignCheckpoint, source: Source, name: str) -> Iterator[Tensor]:
    for chunk, decoded in _decoded(row, checkpoint):
        yield decoded - source.read_chunk(name, chunk).double()


def _name_in(source: Source, row: LedgerRow, checkpoint: Checkpoint | ForeignCheckpoint) -> str | None:
    """Find a tensor in the source, which may have any one of several tied names."""
    names = checkpoint.ledger.names_by_holder()[row.name]
    shapes = {info.name: info.shape for info in source.infos}
    return next((name for name in names if shapes.get(name) == row.shape), None)
