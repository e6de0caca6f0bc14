"""``fewbits report``: a page about a result, for browsers."""

from __future__ import annotations

from pathlib import Path

import click

from fewbits.api import verify
from fewbits.cli.help import Command, options_under
from fewbits.cli.options import (
    OUTPUT,
    PATH,
    against_option,
    entry_option,
    fail_under_option,
    file_argument,
    json_option,
    quiet_option,
    replace_option,
)
from fewbits.cli.printing import print_json
from fewbits.cli.progress import shown_progress
from fewbits.pages.curve import Curve
from fewbits.pages.rendering import check_page_path, load_template
from fewbits.validation.tensors import CRITICAL_DB


@click.command(
    cls=Command,
    short_help="Write a page about a result, for browsers.",
    examples=(
        ("from the result alone", "fewbits report small.safetensors -o report.html"),
        ("with errors against the source", "fewbits report OUT -o report.html --against IN"),
        ("with the curve of an allocation", "fewbits report OUT -o report.html --curve curve.json"),
    ),
)
@file_argument
@against_option
@entry_option
@options_under(OUTPUT)(
    "-o", "--output", metavar="OUT", type=PATH, required=True, help="Where to write. OUT is a page, such as a.html."
)
@options_under(OUTPUT)(
    "--curve",
    type=PATH,
    metavar="FILE",
    help="The error for every size. It is a .json file that fewbits allocate wrote.",
)
@replace_option
@fail_under_option
@quiet_option
@json_option
def report_command(
    file: Path,
    output: Path,
    against: Path | None,
    entry: str | None,
    curve: Path | None,
    fail_under: float | None,
    replace: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify FILE, a file or directory that fewbits or another tool quantized, and write a page about it.

    The page is one file without references to others: sizes, the fate of every tensor with its reason, errors,
    histograms, versions and digests. It is written for a result that failed too; the exit code is 1 then.
    """
    check_page_path(output, replace=replace)
    load_template()
    if curve is not None:
        Curve.read(curve)  # a wrong file is refused before the work
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        least = CRITICAL_DB if fail_under is None else fail_under
        report = verify(file, against, entry=entry, fail_under=least, progress=progress)
    report.save_html(output, replace=replace, checkpoint=file, against=against, entry=entry, curve=curve)
    if as_json:
        print_json(output=str(output), bytes=output.stat().st_size, report=report.to_dict())
    else:
        click.echo(f"{report.summary()}\nwritten: {output}")
    return 0 if report.ok else 1
