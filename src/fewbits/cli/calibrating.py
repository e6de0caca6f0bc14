"""The options of ``fewbits quantize`` for calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import click
from torch import nn

from fewbits.config.config import QuantizationConfig
from fewbits.integrations.transformers_calibration import SAMPLES, SEQUENCE, load_directory
from fewbits.rounding import ROUNDINGS
from fewbits.selection.progress import Progress

_Command = TypeVar("_Command", bound=Callable[..., object])

_OPTIONS = (
    click.option(
        "--calibrate",
        "text",
        metavar="TEXT",
        help="Data for --rounding: a text file, a directory of text files, or self, for text that the model writes. "
        "IN is the directory of a transformers model.",
    ),
    click.option("--samples", type=int, metavar="N", help=f"Windows of text for --calibrate; {SAMPLES} by default."),
    click.option("--sequence", type=int, metavar="N", help=f"Tokens in each window; {SEQUENCE} by default."),
    click.option(
        "--spill",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Keep the activations of --calibrate in temporary files in DIR.",
    ),
    click.option(
        "--tune",
        type=click.IntRange(1),
        metavar="EPOCHS",
        help="Tune the scales with the text of --calibrate, so many times over.",
    ),
)


def calibration_options(command: _Command) -> _Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@attrs.frozen
class Calibration:
    """The options for calibration; None for an option that is not given."""

    text: str | None
    samples: int | None
    sequence: int | None
    spill: Path | None
    tune: int | None

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Calibration:
        """Take the options for calibration out of all options."""
        return cls(**{field.name: options.pop(field.name) for field in attrs.fields(cls)})

    def check(self, settings: QuantizationConfig, rank: int | None) -> None:
        """Refuse options that have no effect, and several processes.

        Raises:
            UsageError: naming the option.
        """
        unused = [name for name in ("samples", "sequence", "spill", "tune") if getattr(self, name) is not None]
        if self.text is None and unused:
            raise click.UsageError(f"--{unused[0]} needs --calibrate TEXT.")
        if self.text is not None and settings.quantizer().rounding.needs == "nothing":
            needing = " or ".join(name for name, rounding in ROUNDINGS.items() if rounding.needs != "nothing")
            raise click.UsageError(f"--calibrate needs a strategy that looks at data: --rounding {needing}.")
        if self.text is not None and rank is not None:
            raise click.UsageError("--calibrate runs in one process; start it without torchrun.")

    def model(self, source: Path) -> nn.Module | None:
        """Return the model to calibrate with; None without calibration."""
        return None if self.text is None else load_directory(source).model

    def arguments(self, source: Path, progress: Progress) -> dict[str, Any]:
        """Return the arguments of `fewbits.quantize` for calibration."""
        if self.text is None:
            return {}
        how = {"samples": self.samples, "sequence": self.sequence}
        given = {name: value for name, value in how.items() if value is not None}
        loaded = load_directory(source)
        data = loaded.windows(self.text, progress=progress, **given)
        return {"model": loaded.model, "data": data, "samples": None, "spill": self.spill, "tune": self.tune}
