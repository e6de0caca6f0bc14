"""``fewbits convert``: write a quantized checkpoint in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fewbits.cli.exporting import exporter_settings
from fewbits.cli.printing import exported_fields, exported_summary, print_json
from fewbits.cli.progress import shown_progress
from fewbits.conversion.exporting import convert, exporter_named
from fewbits.formats.registry import EXPORTERS

_path = click.Path(path_type=Path)


@click.command(short_help="Write a result in the format of another tool.")
@click.argument("source", metavar="IN", type=_path)
@click.option("-o", "--output", metavar="OUT", type=_path, required=True, help="Directory or file to write.")
@click.option("--format", "name", type=click.Choice(list(EXPORTERS)), required=True, help="The format of OUT.")
@exporter_settings
@click.option("--max-shard-size", metavar="SIZE", help="Most bytes in each file of a directory; 5GB by default.")
@click.option("--replace", is_flag=True, help="Replace OUT if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and progress as JSON events.")
def convert_command(
    source: Path, output: Path, name: str, replace: bool, quiet: bool, as_json: bool, **settings: Any
) -> int:
    """Write the quantized checkpoint IN in another format, with the codes that it has.

    IN is a result of fewbits, or a checkpoint of another tool. OUT is read back and compared with IN before it appears.

    \b
    For example:
      fewbits convert small -o served --format compressed-tensors
      fewbits convert small -o small.gguf --format gguf --template float.gguf
    """  # noqa: D301 (click reads the control character)
    given = {setting: value for setting, value in settings.items() if value}
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        exported = convert(source, output, exporter_named(name, **given), replace=replace, progress=progress)
    if as_json:
        print_json(**exported_fields(exported))
    else:
        click.echo(exported_summary(exported))
    return 0
