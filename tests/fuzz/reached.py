"""Record which lines of the file-reading code run, without a coverage package."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import attrs

import fewbits

PACKAGE = Path(fewbits.__file__).parent

#: Files of fewbits that parse untrusted bytes.
READING = frozenset(
    str(PACKAGE / name)
    for name in (
        "checkpoint/header.py", "checkpoint/safetensors.py", "checkpoint/folder.py", "checkpoint/reading.py",
        "checkpoint/metadata.py", "checkpoint/torch_file.py", "checkpoint/pickled.py", "checkpoint/raw.py",
        "checkpoint/recognition.py", "checkpoint/state_dicts.py", "checkpoint/codec.py",
        "sources/file.py", "formats/fp8.py", "formats/model_config.py",
    )
)  # fmt: skip

#: Classes and functions in these files that only write, and therefore do not count.
_WRITING = ("_SafetensorsWriter", "encode", "for_chunk")

#: A file name and a line number.
Line = tuple[str, int]


@attrs.define
class Reached:
    """The executed parts of `READING`.

    Attributes:
        steps: (file, line, next line) within one call of a function; the step to its first line begins at 0.
    """

    steps: set[tuple[str, int, int]] = attrs.field(factory=set)

    @property
    def lines(self) -> set[Line]:
        """The executed lines."""
        return {(file, line) for file, _, line in self.steps}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record all steps of this thread inside the ``with`` block."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        file, last = frame.f_code.co_filename, 0
        if file not in READING:
            return None

        def ran(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                self.steps.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return ran

        return ran


def lines_to_reach() -> set[Line]:
    """All lines of the functions in `READING`, without code that only writes and without code that an import runs."""
    found: set[Line] = set()
    for file in READING:
        module = compile(Path(file).read_text(encoding="utf-8"), file, "exec")
        for code in _functions(module):
            found |= {(file, line) for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The functions in a code object, including nested ones."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and inner.co_name not in _WRITING:
            # Only functions have optimized locals; class bodies do not. Comprehensions of a module run at import.
            imported = inner.co_name.startswith("<") and code.co_name == "<module>"
            if inner.co_flags & inspect.CO_OPTIMIZED and not imported:
                yield inner
            yield from _functions(inner)
