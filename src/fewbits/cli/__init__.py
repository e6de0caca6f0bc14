"""The command line: a thin front, with no logic of its own."""

import logging
import sys


def main() -> None:
    """Run the command line and exit with its code."""
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
