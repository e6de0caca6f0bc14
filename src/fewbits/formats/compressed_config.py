"""Read and check the ``quantization_config`` of compressed-tensors."""

from __future__ import annotations

import attrs

from fewbits.checkpoint.folder import CheckpointFiles
from fewbits.formats.settings import Fields, read_settings

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
    """The ``quantization_config`` of a checkpoint. A checkpoint without one has the defaults.

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
