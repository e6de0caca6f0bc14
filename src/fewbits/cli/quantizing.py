"""``fewbits quantize``: write a smaller copy of a checkpoint, and compare it with the source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import attrs
import click

from fewbits.api import plan
from fewbits.api import quantize as quantize_source
from fewbits.checkpoint.output import Output
from fewbits.cli.advising import Advisor
from fewbits.cli.calibrating import TextOptions, text_options
from fewbits.cli.exporting import Export, format_options
from fewbits.cli.help import Command, one_of, options_under
from fewbits.cli.options import (
    HEADINGS,
    HOW,
    OUTPUT,
    PATH,
    RUNNING,
    WHAT,
    complete_rule,
    config_option,
    entry_option,
    fail_under_option,
    in_argument,
    json_option,
    max_shard_size_option,
    quiet_option,
    replace_option,
    tensors_option,
)
from fewbits.cli.printing import show_plan, show_result
from fewbits.cli.progress import shown_progress
from fewbits.cli.ranks import join_group
from fewbits.cli.settings import merge_settings
from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import SCALE_DTYPES, dtype_name
from fewbits.quantizers.scheme import Ragged
from fewbits.rounding import ROUNDINGS
from fewbits.schemes import SCHEMES

_what, _how, _output, _running = map(options_under, (WHAT, HOW, OUTPUT, RUNNING))

_EXAMPLES = (
    ("plan a run, and write nothing", "fewbits quantize model.safetensors --scheme int8 --dry-run"),
    ("8 bits, one file", "fewbits quantize model.safetensors -o small.safetensors --scheme int8"),
    (
        "4 bits in smaller groups, the last layer in 8 bits",
        "fewbits quantize DIR -o OUT --scheme int4 --group-size 32 --override lm_head=int8",
    ),
    (
        "4 bits for a language model, calibrated and compared with text",
        "fewbits quantize DIR -o OUT --scheme nf4 --rounding qronos --calibrate text.txt --evaluate other.txt",
    ),
    ("4 bits for vLLM", "fewbits quantize DIR -o OUT --scheme int4 --group-size 64 --format compressed-tensors"),
    ("continue a run that was interrupted", "fewbits quantize DIR -o OUT --scheme int4 --resume"),
)


@click.command(cls=Command, headings=HEADINGS, examples=_EXAMPLES, short_help="Write a smaller copy of a checkpoint.")
@in_argument
@entry_option
@_what("--include", multiple=True, metavar="PATTERN", help="Quantize only tensors with such names. Repeatable.")
@_what("--exclude", multiple=True, metavar="PATTERN", help="Keep tensors with such names unchanged. Repeatable.")
@_what(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=SCHEME",
    help="Another scheme for tensors with such names: int8, int3:64 (groups of 64), nf4:32:6 (scales of 6 bits), or "
    "keep. Repeatable.",
)
@_what(
    "--embeddings",
    metavar="RULE",
    shell_complete=complete_rule,
    help="For embeddings: keep, quantize, or a scheme such as int8. By default schemes of up to 4 bits keep them.",
)
@_what("--min-elements", type=int, metavar="N", help="Keep smaller tensors, unless a pattern names them.")
@config_option
@_how(
    "--scheme",
    type=click.Choice(list(SCHEMES)),
    metavar="SCHEME",
    help=f"{one_of('How to store weights', SCHEMES)} Required without --config.",
)
@_how("--group-size", type=int, metavar="N", help="Weights that share a scale: 64 by default, 128 for int4.")
@_how(
    "--scale-dtype",
    type=click.Choice([dtype_name(dtype) for dtype in SCALE_DTYPES]),
    metavar="DTYPE",
    help=f"{one_of('Dtype of stored scales', map(dtype_name, SCALE_DTYPES))} By default that of each weight. "
    "float16 halves the scales of a float32 model.",
)
@_how(
    "--scale-bits",
    type=click.IntRange(2, 8),
    metavar="N",
    help="Store the scale of each group as a code of N bits, beside one scale for each row; for schemes with groups.",
)
@_how(
    "--rounding",
    type=click.Choice(list(ROUNDINGS)),
    metavar="STRATEGY",
    help=f"{one_of('How to choose codes', ROUNDINGS)} scale-search needs no data; importance-search, gptq and qronos "
    "need --calibrate.",
)
@_how(
    "--ragged",
    type=click.Choice(get_args(Ragged)),
    metavar="POLICY",
    help=one_of("How to handle rows that groups do not divide evenly", get_args(Ragged)),
)
@text_options
@_output(
    "-o",
    "--output",
    metavar="OUT",
    type=PATH,
    help="Where to write. OUT is a directory if IN is one, or with --max-shard-size. Required without --dry-run.",
)
@max_shard_size_option
@format_options
@replace_option
@_output(
    "--resume", is_flag=True, help="Continue an unfinished run, if there is one. To start over instead: --replace."
)
@_running("--dry-run", is_flag=True, help="Print the plan for all tensors, and write nothing.")
@_running("--max-memory", metavar="SIZE", help="Most memory to use, such as 2GB, beyond that of the bare program.")
@_running(
    "--threads",
    type=int,
    metavar="N",
    help="How many tensors, or pieces of large ones, to convert at a time; by default as many as torch has threads.",
)
@_running("--no-validate", is_flag=True, help="Do not compare the result with IN.")
@fail_under_option
@tensors_option
@quiet_option
@json_option
def quantize_command(
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
    """Write a smaller copy of the checkpoint IN, and compare it with IN.

    IN is a file (safetensors, or a state dict written by torch.save), or a directory of safetensors files.

    A PATTERN matches whole parts of a dotted name: layers.1 matches layers.1.weight, but not layers.10.weight. * and ?
    match within a part.

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
        return 0
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
        advisor = Advisor(source, settings, text.text is not None, None if exported is None else exported.format)
        report = result.report
        advice = None if report is None else advisor.advice(report, missed=text.missed(report))
        show_result(result, target.path, settings, tensors, as_json, exported, advice)
    return 0 if result.report is None or result.report.ok else 1


def _has_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
