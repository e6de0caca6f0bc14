"""`FewbitsConfig`: the ``quantization_config`` of transformers for fewbits."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.formats.compressed_config import QUANT_METHOD
from fewbits.formats.model_config import FIRST_FILE, OWN_METHOD, WRITTEN_BY
from fewbits.quantizers.base import Quantizer

_configs: Any = importlib.import_module("transformers.utils.quantization_config")
_auto: Any = importlib.import_module("transformers.quantizers.auto")


@_auto.register_quantization_config(OWN_METHOD)
class FewbitsConfig(_configs.QuantizationConfigMixin):  # type: ignore[misc]
    """How ``from_pretrained`` quantizes a float model while it loads it.

    A result of fewbits needs no config. If one is given, it is ignored.

    Args:
        scheme: the name of a scheme, such as ``"int4"``; see `fewbits.schemes.SCHEMES`.
        settings: other settings of `fewbits.QuantizationConfig`, such as ``group_size=64`` or ``exclude=["lm_head"]``.

    Attributes:
        first_file: the name of the first file of a result that only fewbits reads; None for all other models.

    Raises:
        ArgumentError: for an unknown scheme or setting.
    """

    quant_method = OWN_METHOD

    def __init__(self, scheme: str | None = None, **settings: Any) -> None:
        if settings and scheme is None:
            raise ArgumentError(f"{', '.join(settings)}: settings go with a scheme, FewbitsConfig('int4', ...)")
        self.settings = None if scheme is None else QuantizationConfig(scheme=scheme, **settings)
        self.first_file: str | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the settings in ``config.json``."""
        if config_dict.get("quant_method") != OWN_METHOD or "scheme" not in config_dict:
            config = cls()
            config.first_file = config_dict.get(FIRST_FILE)
        else:
            config = cls(**{name: value for name, value in config_dict.items() if name != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON."""
        settings = {} if self.settings is None else self.settings.to_dict()
        return {"quant_method": OWN_METHOD, **settings}

    def quantizer(self) -> Quantizer:
        """Return the quantizer for a float model.

        Raises:
            ArgumentError: if there is no scheme, or a strategy needs data.
        """
        if self.settings is None:
            raise ArgumentError("the model is not quantized, so the config needs a scheme: FewbitsConfig('int4')")
        quantizer = self.settings.quantizer()
        needing = [quantizer.observer] if quantizer.observer.needs_data else []
        if needing or quantizer.rounding.needs != "nothing":
            name = type(needing[0] if needing else quantizer.rounding).__name__
            raise ArgumentError(
                f"{name} needs data, and from_pretrained runs none; quantize the directory with "
                "fewbits.integrations.transformers.quantize_directory, and load the result"
            )
        return quantizer


class _CompressedTensorsConfig(_configs.CompressedTensorsConfig):  # type: ignore[misc]
    """Lets fewbits load its own results that other readers of compressed-tensors take too."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return a `FewbitsConfig` for a result of fewbits, and transformers' own config otherwise."""
        if config_dict.get(WRITTEN_BY) == OWN_METHOD:
            return FewbitsConfig.from_dict(config_dict, *args, **kwargs)
        return _configs.CompressedTensorsConfig.from_dict(config_dict, *args, **kwargs)


_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = _CompressedTensorsConfig
