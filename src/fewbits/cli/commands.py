"""``fewbits quantize | inspect | verify | convert | report``, on checkpoints, in one file or many."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, get_args

import attrs
import click

from fewbits._version import __version__
from fewbits.api import plan
from fewbits.api import quantize as quantize_source
from fewbits.api import verify as verify_file
from fewbits.checkpoint.output import Output
from fewbits.cli.calibrating import TextOptions, text_options
from fewbits.cli.converting import convert_command
from fewbits.cli.exporting import Export, format_options
from fewbits.cli.printing import print_json, show, show_contents, show_plan, show_result
from fewbits.cli.progress import shown_progress
from fewbits.cli.ranks import join_group, own_rank
from fewbits.cli.reporting import report_command
from fewbits.cli.settings import merge_settings
from fewbits.cli.streams import Stderr, Stdout, is_json_asked_for, warnings_as_events
from fewbits.errors import ArgumentError, DigestError, FewbitsError
from fewbits.formats.registry import open_quantized
from fewbits.numerics.dtypes import SCALE_DTYPES, dtype_name
from fewbits.quantizers.scheme import Ragged
from fewbits.rounding import ROUNDINGS
from fewbits.schemes import SCHEMES

#: Exit codes. Shells give the last one, 128 and the number of SIGPIPE, to a process whose output has no reader.
SUCCESS, FAILED, BAD_USAGE, NOT_READ = 0, 1, 2, 141

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, and progress as JSON events.")
_tensors = click.option("--tensors", is_flag=True, help="Print a line for every tensor, not only the summary.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
_path = click.Path(path_type=Path)
_entry = click.option("--entry", metavar="NAME", help="The state dict in a training checkpoint; A.B for B in A.")
_fail_under = click.option(
    "--fail-under", type=float, metavar="DB", help="Fail tensors whose SQNR is below this; 10 by default."
)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise click.Abort(*stop.args) from None  # click would write an empty line between the events


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fewbits")
def cli() -> None:
    r"""Make PyTorch checkpoints smaller, and check every written number.

    \b
    For example:
      fewbits quantize model.safetensors --scheme int8 --dry-run
      fewbits quantize model.safetensors -o small.safetensors --scheme int8
      fewbits inspect small.safetensors
      fewbits verify small.safetensors --against model.safetensors

    Exit codes: 0 for success, 1 if verification failed, 2 if the command could not run, 141 if the
    reader of its output went away.
    """


@cli.command(short_help="Write a smaller copy of a checkpoint.")
@click.argument("source", metavar="IN", type=_path)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=_path,
    help="File to write; a directory if IN is one, or with --max-shard-size. Required without --dry-run.",
)
@_entry
@click.option("--config", type=_path, metavar="FILE", help="Settings in TOML or JSON; options here replace them.")
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="How to store weights. Required without --config.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize only tensors with such names. Repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep tensors with such names unchanged. Repeatable.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=SCHEME",
    help="Another scheme for tensors with such names: int8, int3:64 (groups of 64), or keep. Repeatable.",
)
@click.option("--group-size", type=int, metavar="N", help="Weights that share a scale: 64 by default, 128 for int4.")
@click.option(
    "--scale-dtype",
    type=click.Choice([dtype_name(dtype) for dtype in SCALE_DTYPES]),
    help="Dtype of stored scales; by default that of each weight. float16 halves those of a float32 model.",
)
@click.option(
    "--scale-bits",
    type=click.IntRange(2, 8),
    metavar="N",
    help="Store the scale of each group as a code of N bits, beside one scale for each row; for schemes with groups.",
)
@click.option(
    "--rounding",
    type=click.Choice(list(ROUNDINGS)),
    help="How to choose codes: scale-search needs no data; importance-search, gptq and qronos need --calibrate.",
)
@text_options
@click.option(
    "--ragged", type=click.Choice(get_args(Ragged)), help="How to handle rows that groups do not divide evenly."
)
@click.option("--min-elements", type=int, metavar="N", help="Keep smaller tensors, unless a pattern names them.")
@click.option(
    "--embeddings",
    metavar="RULE",
    help="For embeddings: keep, quantize, or a scheme such as int8. By default schemes of up to 4 bits keep them.",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Most bytes in each file of a directory; 5GB by default. A larger tensor has a file of its own.",
)
@format_options
@click.option("--max-memory", metavar="SIZE", help="Most memory to use, such as 2GB, beyond that of the bare program.")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="How many tensors, or pieces of large ones, to convert at a time; by default as many as torch has threads.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan for all tensors, and write nothing.")
@_tensors
@click.option("--no-validate", is_flag=True, help="Do not compare the result with IN.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run, if there is one.")
@click.option("--replace", is_flag=True, help="Replace OUT if it exists. Without --resume: restart an unfinished run.")
@_fail_under
@_quiet
@_json
def quantize(
    source: Path,
    output: Path | None,
    entry: str | None,
    config: Path | None,
    dry_run: bool,
    tensors: bool,
    no_validate: bool,
    replace: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    r"""Write a smaller copy of the checkpoint IN, and compare it with IN.

    IN is a file (safetensors, or a state dict written by torch.save), or a directory of safetensors files.

    A PATTERN matches whole parts of a dotted name: layers.1 matches layers.1.weight, but not layers.10.weight. * and ?
    match within a part.

    \b
    For example, 4 bits for a language model, calibrated and compared with text:
      fewbits quantize DIR -o OUT --scheme int4 --rounding qronos --calibrate text.txt --evaluate other.txt

    Under torchrun, every process writes some of the files of a directory.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    given = {name: options.pop(name) for name in ("max_shard_size", "max_memory", "threads", "resume")}
    text = TextOptions.taken_from(options)
    export = Export.taken_from(options, output, replace=replace, max_shard_size=given["max_shard_size"])
    settings = merge_settings(config, options)
    rank = join_group()
    text.check(settings, rank, validate=not no_validate)
    given["distributed"] = rank is not None
    target = Output.beside(source, **given) if output is None else Output(output, replace=replace, **given)
    if export is not None:
        export.check(source, entry, settings, rank, resume=target.resume)
        target = attrs.evolve(target, path=export.work)
    if dry_run:
        planned = plan(source, entry=entry, config=settings, output=target, model=text.checked_model(source))
        if not rank:
            show_plan(planned, settings, tensors, as_json)
        return SUCCESS
    link, there = os.path.islink(target.path), os.path.exists(target.path)
    # A directory would be refused as well, but only after the data has run through the model.
    taken = link or os.path.isfile(target.path) or (text.loads_model and _has_files(target.path))
    if not replace and taken and not (target.resume and there):
        raise ArgumentError(f"{target.path} exists; pass --replace to replace it, or choose another OUT")
    with shown_progress(as_json=as_json, quiet=quiet or bool(rank)) as progress:
        result = quantize_source(
            source,
            entry=entry,
            config=settings,
            output=target,
            **text.arguments(source, progress),
            validate=not no_validate,
            on_failure="ignore",  # the summary and the exit code report failures
            progress=progress,
        )
        exported = None if export is None else export.finish(progress)
    if not rank:
        show_result(result, target.path, settings, tensors, as_json, exported)
    return SUCCESS if result.report is None or result.report.ok else FAILED


