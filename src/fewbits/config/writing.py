"""Write a config as a file that a person can read and edit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbits.checkpoint.publishing import check_document, publish_document
from fewbits.config.config import QuantizationConfig
from fewbits.config.reading import parse
from fewbits.config.values import plain
from fewbits.errors import ArgumentError

#: The endings of config files.
SUFFIXES = (".toml", ".json")


def write_config(config: QuantizationConfig, path: Path, comments: Sequence[str] = (), *, replace: bool) -> None:
    """Write the settings that differ from their defaults, as TOML or JSON; they must read back as they are.

    Args:
        config: the settings.
        path: the file; its suffix is ``.toml`` or ``.json``.
        comments: lines for the top of a TOML file, each with its ``#``.
        replace: replace the file if it exists.

    Raises:
        ArgumentError: if the file exists, has another suffix, or would not read back as the config.
        CheckpointError: if it cannot be written.
    """
    check_document(path, SUFFIXES, replace=replace)
    settings = {"scheme": config.scheme, **{name: plain(getattr(config, name)) for name in config.changed()}}
    is_json = path.suffix.lower() == ".json"
    text = json.dumps(settings, indent=2) + "\n" if is_json else "\n".join([*comments, *_lines(settings)]) + "\n"
    if QuantizationConfig.from_dict(parse(text, path.suffix)) != config or not _is_utf8(text):
        raise ArgumentError(f"{path}: these settings do not read back as they are; write them in Python")
    publish_document(path, text)


def _is_utf8(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


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
