"""``fewbits report``: a page about a result, for browsers."""

from __future__ import annotations

from pathlib import Path

import click

from fewbits.api import verify
from fewbits.cli.printing import print_json
from fewbits.cli.progress import shown_progress
from fewbits.pages.curve import Curve
from fewbits.pages.rendering import check_page_path, load_template
from fewbits.validation.tensors import CRITICAL_DB

_path = click.Path(path_type=Path)


@click.command(short_help="Write a page about a result, for browsers.")
@click.argument("file", metavar="OUT", type=_path)
@click.option("-o", "--output", metavar="HTML", type=_path, required=True, help="The page to write, such as a.html.")
@click.option("--against", type=_path, metavar="SOURCE", help="The checkpoint from which OUT was made.")
@click.option("--entry", metavar="NAME", help="The state dict in a training checkpoint; A.B for B in A.")
@click.option("--curve", type=_path, metavar="JSON", help="Sizes and errors, as fewbits allocate writes them.")
@click.option(
    "--fail-under",
    type=float,
    metavar="DB",
    default=CRITICAL_DB,
    help="Fail tensors whose SQNR is below this; 10 by default.",
)
@click.option("--replace", is_flag=True, help="Replace HTML if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and progress as JSON events.")
def report_command(
    file: Path,
    output: Path,
    against: Path | None,
    entry: str | None,
    curve: Path | None,
    fail_under: float,
    replace: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    r"""Verify OUT, a file or directory that fewbits or another tool quantized, and write a page about it.

    The page is one file without references to others: sizes, the fate of every tensor with its reason, errors,
    histograms, versions and digests. It is written for a result that failed too; the exit code is 1 then.

    \b
    For example:
      fewbits report small.safetensors -o report.html --against model.safetensors
    """
    check_page_path(output, replace=replace)
    load_template()
    if curve is not None:
        Curve.read(curve)  # a wrong file is refused before the work
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        report = verify(file, against, entry=entry, fail_under=fail_under, progress=progress)
    report.save_html(output, replace=replace, checkpoint=file, against=against, entry=entry, curve=curve)
    if as_json:
        print_json(output=str(output), bytes=output.stat().st_size, report=report.to_dict())
    else:
        click.echo(f"{report.summary()}\nwritten: {output}")
    return 0 if report.ok else 1
