"""Every exception that fewbits raises on purpose, in one tree.

::

    FewbitsError
    ├── ArgumentError          (ValueError)      an argument that is not allowed
    ├── StateError             (RuntimeError)    a lifecycle call out of order
    ├── SelectionError         (ValueError)      a pattern that matches nothing, a rule that contradicts another
    ├── SourceError            (ValueError)      a model or checkpoint that cannot be quantized
    ├── CalibrationError       (RuntimeError)    calibration data that is missing, or that the model cannot run
    ├── NumericsError          (ArithmeticError) numbers that no code can represent
    │   ├── NonFiniteError                       NaN or Inf in a tensor
    │   └── RangeError                           a scale or a value beyond the range of its dtype
    ├── ReadOnlyWeightError    (AttributeError)  an attempt to assign to a quantized weight
    ├── CheckpointError        (OSError)         a file that cannot be read or written
    │   ├── FormatError                          not a file of fewbits, or a damaged one
    │   ├── DigestError                          bytes that have changed since they were written
    │   └── MismatchError                        a file and a model that do not match
    ├── RankError              (RuntimeError)    another process of the same run has failed
    └── ValidationError        (RuntimeError)    the result is wrong or inaccurate; carries the report
"""

from __future__ import annotations

from typing import Any


class FewbitsError(Exception):
    """The base of every exception in this library.

    Attributes:
        result: the finished `fewbits.Result`, if `fewbits.quantize` raises the error after the conversion, while it
            tunes or validates; otherwise None.
    """

    result: Any = None


class ArgumentError(FewbitsError, ValueError):
    """An argument has a value that is not allowed."""


class StateError(FewbitsError, RuntimeError):
    """A lifecycle method was called in a state that does not allow it; the call changed nothing."""


class SelectionError(FewbitsError, ValueError):
    """A selection rule matches nothing or contradicts another rule."""


class SourceError(FewbitsError, ValueError):
    """A model or checkpoint cannot be quantized."""


class CalibrationError(FewbitsError, RuntimeError):
    """Calibration data is missing, or the model cannot run it."""


class NumericsError(FewbitsError, ArithmeticError):
    """A tensor holds numbers that cannot be quantized."""


class NonFiniteError(NumericsError):
    """A tensor holds NaN or Inf."""


class RangeError(NumericsError):
    """A scale or a value lies beyond the largest number of the dtype it must be stored in."""


class ReadOnlyWeightError(FewbitsError, AttributeError):
    """A quantized weight was assigned to; it is read-only."""


class CheckpointError(FewbitsError, OSError):
    """A checkpoint cannot be read or written."""


class FormatError(CheckpointError):
    """A file is not in the expected format, or its parts contradict one another."""


class DigestError(CheckpointError):
    """The bytes of a tensor do not have the digest that was recorded when they were written."""


class MismatchError(CheckpointError):
    """A checkpoint does not match the model it is loaded into."""


class RankError(FewbitsError, RuntimeError):
    """Another process that works on the same result has failed; its own error says why."""


class ValidationError(FewbitsError, RuntimeError):
    """Validation found a failure.

    Attributes:
        report: the `fewbits.Report` with every finding.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.report)
