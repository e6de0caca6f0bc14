"""The command line: a thin front, with no logic of its own."""

import logging
import sys
import warnings


def main() -> None:
    """Run the command line and exit with its code."""
    # torch warns at its first tensor if numpy is not installed; nothing here uses it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
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
