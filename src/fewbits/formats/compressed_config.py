"""Read and check quantization settings: those of any tool, and the ``quantization_config`` of compressed-tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import attrs

from fewbits.checkpoint.folder import CheckpointFiles, file_beside, read_json
from fewbits.errors import FormatError

CONFIG_FILE = "config.json"

#: Keys of the quantization settings in a configuration; the second is an old name.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")

QUANT_METHOD = "compressed-tensors"

#: Formats of compressed-tensors that fewbits reads.
READABLE_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense")


@attrs.frozen
class WeightScheme:
    """How the weights of one group in the config are quantized.

    Attributes:
        bits: bits per code.
        kind: ``"int"`` or ``"float"``.
        strategy: which elements share a scale: ``"tensor"``, ``"channel"``, ``"group"``, ``"block"``, or another word,
            which fewbits does not read.
        group_size: columns per scale, for ``"group"``.
        block: rows and columns per scale, for ``"block"``.
        symmetric: whether there are no zero points.
    """

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool

    def __str__(self) -> str:
        of = f" {self.group_size}" if self.strategy == "group" else f" {self.block}" if self.block else ""
        return f"{self.kind}{self.bits} {self.strategy}{of}" + ("" if self.symmetric else " asymmetric")


@attrs.frozen
class CompressionConfig:
    """The ``quantization_config`` of a checkpoint. The defaults stand for a checkpoint without one.

    Attributes:
        schemes: the distinct schemes of its groups.
        formats: the formats named by the config and by its groups.
        ignore: full names of modules that are not quantized. Regular expressions in this list match nothing.
        compressed: whether ``quantization_status`` is ``"compressed"``; otherwise other loaders may ignore the codes.
        transforms: whether weights were multiplied by other matrices before quantization.
    """

    schemes: tuple[WeightScheme, ...] = ()
    formats: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()
    compressed: bool = True
    transforms: bool = False


def read_config(files: CheckpointFiles) -> CompressionConfig | None:
    """Read the config beside the files of a checkpoint; None if there is no config or it has no quantization settings.

    Raises:
        FormatError: if the config is not JSON, names another tool, or has a value of the wrong type.
        CheckpointError: if the config cannot be read.
    """
    found = read_settings(files)
    return None if found is None else _Fields(found.values, found.where).config()


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


class _Fields(Fields):
    """The settings, or an object within them."""

    def config(self) -> CompressionConfig:
        method = self.get("quant_method", str, QUANT_METHOD)
        if method != QUANT_METHOD:
            self.refuse("quant_method", f"is {method!r}; fewbits can only read {QUANT_METHOD}")
        groups = self.get("config_groups", dict, {})
        # A group can be a list of targets under the name of a preset. Its scheme is then inferred from the tensors.
        described = [_Fields(group, f"{self.where}.config_groups.{name}") for name, group in groups.items()
                     if not isinstance(group, list)]  # fmt: skip
        schemes = [
            _Fields(weights, f"{group.where}.weights").scheme()
            for group in described
            if (weights := group.get("weights", dict)) is not None
        ]
        return CompressionConfig(
            schemes=tuple(dict.fromkeys(schemes)),
            formats=frozenset(filter(None, (fields.get("format", str) for fields in (self, *described)))),
            ignore=frozenset(name for name in self.get("ignore", list, []) if isinstance(name, str)),
            compressed=self.get("quantization_status", str) == "compressed",
            transforms=bool(self.get("transform_config", dict)),
        )

    def scheme(self) -> WeightScheme:
        group_size = self.get("group_size", int)
        usual = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        scheme = WeightScheme(
            bits=self.get("num_bits", int, 8),
            kind=self.get("type", str, "int").lower(),
            strategy=self.get("strategy", str, usual).lower(),
            group_size=group_size,
            block=self._block(),
            symmetric=self.get("symmetric", bool, True),
        )
        if scheme.strategy == "group" and (group_size is None or group_size < 1):
            self.refuse("group_size", f"must be positive where the strategy is 'group', not {group_size}")
        if scheme.strategy == "block" and scheme.block is None:
            self.refuse("block_structure", "must be given where the strategy is 'block'")
        return scheme

    def _block(self) -> tuple[int, int] | None:
        value = sides = self.values.get("block_structure")
        if value is None:
            return None
        if isinstance(value, str):
            sides = [int(side) for side in value.split("x") if side.isdecimal() and len(side) < 10]
        if not isinstance(sides, list) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
            self.refuse("block_structure", f"must be two positive integers, not {value!r:.100}")
        return sides[0], sides[1]
