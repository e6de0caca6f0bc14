"""The command line: a thin front, with no logic of its own."""

import logging
import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    _occupy_standard_descriptors()
    # The tables say what the events say.
    logging.getLogger("fewbits").addHandler(logging.NullHandler())
    try:
        from fewbits.cli.commands import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        print(f"fewbits: the command line needs {missing.name}: pip install 'fewbits[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())


def _occupy_standard_descriptors() -> None:
    """Lead standard streams that are closed nowhere: files opened later would take their numbers, and their place.

    A library that prints to standard error would then print into the result.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
