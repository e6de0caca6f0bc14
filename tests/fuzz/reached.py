"""Which lines of the code that reads files have been run, without a package for it."""

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

#: What looks at bytes that anybody may have written.
READING = frozenset(
    str(PACKAGE / name)
    for name in (
        "checkpoint/header.py", "checkpoint/safetensors.py", "checkpoint/folder.py", "checkpoint/reading.py",
        "checkpoint/metadata.py", "checkpoint/torch_file.py", "checkpoint/pickled.py", "checkpoint/raw.py",
        "checkpoint/recognition.py", "checkpoint/state_dicts.py", "checkpoint/sharded.py", "checkpoint/codec.py",
        "sources/file.py", "formats/fp8.py", "sources/model_config.py",
    )
)  # fmt: skip

#: Classes and functions in these files that only write.
_WRITING = ("_SafetensorsWriter", "encode", "encode_chunk")

#: A line of a file.
Line = tuple[str, int]


@attrs.define
class Reached:
    """What of `READING` has been run.

    Attributes:
        steps: from one line of a file to another, in one call of a function; from 0 to its first.
    """

    steps: set[tuple[str, int, int]] = attrs.field(factory=set)

    @property
    def lines(self) -> set[Line]:
        """The lines that have been run."""
        return {(file, line) for file, _, line in self.steps}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note everything that this thread runs meanwhile."""
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
    """Every line of the functions in `READING`, but for those that only write. What an import runs does not count."""
    found: set[Line] = set()
    for file in READING:
        module = compile(Path(file).read_text(encoding="utf-8"), file, "exec")
        for code in _functions(module):
            found |= {(file, line) for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    """The functions in some code, and those in them."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and inner.co_name not in _WRITING:
            # Functions have locals of their own, bodies of classes have not; what a module computes an import runs.
            imported = inner.co_name.startswith("<") and code.co_name == "<module>"
            if inner.co_flags & inspect.CO_OPTIMIZED and not imported:
                yield inner
            yield from _functions(inner)
