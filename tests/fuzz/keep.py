"""Copy those of the fuzzer's new inputs that reach more code to the corpus that the tests replay.

An input reaches more if it takes a new step from one line of the reading code to another, or ends in an error class
that no other input ends in. Seeds, hostile cases and former findings are in the corpus too, and are never overwritten.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from case import Case, parse
from hostile import hostile
from reached import Reached
from seeds import seeds
from targets import limited, run

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FOUND = HERE.parents[1] / "build" / "fuzz" / "corpus"


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for name, case in (seeds() | hostile()).items():
        if not (CORPUS / name).exists():
            (CORPUS / name).write_bytes(case.to_bytes())
    known: set[object] = set()
    for path in sorted(CORPUS.iterdir()):
        known |= reached_by(parse(path.read_bytes()))
    found = {path.read_bytes() for path in FOUND.iterdir()} if FOUND.is_dir() else set()
    added = 0
    for data in sorted(found, key=lambda data: (len(data), data)):
        new = reached_by(parse(data)) - known
        if new:
            (CORPUS / hashlib.sha1(data).hexdigest()[:16]).write_bytes(data)
            known |= new
            added += 1
    print(f"{added} of {len(found)} inputs were added to {CORPUS}", file=sys.stderr)


def reached_by(case: Case | None) -> set[object]:
    """The steps that an input takes and its outcome; empty if the input is not a case."""
    if case is None:
        return set()
    reached = Reached()
    with limited(), reached.watching():
        end = run(case)
    return {*reached.steps, (case.task, end)}


if __name__ == "__main__":
    main()
