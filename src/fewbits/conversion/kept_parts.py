"""`KeptParts`: the finished parts of a calibration, on disk, so that an interrupted run can continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import save
from fewbits.errors import CheckpointError
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


@attrs.frozen(eq=False)
class KeptPart:
    """A finished part of a calibration.

    Attributes:
        values: the quantized tensors, by name.
        remarks: what the ledger has to say of them, by name.
        outputs: the SQNR of layers' outputs, in dB, by name, as far as it is known.
    """

    values: dict[str, Value]
    remarks: dict[str, str]
    outputs: dict[str, float]


class KeptParts:
    """Files of quantized tensors, one for each part of a model.

    Args:
        folder: where the files are. Everything else that their contents depend on is the same for all files in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(
        self, part: int, rows: Sequence[LedgerRow], values: Mapping[str, Value], outputs: Mapping[str, float]
    ) -> None:
        """Write a finished part.

        Args:
            part: the number of the part.
            rows: the rows of its tensors.
            values: the quantized tensors, by name.
            outputs: the SQNR of layers' outputs, in dB, by name, as far as it is known.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        about = Metadata(
            Ledger(rows), output_sqnr_db={row.name: outputs[row.name] for row in rows if row.name in outputs}
        )
        save(SafetensorsSerializer(), self._path(part), about, values.__getitem__, measured={})

    def read(self, part: int, rows: Sequence[LedgerRow]) -> KeptPart | None:
        """Read a part.

        Args:
            part: the number of the part.
            rows: the rows of its tensors, without the remarks that were added to their reasons.

        Returns:
            the part; None if it is not finished, or its file is damaged.
        """
        if not self._path(part).exists():
            return None
        try:
            found = Checkpoint(self._path(part))
            if found.damaged() or not _are_alike(found.ledger, rows):
                return None
            values = {row.name: found.chunk(Chunk.whole(row)) for row in rows}
        except CheckpointError:
            return None
        remarks = {row.name: found.ledger[row.name].reason[len(row.reason) :].removeprefix("; ") for row in rows}
        return KeptPart(values, remarks, dict(found.metadata.output_sqnr_db))

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:06}.safetensors"


def _are_alike(found: Ledger, rows: Sequence[LedgerRow]) -> bool:
    """Tell whether a ledger has these rows, apart from remarks that were added to their reasons."""
    return len(found) == len(rows) and all(one.continues(row) for one, row in zip(found, rows, strict=True))
