"""``fewbits quantize | inspect | verify``, on checkpoints, in one file or many."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import click

from fewbits._version import __version__
from fewbits.api import Plan, Result, plan
from fewbits.api import quantize as quantize_source
from fewbits.api import verify as verify_file
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.reading import Checkpoint
from fewbits.cli.progress import shown_progress
from fewbits.cli.ranks import join_group, own_rank
from fewbits.cli.stderr import Stderr, complain, is_json_asked_for, warnings_as_events
from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError, DigestError, FewbitsError
from fewbits.quantizers.fitting import Ragged
from fewbits.quantizers.job import Share
from fewbits.quantizers.schemes import SCHEMES
from fewbits.validation.report import CRITICAL_DB

SUCCESS, FAILED, BAD_USAGE = 0, 1, 2

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables, and events.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Do not tell how far it is.")
_path = click.Path(path_type=Path)
_ENTRY: dict[str, Any] = {"metavar": "NAME", "help": "The state dict in a training checkpoint; A.B for B in A."}
_FAIL_UNDER: dict[str, Any] = {"type": float, "metavar": "DB", "help": "SQNR below which a tensor fails."}


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise click.Abort(*stop.args) from None  # click itself would write an empty line, which is no event


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fewbits")
def cli() -> None:
    """Make PyTorch checkpoints smaller, account for every tensor, and check what was written.

    Exit codes: 0 for success, 1 for a failure in verification, 2 for anything that cannot be done as asked.
    """


@cli.command()
@click.argument("source", metavar="IN", type=_path)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=_path,
    help="The file to write; a directory, if IN is one, or with --max-shard-size. Required without --dry-run.",
)
@click.option("--entry", **_ENTRY)
@click.option("--config", type=_path, metavar="FILE", help="Settings in TOML or JSON. An option replaces its setting.")
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="How weights are stored. Required without --config.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only what these patterns name. Repeatable.")
@click.option(
    "--exclude", "--skip", "exclude", multiple=True, metavar="PATTERN", help="Keep what this pattern names. Repeatable."
)
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=SCHEME",
    help="Another scheme for what this pattern names: int4:64 for groups of 64, keep for none. Repeatable.",
)
@click.option("--group-size", type=int, metavar="N", help="Weights that share a scale (int4 only).")
@click.option("--ragged", type=click.Choice(get_args(Ragged)), help="What to do with rows that groups do not divide.")
@click.option("--min-elements", type=int, metavar="N", help="Keep smaller tensors, unless a pattern names them.")
@click.option("--embeddings", is_flag=True, help="Quantize embeddings too, where the scheme would keep them.")
@click.option(
    "--max-shard-size", metavar="SIZE", help="Most bytes in each file of a directory (5GB), unless one tensor has more."
)
@click.option("--max-memory", metavar="SIZE", help="Resident memory to stay within, beyond that of the bare program.")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="How many tensors, or pieces of large ones, at a time; as many as torch has threads.",
)
@click.option("--dry-run", is_flag=True, help="Print what would become of every tensor, and write nothing.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the source.")
@click.option("--resume", is_flag=True, help="Go on with a run that did not come to its end, if there is one.")
@click.option("--paranoid", is_flag=True, help="With --resume: read what was read of IN again, to see it is the same.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists. Without --resume: begin an unfinished run anew.")
@click.option("--fail-under", show_default=str(CRITICAL_DB), **_FAIL_UNDER)
@_quiet
@_json
def quantize(
    source: Path,
    output: Path | None,
    entry: str | None,
    config: Path | None,
    embeddings: bool,
    max_shard_size: str | None,
    max_memory: str | None,
    threads: int | None,
    dry_run: bool,
    no_verify: bool,
    resume: bool,
    paranoid: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Quantize the checkpoint IN: a file of safetensors or of torch.save, or a directory with an index of several.

    Under torchrun every process writes some of the files of a directory.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if paranoid and not resume:
        raise click.UsageError("--paranoid goes with --resume: it is about what an earlier run has read.")
    settings = _settings(config, embeddings, options)
    rank = join_group()
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "max_memory": max_memory, "threads": threads}
    how |= {"resume": resume, "paranoid": paranoid, "distributed": rank is not None}
    target = Output.beside(source, **how) if output is None else Output(output, replace=force, **how)
    if dry_run:
        planned = plan(source, entry=entry, config=settings, output=target)
        return SUCCESS if rank else _show_plan(planned, settings, as_json)
    link, there = os.path.islink(target.path), os.path.exists(target.path)
    if not force and (link or os.path.isfile(target.path)) and not (resume and there):
        raise ArgumentError(f"{target.path} exists; pass --force to replace it, or choose another OUT")
    with shown_progress(as_json=as_json, quiet=quiet or bool(rank)) as progress:
        result = quantize_source(
            source,
            entry=entry,
            config=settings,
            output=target,
            validate=not no_verify,
            on_failure="ignore",  # the summary and the exit code tell
            progress=progress,
        )
    if not rank:
        _show_result(result, target.path, settings, as_json)
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
@click.option("--entry", **_ENTRY)
@click.option("--tensors", is_flag=True, help="Print every tensor, not only a summary.")
@click.option("--fail-under", default=CRITICAL_DB, show_default=True, **_FAIL_UNDER)
@_quiet
@_json
def verify(
    file: Path,
    against: Path | None,
    entry: str | None,
    tensors: bool,
    fail_under: float,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check a fewbits FILE: digests, structure, and every element against its SOURCE.

    FILE may be a checkpoint, or a directory, that another tool wrote as compressed-tensors does; that has no digests.
    """
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        report = verify_file(file, against, entry=entry, fail_under=fail_under, progress=progress)
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of tensors and files can be what no encoding holds
            stream.reconfigure(errors="backslashreplace")
    stderr, as_json = Stderr(own_rank()), is_json_asked_for(sys.argv[1:])
    with warnings_as_events(stderr) if as_json else nullcontext():
        try:
            code: int = cli(standalone_mode=False)
        except (click.exceptions.Abort, click.ClickException, FewbitsError) as error:
            code = FAILED if isinstance(error, DigestError) else BAD_USAGE
            complain(stderr, error, code, as_json=as_json)
    return code


