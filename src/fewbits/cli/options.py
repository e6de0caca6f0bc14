"""Options that several commands share, and the headings of ``fewbits quantize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fewbits.cli.help import one_of, options_under
from fewbits.formats.registry import EXPORTERS
from fewbits.schemes import SCHEMES

WHAT, HOW, CALIBRATION, OUTPUT, RUNNING = "What to quantize", "How", "Calibration", "Output", "Running"
HEADINGS = (WHAT, HOW, CALIBRATION, OUTPUT, RUNNING)

PATH = click.Path(path_type=Path)


def complete_rule(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """List the rules that begin with the text so far."""
    return [rule for rule in ("keep", "quantize", *SCHEMES) if rule.startswith(incomplete)]


in_argument = click.argument("source", metavar="IN", type=PATH)
file_argument = click.argument("file", metavar="FILE", type=PATH)

_output, _running = options_under(OUTPUT), options_under(RUNNING)

entry_option = options_under(WHAT)(
    "--entry", metavar="NAME", help="The state dict in a training checkpoint; A.B for B in A."
)
config_option = options_under(HOW)(
    "--config",
    type=PATH,
    metavar="FILE",
    help="Settings in TOML or JSON; options here replace them, and --override adds to them.",
)
against_option = options_under(WHAT)(
    "--against", type=PATH, metavar="IN", help="The checkpoint from which FILE was made."
)
max_shard_size_option = _output(
    "--max-shard-size",
    metavar="SIZE",
    help="Most bytes in each file of a directory; 5GB by default. A larger tensor has a file of its own.",
)


def format_option(*, required: bool) -> Callable[..., Any]:
    """Return ``--format``."""
    return _output(
        "--format",
        "name",
        type=click.Choice(list(EXPORTERS)),
        metavar="FORMAT",
        required=required,
        help=one_of("The format of OUT", EXPORTERS),
    )


replace_option = _output("--replace", is_flag=True, help="Replace OUT if it exists.")
tensors_option = _running("--tensors", is_flag=True, help="Print a line for every tensor, not only the summary.")
fail_under_option = _running(
    "--fail-under", type=float, metavar="DB", help="Fail tensors whose SQNR is below this; 10 by default."
)
quiet_option = _running("-q", "--quiet", is_flag=True, help="Print no progress.")
json_option = _running("--json", "as_json", is_flag=True, help="Print JSON, and progress as JSON events.")
