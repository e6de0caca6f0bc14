"""`FewbitsFormat`: writes the checkpoint of another tool as one of fewbits, with the codes that it has."""

from __future__ import annotations

from pathlib import Path

from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.output import MAX_SHARD_SIZE
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import save
from fewbits.formats.base import Exporter, Readable
from fewbits.selection.progress import Progress, followed


class FewbitsFormat(Exporter):
    """The format of fewbits: a directory of safetensors files, each with digests and a ledger."""

    name = "fewbits"

    def obstacles(self, source: Readable) -> dict[str, str]:
        """Return nothing: the format holds every tensor that fewbits reads."""
        return {}

    def write(self, source: Readable, target: Path, progress: Progress) -> None:
        """Write all tensors; codes stay as they are."""
        steps = followed("convert", source.ledger.stored, progress)

        def value_of(name: str) -> Value:
            next(steps)
            return source.value(name)

        about = Metadata(source.ledger)
        save(SafetensorsSerializer(), target, about, value_of, measured={}, max_shard_size=MAX_SHARD_SIZE)

    def open(self, target: Path) -> Readable:
        """Open a result, and check its digests."""
        checkpoint = Checkpoint(target)
        checkpoint.check("digests")
        return checkpoint
