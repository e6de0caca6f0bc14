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
    """Merge the options into the settings of the config file."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "overrides" in given:
        given["overrides"] = _overrides(given["overrides"])
    if "embeddings" in given:
        given["embeddings"] = _rule("--embeddings", given["embeddings"])
    if config is not None:
        return QuantizationConfig.from_file(config).replace(**given)
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
    return pattern, _rule(f"--override {option}", rule)


def _rule(where: str, rule: str) -> str | dict[str, Any]:
    """Parse ``SCHEME`` or ``SCHEME:GROUP_SIZE``."""
    scheme, colon, size = rule.partition(":")
    if not scheme or (colon and not size.isdecimal()):
        raise ArgumentError(f"{where}: write SCHEME or SCHEME:GROUP_SIZE, such as int8 or int4:64, or keep")
    return {"scheme": scheme, "group_size": int(size)} if colon else scheme
