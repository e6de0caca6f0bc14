"""`Extremes`: the smallest and the largest number seen."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from fewbits.errors import CalibrationError
from fewbits.numerics.dtypes import dtype_name


@attrs.frozen
class Extremes:
    """The range of the numbers seen.

    Attributes:
        low: the smallest number.
        high: the largest.
    """

    low: float
    high: float

    @classmethod
    def of(cls, x: Tensor) -> Extremes | None:
        """Return the extremes of a tensor; None if it has no elements, or is not floating.

        Raises:
            CalibrationError: if it holds NaN or Inf.
        """
        if not x.is_floating_point() or not x.numel():
            return None
        low, high = (float(end) for end in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise CalibrationError(
                f"an input of shape {tuple(x.shape)} in {dtype_name(x.dtype)} holds NaN or Inf; only finite numbers "
                "can be observed: repair the batch, or leave it out"
            )
        return cls(low, high)

    def merged(self, other: Extremes) -> Extremes:
        """Return the extremes of both."""
        return Extremes(min(self.low, other.low), max(self.high, other.high))

    def around_zero(self) -> tuple[Tensor, Tensor]:
        """Return both ends, float64, (1,), of the range extended to include zero."""
        ends = min(self.low, 0.0), max(self.high, 0.0)
        return torch.tensor([ends[0]], dtype=torch.float64), torch.tensor([ends[1]], dtype=torch.float64)
