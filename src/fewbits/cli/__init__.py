"""The command line: a thin front, with no logic of its own."""

import logging
import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    _occupy_standard_descriptors()
    # The tables hold the information of the events.
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
    """Open the null device in place of closed standard streams.

    Otherwise a result file would get the number of such a stream, and a library that prints to standard error would
    print into the result.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
