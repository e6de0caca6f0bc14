"""`Case`: one input of the fuzzer, that is a task and its files, encoded in one byte string.

The first line gives the task, the scheme and the path to open. The files follow, each after a header line::

    quantize int4 .
    file model.safetensors 120
    <120 bytes>
    link config.json 14
    ../config.json
    pipe tokenizer.json 0

A corpus of cases stores hostile files byte for byte, so it does not depend on the code that mutates them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

TASKS = ("load", "quantize")
SCHEMES = ("int8", "int4", "int8-tensor", "fp16")

_KINDS = ("file", "link", "pipe")
#: Names below the input's own directory: no input may write outside of it.
_NAME = re.compile(r"(?!\.\.?(?:/|$))[\w.-]{1,60}(?:/(?!\.\.?(?:/|$))[\w.-]{1,60}){0,2}", re.ASCII)
_LINE = re.compile(rb"([\w./-]{1,200}) ([\w./-]{1,200}) ([\w./-]{1,200})\n")


@attrs.frozen
class Item:
    """A directory entry: a file with its bytes, a link with its target, or an empty pipe."""

    kind: str
    name: str
    data: bytes = b""


@attrs.frozen
class Case:
    """A task and its files.

    Attributes:
        task: one of `TASKS`.
        scheme: one of `SCHEMES`; ignored when loading.
        path: the path to open, relative to the directory of the items; "." is the directory itself.
        items: the contents of the directory.
    """

    task: str
    scheme: str
    path: str
    items: tuple[Item, ...]

    def to_bytes(self) -> bytes:
        """Encode the case for the fuzzer and the corpus; `parse` decodes it."""
        parts = [f"{self.task} {self.scheme} {self.path}\n".encode()]
        for item in self.items:
            parts += [f"{item.kind} {item.name} {len(item.data)}\n".encode(), item.data, b"\n"]
        return b"".join(parts)

    def write(self, folder: Path) -> Path:
        """Write the files to a new directory, and return the path to open."""
        folder.mkdir()
        for item in self.items:
            path = folder / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            _MAKERS[item.kind](path, item.data)
        return folder if self.path == "." else folder / self.path


def parse(data: bytes) -> Case | None:
    """Decode a case; None if the bytes are not a case or its files cannot be written."""
    try:
        task, scheme, path, *items = _parsed(data)
    except ValueError:
        return None
    names = [item.name for item in items]
    parents = {parent for name in names for parent in map(str, Path(name).parents)}
    sound = task in TASKS and scheme in SCHEMES and (path == "." or _NAME.fullmatch(path))
    if not sound or len({*names}) != len(names) or parents & {*names}:
        return None
    return Case(task, scheme, path, tuple(items))


def _parsed(data: bytes) -> Iterator[Any]:
    """Yield the first line's three words, then the items."""
    first = _LINE.match(data)
    if first is None:
        raise ValueError("there is no first line")
    yield from (word.decode() for word in first.groups())
    at = first.end()
    while line := _LINE.match(data, at):
        kind, name, digits = (word.decode() for word in line.groups())
        start, at = line.end(), line.end() + int(digits) + 1
        if kind not in _KINDS or not _NAME.fullmatch(name) or int(digits) < 0 or data[at - 1 : at] != b"\n":
            raise ValueError(f"no item at {line.start()}")
        yield Item(kind, name, data[start : at - 1])
    if at != len(data):
        raise ValueError(f"no item at {at}")


def _link(path: Path, target: bytes) -> None:
    # Skip targets that the file system does not allow: they do not test fewbits.
    if 0 < len(target) < 200 and b"\0" not in target:
        os.symlink(target, path)


_MAKERS: dict[str, Callable[[Path, bytes], object]] = {
    "file": Path.write_bytes,
    "link": _link,
    "pipe": lambda path, _: os.mkfifo(path),
}
