"""Merge the arguments of `fewbits.quantize`, `plan` and `FleetRun` with a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fewbits.config.config import RUN_SETTINGS, QuantizationConfig, check_settings
from fewbits.errors import ArgumentError
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.schemes import SCHEMES

#: Settings that a config cannot hold, or may be given as objects.
_STRATEGIES = frozenset({"observer", "rounding", "activation_observer", "selector", "serializer"})


def resolve_settings(
    scheme: str | Quantizer | None,
    config: QuantizationConfig | None,
    settings: Mapping[str, Any],
    function: Callable[..., object],
) -> tuple[QuantizationConfig, Quantizer]:
    """Merge arguments like those of `quantize`.

    Args:
        scheme: the name of a scheme, or a quantizer; None takes the scheme of `config`.
        config: settings, which arguments replace.
        settings: observers, a selector, a serializer, and all other settings, as in `quantize`. None leaves the choice
            of an observer, a selector or a serializer to the config.
        function: what was called with them; a misspelled setting may be one of its arguments.

    Returns:
        the merged settings, and the quantizer.

    Raises:
        ArgumentError: as `quantize` does.
    """
    if config is not None and not isinstance(config, QuantizationConfig):
        raise ArgumentError(
            f"config must be a QuantizationConfig, not {config!r}; QuantizationConfig.from_file(path) and "
            "QuantizationConfig.from_dict(settings) make one"
        )
    strategies = {name: value for name, value in settings.items() if name in _STRATEGIES and value is not None}
    plain = {name: value for name, value in settings.items() if name not in _STRATEGIES}
    check_settings(plain, also=list(inspect.signature(function).parameters)[:-1])
    if isinstance(scheme, Quantizer):
        return _run_settings(scheme, config, plain | strategies), scheme
    config = _merged(scheme, config, plain)
    return config, config.quantizer(**strategies)


def _merged(scheme: object, config: QuantizationConfig | None, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(scheme, type) and issubclass(scheme, Quantizer):
        raise ArgumentError(f"scheme is the class {scheme.__name__}; pass an instance, {scheme.__name__}()")
    if scheme is None and config is None:
        raise ArgumentError(f"give a scheme or a config; the schemes are {', '.join(map(repr, SCHEMES))}")
    if scheme is not None:
        settings = {"scheme": scheme, **settings}
    return QuantizationConfig(**settings) if config is None else config.replace(**settings)


def _run_settings(
    quantizer: Quantizer, config: QuantizationConfig | None, settings: dict[str, Any]
) -> QuantizationConfig:
    """Return the settings of the run, and refuse those of a quantizer."""
    config = config or QuantizationConfig()
    foreign = [name for name in dict.fromkeys([*settings, *config.changed()]) if name not in RUN_SETTINGS]
    if foreign:
        cls = type(quantizer).__name__
        raise ArgumentError(
            f"{', '.join(foreign)}: pass these to the quantizer, {cls}(...), and rules to its selector, "
            f"{cls}(selector=LayerSelector(...))"
        )
    return config.replace(**settings)
