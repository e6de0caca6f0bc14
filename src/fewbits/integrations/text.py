"""Read text, cut its tokens into windows, and keep text for calibration and text for evaluation apart."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fewbits._events import emit
from fewbits.errors import ArgumentError, CalibrationError

#: Windows up to this many tokens overlap only if they are equal.
_SHORT = 32


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file, or all text files in a directory.

    Args:
        path: a UTF-8 file of any kind, or a directory, which is walked in sorted order. Files of a directory that are
            not UTF-8 are skipped, with a warning event; hidden ones are skipped without.

    Raises:
        ArgumentError: if the path cannot be read, or holds no text.
    """
    path = Path(path)
    files = _files(path)
    texts, skipped = [], []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            skipped.append(str(file))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"text: {file} cannot be read: {_reason(error)}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        found = f"{path} is not UTF-8 text" if skipped == [str(path)] else f"{path} has no text in UTF-8"
        raise ArgumentError(f"text: {found}")
    if skipped:
        emit("warning", "not_text", files=skipped, reason="not UTF-8; these files are left out")
    return texts


def _files(path: Path) -> list[Path]:
    return sorted(_files_in(path)) if path.is_dir() else [path]


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
            f"the text has {len(tokens):,} tokens; one window needs {sequence:,}, and all {samples:,} need "
            f"{samples * sequence:,}: give more text, or a smaller sequence"
        )
    if count < samples:
        emit("warning", "little_text", tokens=len(tokens), needed=samples * sequence, windows=count, asked=samples)
    spare = len(tokens) - count * sequence
    starts = [at * sequence + at * spare // max(1, count - 1) for at in range(count)]
    return [tokens[start : start + sequence] for start in starts]


def refuse_same_files(calibrate: str | os.PathLike[str], evaluate: str | os.PathLike[str]) -> None:
    """Refuse to evaluate on a file that is also used for calibration.

    Files are the same if their resolved paths are equal; `refuse_overlap` finds copies. Directories are walked as in
    `read_texts`.

    Args:
        calibrate: a text file, or a directory of text files.
        evaluate: a text file, or a directory of text files.

    Raises:
        ArgumentError: if a file is in both; the message names the first one.
    """
    files = [{file.resolve() for file in _files(Path(path))} for path in (calibrate, evaluate)]
    if shared := sorted(files[0] & files[1]):
        raise ArgumentError(
            f"evaluation text: {shared[0]} is calibration text too, and the figures would be too good; give other text"
        )


def refuse_overlap(calibration: Sequence[Tensor], evaluation: Sequence[Tensor]) -> None:
    """Refuse windows for evaluation that share text with windows for calibration.

    Short passages, such as the header of a license, may be in both: only a run of tokens as long as half a window, or
    as a short window, counts.

    Args:
        calibration: windows of equal length, each (1, tokens).
        evaluation: other windows.

    Raises:
        ArgumentError: with the number of the first window that overlaps.
    """
    size = min((window.shape[1] for window in (*calibration, *evaluation)), default=0)
    length = max(size // 2, min(size, _SHORT))
    known = {run for window in calibration for run in _runs(window, length)}
    for number, window in enumerate(evaluation, 1):
        if not known.isdisjoint(_runs(window, length)):
            raise ArgumentError(
                f"evaluation text: window {number} shares a run of {length} tokens with the calibration text, and the "
                "figures would be too good; give other text"
            )


def _runs(window: Tensor, length: int) -> Iterator[int]:
    """Yield a hash of every run of tokens in a window."""
    tokens = tuple(window[0].tolist())
    return (hash(tokens[start : start + length]) for start in range(len(tokens) - length + 1))
