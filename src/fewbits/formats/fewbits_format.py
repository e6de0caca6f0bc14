"""`FewbitsFormat`: writes the checkpoint of another tool as one of fewbits, with the codes that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import save
from fewbits.checkpoint.shards import STEM, plan_shards
from fewbits.formats.base import Described, DirectoryExporter, Readable
from fewbits.formats.model_config import Readers, config_beside
from fewbits.formats.settings import QUANTIZATION_KEYS
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, followed


class FewbitsFormat(DirectoryExporter):
    """The format of fewbits: a directory of safetensors files, each with digests and a ledger."""

    name = "fewbits"

    def obstacles(self, source: Described) -> dict[str, str]:
        """Return nothing: the format holds every tensor that fewbits reads."""
        return {}

    def write(self, source: Readable, target: Path, progress: Progress) -> None:
        """Write all tensors; codes stay unchanged."""
        steps = followed("convert", source.ledger.stored, progress)

        def value_of(name: str) -> Value:
            next(steps)
            return source.value(name)

        about, readers = _metadata(source), _readers(source)
        stem = STEM if readers is None else readers.stem
        serializer = SafetensorsSerializer()
        save(serializer, target, about, value_of, measured={}, max_shard_size=self.max_shard_size, stem=stem)
        next(steps, None)  # report the last tensor as done

    def open(self, target: Path) -> Readable:
        """Open a result, and check its digests."""
        checkpoint = Checkpoint(target)
        checkpoint.check("digests")
        return checkpoint

    def config(self, source: Described) -> Mapping[str, Any]:
        """Return the ``quantization_config`` that `fewbits.quantize` would write."""
        readers = _readers(source)
        if readers is None or not readers.settings:
            return {}
        stored = Ledger(map(CODEC.sized, source.ledger))
        first = plan_shards(stored, self.max_shard_size, SafetensorsSerializer.suffix, readers.stem)[0].file
        return {QUANTIZATION_KEYS[0]: dict(readers.naming(first).settings)}


def _readers(source: Described) -> Readers | None:
    return Readers.beside(config_beside(source.path), source.ledger)


def _metadata(source: Readable) -> Metadata:
    """The metadata of a fewbits checkpoint stays, except for the digests. That of any other is new."""
    if isinstance(source, Checkpoint):
        return attrs.evolve(source.metadata, digests={})
    return Metadata(Ledger(map(CODEC.sized, source.ledger)))
