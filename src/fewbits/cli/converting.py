"""``fewbits convert``: write a quantized checkpoint in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import click

from fewbits.cli.printing import print_json
from fewbits.cli.progress import shown_progress
from fewbits.conversion.exporting import Exported, convert, exporter_named
from fewbits.formats.registry import EXPORTERS

_path = click.Path(path_type=Path)


@click.command(short_help="Write a result in the format of another tool.")
@click.argument("source", metavar="IN", type=_path)
@click.option("-o", "--output", metavar="OUT", type=_path, required=True, help="Directory or file to write.")
@click.option("--format", "name", type=click.Choice(list(EXPORTERS)), required=True, help="The format of OUT.")
@click.option("--allow", is_flag=True, help="Write tensors too that readers of the format may not take.")
@click.option("--replace", is_flag=True, help="Replace OUT if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and progress as JSON events.")
def convert_command(
    source: Path, output: Path, name: str, replace: bool, quiet: bool, as_json: bool, **options: Any
) -> int:
    r"""Write the quantized checkpoint IN in another format, with the codes that it has.

    IN is a result of fewbits, or a checkpoint of another tool. OUT is read back and compared with IN before it appears.

    \b
    For example:
      fewbits convert small -o served --format compressed-tensors
    """
    given = {option: value for option, value in options.items() if value}
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        exported = convert(source, output, exporter_named(name, **given), replace=replace, progress=progress)
    if as_json:
        print_json(**attrs.asdict(exported) | {"path": str(exported.path)})
    else:
        click.echo(_summary(exported))
    return 0


def _summary(exported: Exported) -> str:
    tensors = f"{exported.quantized:,} quantized and {exported.kept:,} other tensors"
    return f"{exported.path} ({exported.format}): {tensors}, {exported.nbytes:,} bytes, read back and equal"
