"""``fewbits allocate``: choose a scheme for every tensor under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fewbits.checkpoint.publishing import check_document, publish_document
from fewbits.cli.help import Command, options_under
from fewbits.cli.options import (
    CALIBRATION,
    HEADINGS,
    HOW,
    OUTPUT,
    PATH,
    WHAT,
    complete_rule,
    config_option,
    entry_option,
    in_argument,
    json_option,
    quiet_option,
    replace_option,
    tensors_option,
)
from fewbits.cli.printing import print_json, terminal_width
from fewbits.cli.progress import shown_progress
from fewbits.cli.settings import rule_of
from fewbits.config.config import QuantizationConfig
from fewbits.config.writing import SUFFIXES
from fewbits.integrations.transformers_calibration import SAMPLES, SEQUENCE, Windows, load_directory
from fewbits.planning.allocate import allocate
from fewbits.planning.allocation import Allocation
from fewbits.validation.tensors import CRITICAL_DB

_what, _how, _calibration, _output = map(options_under, (WHAT, HOW, CALIBRATION, OUTPUT))

_EXAMPLES = (
    (
        "a language model, by what its outputs lose",
        "fewbits allocate DIR -o plan.toml --bits-per-weight 4.5 --calibrate text.txt",
    ),
    ("then write it", "fewbits quantize DIR -o OUT --config plan.toml --rounding qronos --calibrate text.txt"),
    ("any checkpoint, without data", "fewbits allocate model.safetensors -o plan.toml --target-size 90MB"),
    (
        "with schemes that servers read",
        "fewbits allocate DIR -o plan.toml --bits-per-weight 5 --candidate int4:64 --candidate int8",
    ),
)


@click.command(
    cls=Command, headings=HEADINGS, examples=_EXAMPLES, short_help="Choose a scheme for every tensor under a budget."
)
@in_argument
@entry_option
@_what("--untied", is_flag=True, help="Allow query, key and value, or gate and up, to get different schemes.")
@_how("--bits-per-weight", type=float, metavar="N", help="Budget: the bits of all tensors over all elements.")
@_how("--target-size", metavar="SIZE", help="Budget: the bytes of all tensors, such as 2GB.")
@_how("--max-kl", type=float, metavar="NATS", help="Budget: the predicted KL; it needs --calibrate.")
@_how("--min-sqnr", type=float, metavar="DB", help="The least SQNR of every weight; alone, or with a budget.")
@_how(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="SCHEME",
    shell_complete=complete_rule,
    help="A scheme to choose from: int8, int4:64 (groups of 64), nf4:32:6 (scales of 6 bits), or keep. Repeatable; by "
    "default six schemes from 2 to 8 bits, and keep.",
)
@config_option
@_calibration(
    "--calibrate",
    "text",
    metavar="TEXT",
    type=click.Path(),
    help="Text to run through the model: a file, a directory of text files, or self, for text that the model writes. "
    "Its gradients predict what the outputs lose. IN is the directory of a transformers model.",
)
@_calibration("--samples", type=int, metavar="N", help=f"Windows of text for --calibrate; {SAMPLES} by default.")
@_calibration("--sequence", type=int, metavar="N", help=f"Tokens in each window; {SEQUENCE} by default.")
@_output(
    "-o",
    "--output",
    metavar="OUT",
    type=PATH,
    required=True,
    help="Where to write. OUT holds settings; its name ends in .toml or .json.",
)
@_output(
    "--curve",
    type=PATH,
    metavar="FILE",
    help="The error for every size. Its name ends in .json for data, in .svg for a drawing.",
)
@replace_option
@tensors_option
@quiet_option
@json_option
def allocate_command(
    source: Path,
    output: Path,
    config: Path | None,
    curve: Path | None,
    candidates: tuple[str, ...],
    tensors: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Choose a scheme for every tensor of the checkpoint IN, so that the error is least under a budget.

    OUT can be read and edited, and is the --config of fewbits quantize. The size of the result is known to the byte.
    """
    replace = options.pop("replace")
    check_document(output, SUFFIXES, replace=replace)
    if curve is not None:
        check_document(curve, (".svg", ".json"), replace=replace)
    text = {name: options.pop(name) for name in ("text", "samples", "sequence")}
    if options.pop("untied"):
        options["together"] = []
    if config is not None:
        options["config"] = QuantizationConfig.from_file(config)
    if candidates:
        options["candidates"] = [rule_of(f"--candidate {candidate}", candidate) for candidate in candidates]
    with shown_progress(as_json=as_json, quiet=quiet) as progress:
        data = _data(source, progress, **text)
        allocation = allocate(source, progress=progress, **data, **options)
    allocation.save(output, replace=replace)
    if curve is not None:
        drawn = allocation.curve.to_svg() if curve.suffix.lower() == ".svg" else allocation.curve.to_json() + "\n"
        publish_document(curve, drawn)
    if as_json:
        print_json(output=str(output), **allocation.to_dict())
        return 0
    if tensors:
        click.echo(allocation.table(terminal_width()))
    click.echo(allocation.summary())
    click.echo(f"written: {output}; use it with: {_next_command(allocation, source, output, text['text'])}")
    return 0


def _next_command(allocation: Allocation, source: Path, output: Path, text: str | None) -> str:
    """Return the command that quantizes with the settings, and a rounding strategy that suits them."""
    command = f"fewbits quantize {source} -o OUT --config {output}"
    if text is not None:
        return f"{command} --rounding qronos --calibrate {text}"
    least = min((one.sqnr_db for one in allocation.weights if one.sqnr_db is not None), default=CRITICAL_DB)
    return f"{command} --rounding scale-search" if least < CRITICAL_DB else command


def _data(source: Path, progress: Any, text: str | None, samples: int | None, sequence: int | None) -> dict[str, Any]:
    """Return the arguments of `allocate` for text."""
    if text is None:
        if samples is not None or sequence is not None:
            raise click.UsageError(f"--{'sequence' if samples is None else 'samples'} needs --calibrate TEXT.")
        return {}
    windows = Windows(
        text,
        samples=SAMPLES if samples is None else samples,
        sequence=SEQUENCE if sequence is None else sequence,
    )
    return windows.arguments(load_directory(source), progress)
