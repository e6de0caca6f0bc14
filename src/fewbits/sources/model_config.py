"""The ``config.json`` beside a checkpoint: how it says that weights are quantized, and the same without that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbits._events import emit
from fewbits.checkpoint.header import MAX_HEADER, parse_object
from fewbits.checkpoint.raw import as_checkpoint_error, write_durably
from fewbits.errors import FormatError

CONFIG_FILE = "config.json"

#: Other files that say how weights are quantized, and nothing else.
QUANTIZATION_FILES = ("hf_quant_config.json",)

#: The keys of the configuration that say it; the second is an old name.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def read_block_sizes(path: Path) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the blocks that have a scale, as a configuration states them; empty if it does not.

    Raises:
        FormatError: if it is not JSON, or what it states is no such thing.
        CheckpointError: if it cannot be read.
    """
    stated = [_block_size(value["weight_block_size"], path) for _, value in _settings(_parsed(_read(path), path))
              if isinstance(value, Mapping) and value.get("weight_block_size") is not None]  # fmt: skip
    return tuple(dict.fromkeys(stated))


def copy_config(source: Path, target: Path) -> None:
    """Write a configuration once more, without what says that weights are quantized: they are not any more.

    Raises:
        FormatError: if it is not JSON.
        CheckpointError: if it cannot be read, or the new one cannot be written.
    """
    data = _read(source)
    config = _parsed(data, source)
    removed = [key for key, _ in _settings(config)]
    write_durably(target, (json.dumps(_without_settings(config), indent=2) + "\n").encode() if removed else data)
    if removed:
        emit("warning", "config_changed", file=str(source), removed=removed, reason="its FP8 weights are dequantized")


def _read(path: Path) -> bytes:
    with as_checkpoint_error(f"{path} cannot be read"):
        if path.stat().st_size > MAX_HEADER:
            raise FormatError(f"{path} has more than {MAX_HEADER:,} bytes; it is no configuration")
        return path.read_bytes()


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    return parse_object(data.strip(), path, "text")


def _settings(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every part of a configuration that says how weights are quantized, with its path; models in models have some."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key in QUANTIZATION_KEYS:
            yield path + key, inner
        else:
            yield from _settings(inner, f"{path}{key}.")


def _without_settings(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _without_settings(inner) for key, inner in value.items() if key not in QUANTIZATION_KEYS}


def _block_size(value: object, path: Path) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise FormatError(f"{path}: weight_block_size is {value!r}; it must be two numbers from 1 up, rows and columns")
    return value[0], value[1]
