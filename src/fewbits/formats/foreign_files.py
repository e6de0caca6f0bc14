"""Open the safetensors files of another tool's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fewbits.checkpoint.folder import CheckpointFiles, ShardedReader, file_beside, find_files, read_json
from fewbits.checkpoint.metadata import VERSION_KEY, is_own_key
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.errors import FormatError
from fewbits.formats.settings import CONFIG_FILE

_SERIALIZER = SafetensorsSerializer()

#: Dtypes of models, by their names in ``config.json``.
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def read_dtype(files: CheckpointFiles) -> torch.dtype | None:
    """Return the dtype of the model that ``config.json`` states; None if it states none.

    Raises:
        FormatError: if the file is not a JSON object.
        CheckpointError: if the file cannot be read.
    """
    path = file_beside(files, CONFIG_FILE)
    fields = {} if path is None else read_json(path)
    stated = fields.get("dtype") or fields.get("torch_dtype")
    return _DTYPES.get(stated) if isinstance(stated, str) else None


def foreign_files(path: str | os.PathLike[str]) -> CheckpointFiles:
    """Find the safetensors files of a checkpoint.

    Raises:
        FormatError: if there are none, or an index is invalid.
        CheckpointError: if the files cannot be opened.
    """
    return find_files(Path(path), (_SERIALIZER.suffix,))


def open_tensors(files: CheckpointFiles) -> ShardedReader:
    """Read the headers of safetensors files.

    Raises:
        FormatError: if a file is malformed, or contradicts the index.
        CheckpointError: if the files cannot be opened.
    """
    tensors = ShardedReader(files, {path.name: _SERIALIZER.reader(path) for path in files.paths})
    tensors.check_index()
    return tensors


def foreign_tensors(path: str | os.PathLike[str]) -> tuple[CheckpointFiles, ShardedReader] | None:
    """Open a checkpoint to recognize its format; None if it is not in safetensors files, or fewbits wrote it.

    Raises:
        FormatError: if an index contradicts the files.
        CheckpointError: if the files cannot be opened.
    """
    try:
        files = foreign_files(path)
        first = _SERIALIZER.reader(files.paths[0])
    except FormatError:
        return None
    # A damaged fewbits file must not be read as another tool's.
    if VERSION_KEY in files.metadata or any(map(is_own_key, first.metadata)):
        return None
    return files, open_tensors(files)
