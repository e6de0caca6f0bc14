"""Advice after a poor result of ``fewbits quantize``: one line that fits the options of the run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

from fewbits.config.config import QuantizationConfig
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.numerics.spec import QuantSpec
from fewbits.rounding import RoundToNearest
from fewbits.validation.report import Report
from fewbits.validation.tensors import WARNING_DB

#: Smaller groups spend more on scales than on the quality of codes.
_LEAST_GROUP = 32

#: For each scheme the next one that loses less, in about the same bytes if there is such a one.
_BETTER = {
    "int2": "int3",
    "int3": "int4",
    "int4": "nf4",
    "mxfp4": "nf4",
    "nf4": "int5",
    "int5": "int6",
    "int6": "int7",
    "int8-tensor": "int8",
    "int8": "fp16",
    "fp8": "fp16",
}

#: Schemes whose scales and codes leave nothing to search for.
_PLAIN = ("mxfp4", "int8-tensor", "int8", "fp8")


@attrs.frozen
class Advisor:
    """Knows the options of a run.

    Attributes:
        source: the checkpoint that was quantized.
        settings: the settings of the quantization.
        calibrated: whether text ran through the model to choose codes.
        format: the name of another tool's format that was written; None for that of fewbits.
    """

    source: Path
    settings: QuantizationConfig
    calibrated: bool = False
    format: str | None = None

    def advice(self, report: Report, *, missed: bool = False) -> str | None:
        """Advise on the next run.

        Args:
            report: the report on the result.
            missed: whether the outputs of the model missed a limit.

        Returns:
            an option with a reason; None if the result is not poor, or no option helps.
        """
        judged = sorted(
            (t.deciding[0], t.name, t.spec, t.verdict)
            for t in report.tensors
            if t.deciding is not None and isinstance(t.spec, QuantSpec)
        )
        poor = [found for found in judged if found[3] in ("warning", "critical")]
        if not poor and not (missed and judged):
            return None
        _, name, spec, _ = judged[0]
        if poor and (len(poor) == 1 < len(judged) or not self._is_own(spec)):
            better = "int8" if spec.bits < 8 else "fp16"
            limit = max(WARNING_DB, self.settings.fail_under)
            reason = f"it alone is below {limit:g} dB" if len(poor) == 1 else "it has the lowest SQNR"
            return f"--override {_pattern(name)}={better}, because {reason}"
        return self._for_all(spec)

    def _is_own(self, spec: QuantSpec) -> bool:
        """Whether a tensor is stored as the scheme says, not as an override or a fallback says."""
        own = self.settings.quantizer().spec
        return isinstance(own, QuantSpec) and _kind(spec) == _kind(own)

    def _for_all(self, spec: QuantSpec) -> str | None:
        scheme = self.settings.scheme
        if scheme not in _PLAIN and (strategy := self._rounding()):
            return strategy
        if spec.group_size is not None and spec.group_size > _LEAST_GROUP and scheme != "mxfp4":
            return f"--group-size {max(spec.group_size // 2, _LEAST_GROUP)}, because scales fit smaller groups better"
        if self.format in (None, FewbitsFormat.name) and (better := _BETTER.get(scheme)):
            return f"--scheme {better}, which often loses less than {scheme}"
        return None

    def _rounding(self) -> str | None:
        if not self.calibrated and _is_transformers(self.source):
            return "--calibrate TEXT --rounding qronos, which fits codes to the inputs of layers"
        if isinstance(self.settings.quantizer().rounding, RoundToNearest):
            strategy = "qronos" if self.calibrated else "scale-search"
            return f"--rounding {strategy}, which loses less than plain rounding at the same size"
        return None


def _kind(spec: QuantSpec) -> tuple[object, ...]:
    return spec.bits, spec.granularity, spec.levels


def _pattern(name: str) -> str:
    """Return a pattern for exactly this name, which a shell leaves alone."""
    is_plain = re.fullmatch(r"[^.*?]+(\.[^.*?]+)*", name) and not name.startswith("re:")
    return shlex.quote(name if is_plain else f"re:{re.escape(name)}")


def _is_transformers(path: Path) -> bool:
    """Whether a directory has the files that calibration with text needs."""
    return (path / "config.json").is_file() and any(path.glob("tokenizer*"))
