"""The options of ``fewbits quantize`` for calibration and evaluation with text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import click
from torch import nn

from fewbits.cli.help import options_under
from fewbits.cli.options import CALIBRATION
from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.integrations.transformers_calibration import EVALUATION_SAMPLES, SAMPLES, SEQUENCE, Windows, load_directory
from fewbits.rounding import ROUNDINGS
from fewbits.selection.progress import Progress
from fewbits.validation.outputs import check_limits
from fewbits.validation.report import Report

_Command = TypeVar("_Command", bound=Callable[..., object])

_option = options_under(CALIBRATION)
_OPTIONS = (
    _option(
        "--calibrate",
        "text",
        metavar="TEXT",
        type=click.Path(),
        help="Text to run through the model: a file, a directory of text files, or self, for text that the model "
        "writes. It is the data for --rounding. IN is the directory of a transformers model.",
    ),
    _option(
        "--evaluate",
        metavar="TEXT",
        type=click.Path(),
        help="Compare the outputs of the result and of IN on other text than that of --calibrate: a text file, or a "
        "directory of text files. IN is the directory of a transformers model.",
    ),
    _option(
        "--limit",
        "limits",
        multiple=True,
        metavar="METRIC=FIGURE",
        help="Fail if --evaluate finds a worse figure: at most for kl and perplexity, at least for top1, cosine and "
        "sqnr; such as kl=0.05. Repeatable.",
    ),
    _option("--samples", type=int, metavar="N", help=f"Windows of text for --calibrate; {SAMPLES} by default."),
    _option(
        "--evaluation-samples",
        type=int,
        metavar="N",
        help=f"Windows of text for --evaluate; {EVALUATION_SAMPLES} by default.",
    ),
    _option("--sequence", type=int, metavar="N", help=f"Tokens in each window; {SEQUENCE} by default."),
    _option(
        "--spill",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep the activations of --calibrate in temporary files in DIR.",
    ),
    _option(
        "--tune",
        type=click.IntRange(1),
        metavar="EPOCHS",
        help="Tune the scales with the text of --calibrate, in so many EPOCHS.",
    ),
)


def text_options(command: _Command) -> _Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@attrs.frozen
class TextOptions:
    """The options for calibration and evaluation; None for an option that is not given."""

    text: str | None
    evaluate: str | None
    limits: tuple[str, ...]
    samples: int | None
    evaluation_samples: int | None
    sequence: int | None
    spill: Path | None
    tune: int | None

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> TextOptions:
        """Take these options out of all options."""
        return cls(**{field.name: options.pop(field.name) for field in attrs.fields(cls)})

    @property
    def loads_model(self) -> bool:
        """Whether the model is loaded to run text."""
        return self.text is not None or self.evaluate is not None

    def check(self, settings: QuantizationConfig, rank: int | None, *, validate: bool) -> None:
        """Refuse options that have no effect, and several processes.

        Raises:
            UsageError: naming the option.
            ArgumentError: for a limit that is no limit.
        """
        if self.text is None:
            self._refuse(("samples", "spill", "tune"), "--calibrate TEXT")
        if self.evaluate is None:
            self._refuse(("limits", "evaluation_samples"), "--evaluate TEXT")
        if not self.loads_model:
            self._refuse(("sequence",), "--calibrate TEXT or --evaluate TEXT")
        if self.evaluate is not None and not validate:
            raise click.UsageError("--evaluate is part of the validation, which --no-validate turns off.")
        if self.text is not None and self.tune is None and settings.quantizer().rounding.needs == "nothing":
            needing = " or ".join(name for name, rounding in ROUNDINGS.items() if rounding.needs != "nothing")
            raise click.UsageError(f"--calibrate needs a strategy that looks at data: --rounding {needing}; or --tune.")
        if self.loads_model and rank is not None:
            name = "--evaluate" if self.text is None else "--calibrate"
            raise click.UsageError(f"{name} runs in one process; start it without torchrun.")
        check_limits(self._limits())

    def _refuse(self, names: Sequence[str], needed: str) -> None:
        for name in names:
            if getattr(self, name) not in (None, ()):
                option = {"limits": "limit"}.get(name, name).replace("_", "-")
                raise click.UsageError(f"--{option} needs {needed}.")

    def checked_model(self, source: Path) -> nn.Module | None:
        """Read the text as a run would, and return the model to run it with; None without text."""
        if not self.loads_model:
            return None
        loaded = load_directory(source)
        self._windows().check(loaded)
        return loaded.model

    def arguments(self, source: Path, progress: Progress) -> dict[str, Any]:
        """Return the arguments of `fewbits.quantize` for calibration and evaluation."""
        if not self.loads_model:
            return {}
        windows = self._windows()
        given = windows.arguments(load_directory(source), progress)
        return given | {"spill": self.spill, "tune": self.tune, "limits": self._limits() or None}

    def missed(self, report: Report) -> bool:
        """Whether the outputs of the model missed a limit."""
        return report.model is not None and any(report.model.failures(self._limits()))

    def _windows(self) -> Windows:
        how = {name: getattr(self, name) for name in ("samples", "evaluation_samples", "sequence")}
        given = {name: value for name, value in how.items() if value is not None}
        return Windows(self.text, self.evaluate, **given)

    def _limits(self) -> dict[str, float]:
        return dict(map(_limit, self.limits))


def _limit(option: str) -> tuple[str, float]:
    """Split ``METRIC=FIGURE``."""
    name, _, figure = option.partition("=")
    try:
        return name, float(figure)
    except ValueError:
        raise ArgumentError(f"--limit {option}: write METRIC=FIGURE, such as kl=0.05 or top1=0.9") from None
