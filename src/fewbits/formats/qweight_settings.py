"""The settings of GPTQ and AWQ checkpoints."""

from __future__ import annotations

import attrs

from fewbits.formats.settings import Fields

#: Files beside the tensors, besides ``config.json``, that hold the settings.
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")


@attrs.frozen
class Settings:
    """The settings of a checkpoint, as far as they are stated.

    Attributes:
        bits: bits per code.
        group_size: inputs that share a scale; -1 for all.
        symmetric: whether all zero points are the middle of the code range.
        version: the variant of the format, in lower case.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    version: str | None = None

    @classmethod
    def read(cls, fields: Fields | None) -> Settings:
        """Read the settings of GPTQ or AWQ.

        Raises:
            FormatError: if a value has the wrong type.
        """
        if fields is None:
            return cls()
        versions = [fields.get(name, str) for name in ("checkpoint_format", "version", "format")]
        version = next(filter(None, versions), None)
        if fields.get("is_marlin_format", bool):
            version = "marlin"
        # With `dynamic`, layers may differ from these settings. Shapes tell bits and groups then.
        varies = bool(fields.get("dynamic", dict))
        return cls(
            bits=None if varies else fields.get("bits", int, fields.get("w_bit", int)),
            group_size=None if varies else fields.get("group_size", int, fields.get("q_group_size", int)),
            symmetric=fields.get("sym", bool, False) and not varies,
            version=None if version is None else version.lower(),
        )
