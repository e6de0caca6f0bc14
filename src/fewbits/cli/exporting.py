"""The options of ``fewbits quantize`` and ``fewbits convert`` for the formats of other tools."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import click

from fewbits.api import plan
from fewbits.checkpoint.publishing import remove_tree
from fewbits.cli.help import options_under
from fewbits.cli.options import OUTPUT, PATH, format_option
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.exporting import Exported, check_export, convert, exporter_named
from fewbits.errors import ArgumentError
from fewbits.formats.base import Exporter
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress

_Command = TypeVar("_Command", bound=Callable[..., object])

_output = options_under(OUTPUT)

#: Settings of exporters, besides the size of shards.
_SETTINGS = (
    _output("--allow", is_flag=True, help="Write tensors too that readers of the format may not take."),
    _output(
        "--template",
        metavar="FILE",
        type=PATH,
        help="For gguf: a GGUF file of the same model, best not quantized.",
    ),
)


def exporter_settings(command: _Command) -> _Command:
    """Add the settings of exporters to the options of a command."""
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


def format_options(command: _Command) -> _Command:
    """Add ``--format`` and the settings of exporters to the options of a command."""
    options: _Command = format_option(required=False)(exporter_settings(command))
    return options


@attrs.frozen
class _Planned:
    """A quantized checkpoint before it exists."""

    path: Path
    ledger: Ledger


@attrs.frozen
class Export:
    """Writes the result of ``fewbits quantize`` in the format of another tool.

    The quantized checkpoint is written to a hidden place beside the output, and converted from there.

    Attributes:
        exporter: writes the output.
        path: the output; None for a plan without one.
        replace: whether to replace an existing output, and an unfinished run.
    """

    exporter: Exporter
    path: Path
    replace: bool

    @classmethod
    def taken_from(
        cls, options: dict[str, Any], output: Path | None, *, replace: bool, max_shard_size: str | None
    ) -> Export | None:
        """Take the options for an export out of all options; None without ``--format``.

        Raises:
            UsageError: for a setting of exporters without ``--format``, or a format without an output.
        """
        name = options.pop("name")
        settings = {setting: options.pop(setting) for setting in _setting_names()}
        given = {setting: value for setting, value in settings.items() if value}
        if name is None:
            if given:
                raise click.UsageError(f"--{min(given).replace('_', '-')} needs --format.")
            return None
        if output is None:
            raise click.UsageError("--format needs '-o' / '--output'.")
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        return cls(exporter_named(name, **given, **shards), output, replace)

    @property
    def work(self) -> Path:
        """The place of the quantized checkpoint."""
        target = Path(os.path.realpath(self.path))
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
        return target.parent / f".fewbits-{digest}.quantized"

    def check(
        self, source: Path, entry: str | None, settings: QuantizationConfig, rank: int | None, *, resume: bool
    ) -> None:
        """Refuse an export before anything is quantized.

        Raises:
            UsageError: if several processes quantize.
            FewbitsError: the errors of `fewbits.plan`, and those of `fewbits.convert` that need no weights.
        """
        if rank is not None:
            raise click.UsageError("--format runs in one process; start it without torchrun.")
        # Rounding strategies change codes, but not which codes a format can hold.
        planned = plan(source, entry=entry, config=settings.replace(rounding=None), output=self.work)
        check_export(_Planned(source, planned.ledger), self.path, self.exporter, replace=self.replace)
        if self.work.exists() and not resume and not self.replace:
            raise ArgumentError(
                f"an earlier run began {self.path} and did not finish; its quantized checkpoint is {self.work}. "
                "Continue it (--resume), or start over (--replace)"
            )

    def finish(self, progress: Progress) -> Exported:
        """Convert the quantized checkpoint, and remove it. After an error it stays, for ``--resume``."""
        try:
            exported = convert(self.work, self.path, self.exporter, replace=self.replace, progress=progress)
        except KeyboardInterrupt as stop:
            stop.args = stop.args or ("interrupted; the quantized weights are kept: continue with --resume",)
            raise
        if self.work.is_dir():
            remove_tree(self.work, "the quantized checkpoint cannot be removed")
        else:
            self.work.unlink()
        return exported


def _setting_names() -> list[str]:
    command = exporter_settings(click.Command("settings"))
    return [parameter.name for parameter in command.params if parameter.name is not None]
