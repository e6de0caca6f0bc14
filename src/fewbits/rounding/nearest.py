"""Strategies that give each element the nearest code, and differ in how they pick scales."""

from __future__ import annotations

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import encode
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import search_scales
from fewbits.numerics.spec import QuantSpec
from fewbits.rounding.base import Rounding
from fewbits.rounding.statistics import InputStatistics


class RoundToNearest(Rounding):
    """Gives each element the nearest code, with the observer's scales."""

    nearest = True
    objective = "|w - q|^2 of each element, with the observer's scale"

    def choose(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, inputs: InputStatistics | None
    ) -> tuple[QuantParams, Tensor]:
        """Keep the observer's scales."""
        return params, encode(weight, params, spec)


class ScaleSearch(Rounding):
    """Tries many scales for each group, and keeps the one with the least sum of powers of the errors. Needs no data.

    A `norm` of 2 gives the least squared error, at the price of clipping the largest weights. A larger `norm` clips
    less. The default spares the largest weights, on which language models depend most.

    Args:
        norm: the power of each error; from 1 up.
        steps: how many shares of a group's range to try; at least 2.

    Raises:
        ArgumentError: for another value.
    """

    nearest = True
    objective = "sum |w - q|^norm over each group"

    def __init__(self, norm: float = 3.0, steps: int = 20) -> None:
        if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 1 <= norm <= 16:
            raise ArgumentError(f"norm must be a number from 1 to 16, not {norm!r}")
        self.norm, self.steps = float(norm), _checked_steps(steps)

    def choose(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, inputs: InputStatistics | None
    ) -> tuple[QuantParams, Tensor]:
        """Search the scale of each group."""
        found = search_scales(weight, params, spec, self.steps, norm=self.norm)
        return found, encode(weight, found, spec)

    def error(self, weight: Tensor, decoded: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Compute the `objective` of each row."""
        return (weight.double() - decoded.double()).abs().pow(self.norm).sum(1)


class ImportanceSearch(Rounding):
    """Tries many scales for each group, and weighs the squared error of each element by the mean square of its input.

    Rows without data are searched as with `ScaleSearch`.

    Args:
        steps: how many shares of a group's range to try; at least 2.

    Raises:
        ArgumentError: for another value.
    """

    needs = "mean_square"
    nearest = True
    objective = "sum over columns j of E[x_j^2] (w_j - q_j)^2"

    def __init__(self, steps: int = 20) -> None:
        self.steps = _checked_steps(steps)

    def choose(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, inputs: InputStatistics | None
    ) -> tuple[QuantParams, Tensor]:
        """Search the scale of each group."""
        if inputs is None:
            return ScaleSearch(steps=self.steps).choose(weight, spec, params, None)
        found = search_scales(weight, params, spec, self.steps, importance=inputs.mean_square)
        return found, encode(weight, found, spec)

    def error(self, weight: Tensor, decoded: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Compute the `objective` of each row."""
        if inputs is None:
            return ScaleSearch(steps=self.steps).error(weight, decoded, None)
        return (weight.double() - decoded.double()).square() @ inputs.mean_square


def _checked_steps(steps: object) -> int:
    if type(steps) is not int or steps < 2:
        raise ArgumentError(f"steps must be an integer from 2 up, not {steps!r}")
    return steps
