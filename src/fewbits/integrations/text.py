"""Read calibration text, and cut its tokens into windows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fewbits._events import emit
from fewbits.errors import ArgumentError, CalibrationError


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file, or all text files in a directory.

    Args:
        path: a UTF-8 file of any kind, or a directory, which is walked in sorted order. Files of a directory that are
            not UTF-8 are skipped, with a warning event; hidden ones are skipped without.

    Raises:
        ArgumentError: if the path cannot be read, or holds no text.
    """
    path = Path(path)
    files = sorted(_files_in(path)) if path.is_dir() else [path]
    texts, skipped = [], []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            skipped.append(str(file))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"calibration text: {file} cannot be read: {_reason(error)}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        found = f"{path} is not UTF-8 text" if skipped == [str(path)] else f"{path} has no text in UTF-8"
        raise ArgumentError(f"calibration text: {found}")
    if skipped:
        emit("warning", "not_text", files=skipped, reason="not UTF-8; calibration goes without these files")
    return texts


def _files_in(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def cut_windows(tokens: Sequence[int], samples: int, sequence: int) -> list[Sequence[int]]:
    """Cut windows that do not overlap, evenly spread over the tokens. Too few tokens give fewer windows and a warning.

    Args:
        tokens: the tokens of the whole text.
        samples: the number of windows.
        sequence: the number of tokens in each.

    Raises:
        CalibrationError: if the tokens do not fill one window.
    """
    count = min(samples, len(tokens) // sequence)
    if not count:
        raise CalibrationError(
            f"the calibration text has {len(tokens):,} tokens; one window needs {sequence:,}, and all {samples:,} need "
            f"{samples * sequence:,}: give more text, or a smaller sequence"
        )
    if count < samples:
        emit("warning", "little_text", tokens=len(tokens), needed=samples * sequence, windows=count, asked=samples)
    spare = len(tokens) - count * sequence
    starts = [at * sequence + at * spare // max(1, count - 1) for at in range(count)]
    return [tokens[start : start + sequence] for start in starts]
