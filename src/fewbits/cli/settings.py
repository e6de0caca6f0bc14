"""Turn the options of ``fewbits quantize`` into settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.schemes import SCHEMES


def merge_settings(config: Path | None, options: dict[str, Any]) -> QuantizationConfig:
    """Merge the options into the settings of the config file: an option replaces a setting, but overrides are added."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "overrides" in given:
        given["overrides"] = _overrides(given["overrides"])
    if "embeddings" in given:
        given["embeddings"] = rule_of("--embeddings", given["embeddings"])
    if config is not None:
        read = QuantizationConfig.from_file(config)
        if "overrides" in given:
            kept = {pattern: rule for pattern, rule in read.overrides.items() if pattern not in given["overrides"]}
            given["overrides"] = {**kept, **given["overrides"]}
        return read.replace(**given)
    if "scheme" not in given:
        raise click.UsageError(f"Missing option '--scheme': one of {', '.join(SCHEMES)}; or a --config with a scheme.")
    return QuantizationConfig(**given)


def _overrides(options: Sequence[str]) -> dict[str, str | dict[str, Any]]:
    """Order the rules: a repeated pattern takes its last place."""
    overrides: dict[str, str | dict[str, Any]] = {}
    for pattern, rule in map(_override, options):
        overrides.pop(pattern, None)
        overrides[pattern] = rule
    return overrides


def _override(option: str) -> tuple[str, str | dict[str, Any]]:
    """Split ``PATTERN=RULE`` into a pattern and its rule."""
    pattern, _, rule = option.rpartition("=")
    if not pattern:
        raise ArgumentError(f"--override {option}: write PATTERN=SCHEME, such as lm_head=int8 or lm_head=keep")
    return pattern, rule_of(f"--override {option}", rule)


def rule_of(where: str, rule: str) -> str | dict[str, Any]:
    """Parse ``SCHEME``, ``SCHEME:GROUP_SIZE`` or ``SCHEME:GROUP_SIZE:SCALE_BITS``."""
    scheme, *numbers = rule.split(":")
    if not scheme or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ArgumentError(
            f"{where}: write SCHEME, SCHEME:GROUP_SIZE or SCHEME:GROUP_SIZE:SCALE_BITS, such as int8, int4:64 or "
            "nf4:32:6, or keep"
        )
    settings = dict(zip(("group_size", "scale_bits"), map(int, numbers), strict=False))
    return {"scheme": scheme, **settings} if settings else scheme
