"""Print plans, results and contents: summaries and tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from fewbits.api import Plan, Result
from fewbits.checkpoint.reading import Checkpoint
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.exporting import Exported
from fewbits.conversion.file_writer import Share
from fewbits.formats.base import ForeignCheckpoint
from fewbits.selection.ledger import Ledger
from fewbits.validation.report import Report
from fewbits.validation.tensors import finite

#: The first words of lines that have a color.
_COLORS = {"passed": "green", "FAILED": "red", "failure": "red", "warning": "yellow"}


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    # A stream that was closed at the start is None.
    return sys.stdout is not None and sys.stdout.isatty()


def terminal_width() -> int | None:
    """Return the columns of the terminal; None without one."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def print_json(**fields: Any) -> None:
    """Print a JSON object."""
    click.echo(json.dumps(fields, indent=2, allow_nan=False))


def show(found: Ledger | Report, tensors: bool, *, advised: bool = False) -> None:
    """Print a summary and, if `tensors`, a line for every tensor. A pipe gets full names.

    Args:
        found: the ledger or the report.
        tensors: whether to print a line for every tensor.
        advised: whether advice on the run follows; then a report does not give its own.
    """
    width = terminal_width()
    if tensors:
        click.echo(found.table(width))
    lines = found.summary(width or 80, advise=not advised) if isinstance(found, Report) else found.summary(width or 80)
    click.echo("\n".join(map(_colored, lines.splitlines())))


def show_plan(planned: Plan, settings: QuantizationConfig, tensors: bool, as_json: bool) -> None:
    """Print the plan of a conversion."""
    shards = [{"file": shard.file, "bytes": shard.ledger.bytes_after} for shard in planned.shards]
    if as_json:
        about: dict[str, Any] = {"left_behind": planned.left_behind, "opens_in": planned.opens_in}
        print_json(config=settings.to_dict(), shards=shards, **about, ledger=planned.ledger.to_dict())
        return
    show(planned.ledger, tensors)
    for shard in shards:
        click.echo(f"{shard['file']}: {shard['bytes']:,} bytes of tensors")
    _tell("left behind: ", ", ".join(planned.left_behind))
    _tell("it ", planned.opens_in)
    click.echo("nothing was written: --dry-run")


def show_result(
    result: Result,
    path: Path,
    settings: QuantizationConfig,
    tensors: bool,
    as_json: bool,
    exported: Exported | None = None,
    advice: str | None = None,
) -> None:
    """Print the result of a conversion.

    Args:
        result: the quantized checkpoint.
        path: its path.
        settings: the settings of the quantization.
        tensors: whether to print a line for every tensor.
        as_json: print JSON.
        exported: the same checkpoint in the format of another tool, which is then the output.
        advice: the advice on the next run.
    """
    report, quantizer = result.report, result.quantizer
    if as_json:
        about: dict[str, Any] = {"output": str(exported.path if exported else path), "config": settings.to_dict()}
        about |= {"left_behind": quantizer.left_behind, **_work(quantizer.shares)}
        about |= {"exported": exported_fields(exported)} if exported else {"opens_in": quantizer.opens_in}
        about |= {"advice": advice}
        print_json(**about, ledger=result.ledger.to_dict(), report=report and report.to_dict())
        return
    show(result.ledger, tensors)
    _tell("left behind: ", ", ".join(quantizer.left_behind))
    _tell_work(quantizer.shares)
    if report is None:
        click.echo("not validated: --no-validate")
    else:
        show(report, tensors, advised=advice is not None)
    if exported is not None:
        click.echo(exported_summary(exported))
    else:
        click.echo(f"written{'' if report is None or report.ok else ', though it failed'}: {path}")
        _tell("it ", quantizer.opens_in)
    _tell("to try next: ", advice)


def exported_fields(exported: Exported) -> dict[str, Any]:
    """Describe an export for JSON."""
    return attrs.asdict(exported) | {"path": str(exported.path)}


def exported_summary(exported: Exported) -> str:
    """Describe an export in lines of text."""
    tensors = f"{exported.quantized:,} quantized and {exported.kept:,} other tensors"
    line = f"{exported.path} ({exported.format}): {tensors}, {exported.nbytes:,} bytes, read back and equal"
    return "\n".join([line, *(f"allowed: {name} {reason}" for name, reason in exported.remarks.items())])


def show_contents(file: Path, checkpoint: Checkpoint | ForeignCheckpoint, tensors: bool, as_json: bool) -> None:
    """Print the contents of a quantized checkpoint."""
    if isinstance(checkpoint, ForeignCheckpoint):
        _show_foreign(file, checkpoint, tensors, as_json)
        return
    metadata = checkpoint.metadata
    if as_json:
        about = {"file": str(file), "versions": dict(metadata.versions), "architecture": metadata.architecture}
        figures = {name: metrics.to_dict() for name, metrics in metadata.metrics.items()}
        outputs = {name: finite(figure) for name, figure in metadata.output_sqnr_db.items()}
        of_data = {"model_metrics": dict(metadata.model_metrics), "output_sqnr_db": outputs}
        print_json(**about, ledger=checkpoint.ledger.to_dict(), metrics=figures, **of_data)
        return
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    _tell(f"{file}: ", f"written by {versions}; architecture {metadata.architecture or 'not known'}")
    show(checkpoint.ledger, tensors)
    measured = [f"{name} {figure:.6g}" for name, figure in metadata.model_metrics.items() if figure is not None]
    _tell("the model's outputs, compared with the float model's: ", ", ".join(measured))
    if found := metadata.output_sqnr_db:
        name = min(found, key=found.__getitem__)
        _tell("", f"output SQNR of {len(found)} weights on data: least {found[name]:.2f} dB ({name})")


def _show_foreign(file: Path, checkpoint: ForeignCheckpoint, tensors: bool, as_json: bool) -> None:
    if as_json:
        about = {"file": str(file), "format": checkpoint.format, "about": list(checkpoint.about)}
        print_json(**about, ledger=checkpoint.ledger.to_dict())
        return
    _tell(f"{file}: ", "; ".join(checkpoint.about))
    show(checkpoint.ledger, tensors)


def _tell(prefix: str, text: str | None) -> None:
    """Print a sentence, unless its text is missing."""
    if text:
        lines = textwrap.wrap(
            prefix + text,
            terminal_width() or 80,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        click.echo("\n".join(lines))


def _colored(line: str) -> str:
    """Color the verdict at the beginning of a line, on a terminal and without ``NO_COLOR``."""
    verdict, colon, rest = line.partition(":")
    if verdict not in _COLORS or not is_terminal() or os.environ.get("NO_COLOR"):
        return line
    return click.style(verdict, fg=_COLORS[verdict]) + colon + rest


def _work(shares: Sequence[Share]) -> dict[str, Any]:
    """Count the converted bytes of the source, in all and per rank."""
    return {
        "converted": {"bytes": sum(s.converted for s in shares), "resumed_bytes": sum(s.resumed for s in shares)},
        "ranks": [
            {"rank": rank, "bytes": share.converted + share.resumed, "converted": share.converted, "files": share.files}
            for rank, share in enumerate(shares)
        ],
    }


def _tell_work(shares: Sequence[Share]) -> None:
    if resumed := sum(share.resumed for share in shares):
        how_much = "" if any(share.converted for share in shares) else "all "
        _tell("resumed: ", f"{how_much}{resumed:,} bytes of IN had been converted by an earlier run")
    for rank, share in enumerate(shares if len(shares) > 1 else ()):
        click.echo(f"rank {rank}: {share.converted + share.resumed:,} bytes of IN in {len(share.files)} files")
