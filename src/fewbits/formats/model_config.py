"""Read and write the quantization settings in ``config.json``, and decide which libraries can open a result."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from fewbits.checkpoint.folder import CheckpointFiles, file_beside, read_json
from fewbits.checkpoint.raw import copy_durably, write_durably
from fewbits.checkpoint.shards import OWN_STEM, STEM
from fewbits.errors import CheckpointError, FormatError
from fewbits.formats.compressed_export import quantization_config
from fewbits.formats.compressed_rules import transformers_obstacles
from fewbits.formats.settings import CONFIG_FILE, QUANTIZATION_KEYS
from fewbits.selection.ledger import Ledger

#: The ``quant_method`` of results that only fewbits reads.
OWN_METHOD = "fewbits"

#: The key of quantization settings that names the first file of such a result.
FIRST_FILE = "first_file"

#: The key of compressed-tensors settings that marks a result of fewbits.
WRITTEN_BY = "written_by"

_OPEN_WITH = "fewbits.load(directory, into=model), or from_pretrained after: import fewbits.integrations.transformers"

#: Files, besides ``config.json``, that contain quantization settings only.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def read_block_sizes(path: Path) -> tuple[tuple[int, int], ...]:
    """Return the block shapes (rows, columns) that a configuration states for FP8 scales; empty if it states none.

    Raises:
        FormatError: if the file is not JSON, or a block shape is not two positive integers.
        CheckpointError: if the file cannot be read.
    """
    sizes = [
        value["weight_block_size"]
        for _, key, value in _walk(read_json(path))
        if key in QUANTIZATION_KEYS and isinstance(value, Mapping) and value.get("weight_block_size") is not None
    ]
    for size in sizes:
        if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
            raise FormatError(
                f"{path}: weight_block_size is {size!r}; it must be two positive integers, rows and columns"
            )
    return tuple(dict.fromkeys((rows, columns) for rows, columns in sizes))


@attrs.frozen
class Readers:
    """Which libraries can open a result whose source is a transformers model directory.

    Transformers fills quantized weights that it cannot read with random numbers, and reports this only in its log. A
    result that transformers cannot read therefore gets file names that transformers does not look for.

    Attributes:
        obstacle: why transformers cannot open the result; None if it can.
        settings: the ``quantization_config`` for ``config.json``; empty if no weight is stored as codes.
    """

    obstacle: str | None
    settings: Mapping[str, Any]

    @classmethod
    def beside(cls, config: Path | None, ledger: Ledger) -> Readers | None:
        """Return which libraries can open a result beside a configuration; None if it is not one of transformers."""
        vocabularies = None if config is None else read_vocabularies(config)
        return None if vocabularies is None else cls.of(ledger, vocabularies)

    @classmethod
    def of(cls, ledger: Ledger, vocabularies: Collection[int]) -> Readers:
        """Return which libraries can open a result.

        Args:
            ledger: the ledger of the result.
            vocabularies: vocabulary sizes of the model.
        """
        obstacles = transformers_obstacles(ledger, vocabularies)
        if obstacles:
            obstacle = " ".join(next(iter(obstacles.items())))
            return cls(obstacle, {"quant_method": OWN_METHOD, "open_with": _OPEN_WITH})
        settings = quantization_config(ledger, vocabularies)
        return cls(None, settings | {WRITTEN_BY: OWN_METHOD} if settings else {})

    def naming(self, first_file: str) -> Readers:
        """Return these readers with settings that name the first file of a result that only fewbits reads."""
        if self.obstacle is None:
            return self
        return attrs.evolve(self, settings={**self.settings, FIRST_FILE: first_file})

    @property
    def stem(self) -> str:
        """Prefix of the result's file names."""
        return STEM if self.obstacle is None else OWN_STEM

    def __str__(self) -> str:
        if self.obstacle is not None:
            others = "or from_pretrained after import fewbits.integrations.transformers"
            return f"opens with fewbits.load(..., into=model) only, {others}: {self.obstacle}"
        return "opens in transformers" + (", with compressed-tensors installed" if self.settings else "")


def config_beside(path: str | os.PathLike[str]) -> Path | None:
    """Return the configuration in the directory of a checkpoint; None if there is none, or the path is a single file.

    Args:
        path: the directory, the index in it, or a file.

    Raises:
        FormatError: if the configuration is a link to somewhere else.
    """
    home = folder_of(path)
    return None if home is None else file_beside(CheckpointFiles((), home), CONFIG_FILE)


def folder_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of a checkpoint, given it or the index in it; None for a single file."""
    found = Path(path)
    home = found.parent if ".index." in found.name else found
    return home if home.is_dir() else None


def read_vocabularies(path: Path) -> frozenset[int] | None:
    """Return the vocabulary sizes in a transformers model's configuration; None if it is not such a model."""
    try:
        config = read_json(path)
    except CheckpointError:
        return None
    return vocabularies_of(config)


def vocabularies_of(config: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the vocabulary sizes in a configuration; None if it is not that of a transformers model."""
    found = (value for _, key, value in _walk(config) if key == "vocab_size" and type(value) is int)
    return frozenset(found) if "model_type" in config else None


def copy_config(source: Path, target: Path, entries: Mapping[str, Any]) -> list[str]:
    """Copy a configuration and replace its quantization settings.

    Args:
        source: the file to read.
        target: the file to write.
        entries: new entries, such as ``quantization_config``. The present settings are removed in any case.

    Returns:
        the paths of the removed settings, in the configuration.

    Raises:
        FormatError: if the file is not JSON.
        CheckpointError: if the file cannot be read, or the new one cannot be written.
    """
    config = read_json(source)
    removed = [path for path, key, _ in _walk(config) if key in QUANTIZATION_KEYS]
    changed = _without_settings(config) | dict(entries)
    if changed == config:
        copy_durably(source, target)
    else:
        write_durably(target, (json.dumps(changed, indent=2) + "\n").encode())
    return removed


def _walk(value: object, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of every entry in a configuration, except for those within quantization settings.

    The configurations of nested models have settings of their own.
    """
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield path + key, key, inner
        if key not in QUANTIZATION_KEYS:
            yield from _walk(inner, f"{path}{key}.")


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_settings(inner) if isinstance(inner, dict) else inner
        for key, inner in config.items()
        if key not in QUANTIZATION_KEYS
    }