def _show_plan(planned: Plan, settings: QuantizationConfig, as_json: bool) -> int:
    """Print the whole ledger: here it is what was asked for."""
    shards = [{"file": shard.file, "bytes": shard.ledger.bytes_after} for shard in planned.shards]
    if as_json:
        about = {"config": settings.to_dict(), "shards": shards, "left_behind": planned.left_behind}
        _print_json({**about, "ledger": planned.ledger.to_dict()})
    else:
        click.echo(str(planned.ledger))
        for shard in shards:
            click.echo(f"{shard['file']}: {shard['bytes']:,} bytes of tensors")
        _tell_left_behind(planned.left_behind)
        click.echo("nothing was written: --dry-run")
    return SUCCESS


def _show_result(result: Result, path: Path, settings: QuantizationConfig, as_json: bool) -> None:
    report, left_behind, shares = result.report, result.quantizer.left_behind, result.quantizer.shares
    if as_json:
        about = {"output": str(path), "config": settings.to_dict(), "left_behind": left_behind, **_work(shares)}
        _print_json({**about, "ledger": result.ledger.to_dict(), "report": report and report.to_dict()})
    else:
        click.echo(result.ledger.summary())
        _tell_left_behind(left_behind)
        _tell_work(shares)
        click.echo("not verified: --no-verify" if report is None else report.summary())
        click.echo(f"written{'' if report is None or report.ok else ', though it failed'}: {path}")


def _tell_left_behind(files: Sequence[str]) -> None:
    if files:
        click.echo(f"left behind: {', '.join(files)}")


def _work(shares: Sequence[Share]) -> dict[str, Any]:
    """How much of the source was converted, by whom."""
    converted = {"bytes": sum(s.converted for s in shares), "resumed_bytes": sum(s.resumed for s in shares)}
    ranks = [
        {"rank": rank, "bytes": share.converted + share.resumed, "converted": share.converted, "files": share.files}
        for rank, share in enumerate(shares)
    ]
    return {"converted": converted, "ranks": ranks}


def _tell_work(shares: Sequence[Share]) -> None:
    if resumed := sum(share.resumed for share in shares):
        how_much = "" if any(share.converted for share in shares) else "all "
        click.echo(f"resumed: {how_much}{resumed:,} bytes of IN had been converted by an earlier run")
    for rank, share in enumerate(shares if len(shares) > 1 else ()):
        click.echo(f"rank {rank}: {share.converted + share.resumed:,} bytes of IN in {len(share.files)} files")


def _settings(config: Path | None, embeddings: bool, options: dict[str, Any]) -> QuantizationConfig:
    """The options that were given over what is in the file."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "overrides" in given:
        given["overrides"] = _overrides(given["overrides"])
    if embeddings:
        given["skip_types"] = ()
    if config is not None:
        return QuantizationConfig.from_file(config).replace(**given)
    if "scheme" not in given:
        raise click.UsageError(f"Missing option '--scheme': one of {', '.join(SCHEMES)}; or a --config with a scheme.")
    return QuantizationConfig(**given)


def _overrides(options: Sequence[str]) -> dict[str, str | dict[str, Any]]:
    """The rules in the order they count in: a pattern that is given again counts as last."""
    overrides: dict[str, str | dict[str, Any]] = {}
    for pattern, rule in map(_override, options):
        overrides.pop(pattern, None)
        overrides[pattern] = rule
    return overrides


def _override(option: str) -> tuple[str, str | dict[str, Any]]:
    """A pattern and its rule, out of ``PATTERN=SCHEME`` or ``PATTERN=SCHEME:GROUP_SIZE``."""
    pattern, _, rule = option.rpartition("=")
    scheme, colon, size = rule.partition(":")
    if not pattern or not scheme or (colon and not size.isdecimal()):
        raise ArgumentError(
            f"--override {option}: write PATTERN=SCHEME, such as lm_head=int8, lm_head=int4:64 or lm_head=keep"
        )
    return pattern, {"scheme": scheme, "group_size": int(size)} if colon else scheme


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))
