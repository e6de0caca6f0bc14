"""Read TOML and JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fewbits.errors import ArgumentError


def read(path: Path) -> Any:
    """Parse a TOML or JSON file, by its suffix.

    Raises:
        ArgumentError: if it cannot be read or parsed.
    """
    _parser(path.suffix.lower())  # a file with another suffix is not read
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ArgumentError(f"not a valid config file: {error}") from None
    return parse(text, path.suffix)


def parse(text: str, suffix: str) -> Any:
    """Parse TOML or JSON.

    Args:
        text: the text.
        suffix: ``".toml"`` or ``".json"``.

    Raises:
        ArgumentError: for another suffix, or a text that cannot be parsed.
    """
    parser = _parser(suffix.lower())
    try:
        return parser(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"not a valid config file: {error}") from None


def _parser(suffix: str) -> Callable[[str], Any]:
    """Find the parser for a suffix. Python has a TOML parser from 3.11 on."""
    if suffix == ".json":
        return lambda text: json.loads(text, object_pairs_hook=_without_repeats)
    if suffix != ".toml":
        raise ArgumentError("the name of a config file ends in .toml or .json")
    for module in ("tomllib", "tomli"):
        with suppress(ModuleNotFoundError):
            return import_module(module).loads  # type: ignore[no-any-return]
    raise ArgumentError("TOML needs Python 3.11, or pip install 'fewbits[toml]'; JSON needs neither")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key appears twice among {[key for key, _ in pairs]}")
    return table
