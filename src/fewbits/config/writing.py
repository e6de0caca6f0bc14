"""Write a config as a file that a person can read and edit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.config.config import QuantizationConfig
from fewbits.config.values import plain
from fewbits.errors import ArgumentError


def write_config(config: QuantizationConfig, path: Path, comments: Sequence[str] = (), *, replace: bool) -> None:
    """Write the settings that differ from their defaults, as TOML or JSON, and read them back.

    Args:
        config: the settings.
        path: the file; its suffix is ``.toml`` or ``.json``.
        comments: lines for the top of a TOML file, each with its ``#``.
        replace: replace the file if it exists.

    Raises:
        ArgumentError: if the file exists, has another suffix, cannot be written, or does not read back as the config.
    """
    settings = {"scheme": config.scheme, **{name: plain(getattr(config, name)) for name in config.changed()}}
    if path.suffix.lower() not in (".toml", ".json"):
        raise ArgumentError(f"{path}: the name of a config file ends in .toml or .json")
    if path.exists() and not replace:
        raise ArgumentError(f"{path} exists; pass replace=True or --replace, or choose another file")
    is_json = path.suffix.lower() == ".json"
    text = json.dumps(settings, indent=2) + "\n" if is_json else "\n".join([*comments, *_lines(settings)]) + "\n"
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        beside.write_text(text, encoding="utf-8")
        if QuantizationConfig.from_file(beside) != config:
            raise ArgumentError(f"{path}: these settings do not read back as they are; write them in Python")
        os.replace(beside, path)
    except (OSError, UnicodeEncodeError) as error:
        raise ArgumentError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _lines(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of TOML: plain settings first, then a section for each table."""
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    for name, value in settings.items():
        if name not in tables and value is not None:
            yield f"{name} = {_value(value)}"
    for name, table in tables.items():
        yield f"\n[{name}]"
        for key, value in table.items():
            yield f"{_value(key)} = {_value(value)}"


def _value(value: Any) -> str:
    """Write a value as TOML: strings of JSON are strings of TOML, except for the character DEL."""
    if isinstance(value, Mapping):
        entries = (f"{key} = {_value(entry)}" for key, entry in value.items() if entry is not None)
        return f"{{ {', '.join(entries)} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
