"""``fewbits inspect`` and ``fewbits verify``: show a result, and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fewbits.api import verify as verify_file
from fewbits.cli.help import Command
from fewbits.cli.options import (
    against_option,
    entry_option,
    fail_under_option,
    file_argument,
    json_option,
    quiet_option,
    tensors_option,
)
from fewbits.cli.printing import print_json, show, show_contents
from fewbits.cli.progress import shown_progress
from fewbits.formats.registry import open_quantized


@click.command(
    cls=Command,
    short_help="Show the contents of a result.",
    examples=(
        ("the scheme and the size of all tensors", "fewbits inspect small.safetensors"),
        ("a line for every tensor of a checkpoint of another tool", "fewbits inspect DIR --tensors"),
    ),
)
@file_argument
@tensors_option
@json_option
def inspect_command(file: Path, tensors: bool, as_json: bool) -> int:
    """Show the contents of a FILE, or a directory, that fewbits or another tool quantized."""
    show_contents(file, open_quantized(file), tensors, as_json)
    return 0


@click.command(
    cls=Command,
    short_help="Check a result, and compare it with its source.",
    examples=(
        ("digests and structure only", "fewbits verify small.safetensors"),
        ("each element too", "fewbits verify small.safetensors --against model.safetensors"),
        ("exit with 1 if a tensor is below 30 dB", "fewbits verify OUT --against IN --fail-under 30"),
    ),
)
@file_argument
@against_option
@entry_option
@fail_under_option
@tensors_option
@quiet_option
@json_option
def verify_command(file: Path, against: Path | None, tensors: bool, quiet: bool, as_json: bool, **options: Any) -> int:
    """Check digests and structure of a FILE or directory that fewbits wrote, and each element against IN.

    FILE may also be a checkpoint of another tool, such as compressed-tensors, GPTQ or AWQ; these have no digests.
    """
    given = {name: value for name, value in options.items() if value is not None}
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        report = verify_file(file, against, progress=progress, **given)
    if as_json:
        print_json(**report.to_dict())
    else:
        show(report, tensors)
    return 0 if report.ok else 1