@cli.command(short_help="Show the contents of a result.")
@click.argument("file", metavar="FILE", type=_path)
@_tensors
@_json
def inspect(file: Path, tensors: bool, as_json: bool) -> int:
    """Show the contents of a FILE, or a directory, that fewbits or another tool quantized."""
    show_contents(file, open_quantized(file), tensors, as_json)
    return SUCCESS


@cli.command(short_help="Check a result, and compare it with its source.")
@click.argument("file", metavar="FILE", type=_path)
@click.option("--against", type=_path, metavar="SOURCE", help="The checkpoint from which FILE was made.")
@_entry
@_tensors
@_fail_under
@_quiet
@_json
def verify(file: Path, against: Path | None, tensors: bool, quiet: bool, as_json: bool, **options: Any) -> int:
    """Check digests and structure of a FILE or directory that fewbits wrote, and each element against SOURCE.

    FILE may also be a checkpoint of another tool, such as compressed-tensors, GPTQ or AWQ; these have no digests.
    """
    given = {name: value for name, value in options.items() if value is not None}
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        report = verify_file(file, against, progress=progress, **given)
    if as_json:
        print_json(**report.to_dict())
    else:
        show(report, tensors)
    return SUCCESS if report.ok else FAILED


cli.add_command(convert_command, "convert")
cli.add_command(report_command, "report")


def run() -> int:
    """Run the command line, and print an error of fewbits as one paragraph without a traceback.

    Returns:
        the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some names of tensors and files cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    stdout, stderr, as_json = Stdout(sys.stdout), Stderr(own_rank()), is_json_asked_for(sys.argv[1:])
    with warnings_as_events(stderr) if as_json else nullcontext(), redirect_stdout(stdout):
        try:
            code: int = cli(standalone_mode=False)
        except (click.exceptions.Abort, click.ClickException, FewbitsError) as error:
            code = FAILED if isinstance(error, DigestError) else BAD_USAGE
            stderr.complain(error, code, as_json=as_json)
        stdout.flush()
        return code if stdout.error is None else _unwritten(stdout.error, code, stderr, as_json)


def _unwritten(error: OSError, code: int, stderr: Stderr, as_json: bool) -> int:
    """Return the exit code of a command that could not print its result: its own code, unless that is success."""
    if error.errno == errno.EPIPE:
        return code or NOT_READ
    done = "" if code else "; everything else succeeded"
    code = code or BAD_USAGE
    failure = OSError(f"standard output cannot be written: {error.strerror or error}{done}")
    stderr.complain(failure, code, as_json=as_json)
    return code


def _has_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
