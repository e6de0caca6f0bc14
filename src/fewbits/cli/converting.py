"""``fewbits convert``: write a quantized checkpoint in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fewbits.cli.exporting import exporter_settings
from fewbits.cli.help import Command, options_under
from fewbits.cli.options import (
    OUTPUT,
    PATH,
    format_option,
    in_argument,
    json_option,
    max_shard_size_option,
    quiet_option,
    replace_option,
)
from fewbits.cli.printing import exported_fields, exported_summary, print_json
from fewbits.cli.progress import shown_progress
from fewbits.conversion.exporting import convert, exporter_named


@click.command(
    cls=Command,
    short_help="Write a result in the format of another tool.",
    examples=(
        ("for vLLM and transformers", "fewbits convert small -o served --format compressed-tensors"),
        ("for llama.cpp", "fewbits convert small -o small.gguf --format gguf --template float.gguf"),
        ("for MLX", "fewbits convert small -o small-mlx --format mlx"),
    ),
)
@in_argument
@options_under(OUTPUT)(
    "-o",
    "--output",
    metavar="OUT",
    type=PATH,
    required=True,
    help="Where to write. OUT is a file or a directory, as the format has it.",
)
@format_option(required=True)
@exporter_settings
@max_shard_size_option
@replace_option
@quiet_option
@json_option
def convert_command(
    source: Path, output: Path, name: str, replace: bool, quiet: bool, as_json: bool, **settings: Any
) -> int:
    """Write the quantized checkpoint IN in another format, with the codes that it has.

    IN is a result of fewbits, or a checkpoint of another tool. OUT is read back and compared with IN before it appears.
    """
    given = {setting: value for setting, value in settings.items() if value}
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        exported = convert(source, output, exporter_named(name, **given), replace=replace, progress=progress)
    if as_json:
        print_json(**exported_fields(exported))
    else:
        click.echo(exported_summary(exported))
    return 0
