"""Read quantization settings that a tool has put beside a checkpoint, and check their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from fewbits.checkpoint.folder import CheckpointFiles, file_beside, read_json
from fewbits.errors import FormatError

CONFIG_FILE = "config.json"

#: Keys of the quantization settings in a configuration; the second is an old name.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


class Fields:
    """A JSON object that checks the type of each value it returns.

    Args:
        value: the object.
        where: a description of the place of the object, for messages.

    Raises:
        FormatError: if the value is not an object.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} must be an object, not {value!r:.100}")
        self.values: dict[str, Any] = value
        self.where = where

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a value, or the default if the value is missing or null.

        Raises:
            FormatError: if the value has another type.
        """
        value = self.values.get(name)
        if value is not None and type(value) is not kind:
            self.refuse(name, f"must be of type {kind.__name__}, not {value!r:.100}")
        return default if value is None else value

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raise an error about the value of a name."""
        raise FormatError(f"{self.where}.{name} {problem}")


def read_settings(files: CheckpointFiles, others: Sequence[str] = ()) -> Fields | None:
    """Read the quantization settings beside the files of a checkpoint; None if there are none.

    Args:
        files: the files of tensors.
        others: names of files, besides ``config.json``, that hold nothing but quantization settings.

    Raises:
        FormatError: if a file is not a JSON object, or the settings are not an object.
        CheckpointError: if a file cannot be read.
    """
    if (path := file_beside(files, CONFIG_FILE)) is not None:
        fields = read_json(path)
        if (found := next((fields[key] for key in QUANTIZATION_KEYS if fields.get(key)), None)) is not None:
            return Fields(found, f"{path}: quantization_config")
    for name in others:
        if (path := file_beside(files, name)) is not None:
            return Fields(read_json(path), f"{path}: settings")
    return None
