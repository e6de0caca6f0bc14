"""``fewbits quantize | inspect | verify``, on safetensors checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fewbits._version import __version__
from fewbits.api import quantize as quantize_source
from fewbits.api import verify as verify_file
from fewbits.checkpoint.reading import Checkpoint
from fewbits.cli.progress import progress_bar
from fewbits.errors import ArgumentError, DigestError, FewbitsError
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.selector import LayerSelector
from fewbits.validation.report import CRITICAL_DB

SUCCESS, FAILED, BAD_USAGE = 0, 1, 2

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
_path = click.Path(path_type=Path)
_fail_under = click.option(
    "--fail-under",
    type=float,
    default=CRITICAL_DB,
    show_default=True,
    metavar="DB",
    help="SQNR below which a tensor fails.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fewbits")
def cli() -> None:
    """Make PyTorch checkpoints smaller, account for every tensor, and check what was written.

    Exit codes: 0 for success, 1 for a failure in verification, 2 for anything that cannot be done as asked.
    """


@cli.command()
@click.argument("source", metavar="IN", type=_path)
@click.option("-o", "--output", required=True, metavar="OUT", type=_path, help="The file to write.")
@click.option("--scheme", type=click.Choice(list(SCHEMES)), required=True, help="How weights are stored.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only what these patterns name. Repeatable.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Keep what this pattern names. Repeatable.")
@click.option("--group-size", type=int, metavar="N", help="Weights that share a scale (int4 only).")
@click.option("--embeddings", is_flag=True, help="Quantize embeddings too, where the scheme would keep them.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the source.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@_fail_under
@_json
def quantize(
    source: Path,
    output: Path,
    scheme: str,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    group_size: int | None,
    embeddings: bool,
    no_verify: bool,
    force: bool,
    fail_under: float,
    as_json: bool,
) -> int:
    """Quantize the safetensors checkpoint IN."""
    if output.exists() and not force:
        raise ArgumentError(f"{output} exists; pass --force to replace it, or choose another OUT")
    options: dict[str, Any] = {"selector": LayerSelector(include=include, exclude=skip)}
    if group_size is not None:
        options["group_size"] = group_size
    if embeddings:
        options["skip_types"] = ()
    with progress_bar() as progress:
        result = quantize_source(
            source,
            scheme,
            output=output,
            validate=not no_verify,
            on_failure="ignore",
            fail_under=fail_under,
            progress=progress,
            **options,
        )
    if as_json:
        report = None if result.report is None else result.report.to_dict()
        _print_json({"output": str(output), "ledger": result.ledger.to_dict(), "report": report})
    else:
        click.echo(result.ledger.summary())
        click.echo("not verified: --no-verify" if result.report is None else result.report.summary())
        click.echo(f"written{'' if result.report is None or result.report.ok else ', though it failed'}: {output}")
    return SUCCESS if result.report is None or result.report.ok else FAILED


@cli.command()
@click.argument("file", metavar="FILE", type=_path)
@click.option("--tensors", is_flag=True, help="Print every tensor, not only a summary.")
@_json
def inspect(file: Path, tensors: bool, as_json: bool) -> int:
    """Show what a fewbits FILE holds."""
    checkpoint = Checkpoint(file)
    metadata = checkpoint.metadata
    if as_json:
        about = {"versions": dict(metadata.versions), "architecture": metadata.architecture}
        figures = {name: metrics.to_dict() for name, metrics in metadata.metrics.items()}
        _print_json({"file": str(file), **about, "ledger": checkpoint.ledger.to_dict(), "metrics": figures})
    else:
        versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
        click.echo(f"{file}: written by {versions}; architecture {metadata.architecture or 'not known'}")
        click.echo(str(checkpoint.ledger) if tensors else checkpoint.ledger.summary())
    return SUCCESS


@cli.command()
@click.argument("file", metavar="FILE", type=_path)
@click.option("--against", type=_path, metavar="SOURCE", help="The checkpoint it was made from.")
@click.option("--tensors", is_flag=True, help="Print every tensor, not only a summary.")
@_fail_under
@_json
def verify(file: Path, against: Path | None, tensors: bool, fail_under: float, as_json: bool) -> int:
    """Check digests and structure of a fewbits FILE, and every element against its SOURCE."""
    with progress_bar() as progress:
        report = verify_file(file, against, fail_under=fail_under, progress=progress)
    if as_json:
        _print_json(report.to_dict())
    else:
        click.echo(str(report) if tensors else report.summary())
    return SUCCESS if report.ok else FAILED


def run() -> int:
    """Run the command line; every error that fewbits knows is one paragraph, not a traceback.

    Returns:
        the exit code.
    """
    try:
        code: int = cli(standalone_mode=False)
    except click.exceptions.Abort:
        code = _complain("interrupted")
    except click.ClickException as error:
        error.show()
        code = BAD_USAGE
    except DigestError as error:
        code = _complain(str(error), FAILED)
    except FewbitsError as error:
        code = _complain(str(error))
    return code


def _complain(message: str, code: int = BAD_USAGE) -> int:
    click.echo(f"fewbits: {message}", err=True)
    return code


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
