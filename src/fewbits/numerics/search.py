"""Search for the scales with the least noise: narrow the ranges of all groups together, and keep each group's best.

The order of every sum depends only on the length of a group. So the choice for a group depends only on the group, not
on neighbouring rows or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.grid import grouped
from fewbits.numerics.layout import block_rows
from fewbits.numerics.noise import fit_terms, group_sums, rounding_noise
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import choose_in_rows, choose_params, extremes, is_finite_throughout, refit
from fewbits.numerics.spec import QuantSpec

#: Returns the noise of each group with some parameters: float64, the shape of the scales, in units of the squared
#: scale.
Noise = Callable[[QuantParams], Tensor]

#: Returns the noise of each element of some rows: (rows, groups, width), in units of the squared scale.
ElementNoise = Callable[[Tensor, QuantParams, QuantSpec], Tensor]

#: Blocks of rows that are searched together.
_BLOCKS_AT_ONCE = 2

#: The ends of a range that each pass narrows. Symmetric ranges need one pass.
_PASSES = {True: [(True, True)], False: [(True, True), (False, True), (True, False)]}


def shares(count: int, least: float = 0.05) -> list[float]:
    """Return the shares of a range to try: `count` shares from 1 down to the least, denser towards 1.

    >>> [round(share, 4) for share in shares(3)]
    [1.0, 0.7625, 0.05]
    """
    return [1 - (1 - least) * (index / (count - 1)) ** 2 for index in range(count)]


class Choice:
    """The best scales and zero points so far, and their noise.

    With two levels of scales, the scales of the rows do not change.

    Args:
        low: the smallest element of each group, at most zero; the shape of the scales.
        high: the largest element of each group, at least zero.
        spec: the spec of the codes, with `scale_dtype` set.
        noise: computes the noise to minimize.
        norm: the power of the scale in whose units the noise is.
        start: the scales and zero points at first; None for those of the whole range.

    Raises:
        RangeError: if a scale is beyond the largest number of its dtype.
    """

    def __init__(
        self,
        low: Tensor,
        high: Tensor,
        spec: QuantSpec,
        noise: Noise,
        norm: float = 2,
        start: QuantParams | None = None,
    ) -> None:
        self.low, self.high, self.spec, self._noise, self._norm = low.double(), high.double(), spec, noise, norm
        self.params = choose_params(low, high, spec) if start is None else start
        self._unit = self.params.scale.double()
        self.noise = noise(self.params)

    def narrow(self, shares: Sequence[float], *, mirrored: bool = False) -> None:
        """Try shares of the range.

        Args:
            shares: each between 0 and 1.
            mirrored: try negative scales too, if the spec is symmetric and its scale dtype has a sign. The code range
                has one more negative step than positive ones, and a negative scale gives that step to the positive
                elements.
        """
        for narrows_low, narrows_high in _PASSES[self.spec.symmetric]:
            low, high = self.low, self.high
            for share in shares:
                narrowed = low * share if narrows_low else low, high * share if narrows_high else high
                self.offer(*narrowed, self._params_for(*narrowed))
                if mirrored and self.spec.symmetric and self.spec.scale_dtype != POWERS_OF_TWO:
                    mirror = self._params_for(-narrowed[1], -narrowed[0])
                    self.offer(*narrowed, QuantParams(-mirror.scale, None, mirror.row_scale))

    def _params_for(self, low: Tensor, high: Tensor) -> QuantParams:
        row_scale = self.params.row_scale
        if row_scale is None:
            return choose_params(low, high, self.spec)
        return choose_in_rows(low, high, row_scale, self.spec)

    def offer(self, low: Tensor, high: Tensor, params: QuantParams) -> None:
        """Keep these parameters, made for the range from `low` to `high`, wherever their noise is less."""
        noise = self._noise(params) * (params.scale.double() / self._unit).abs().pow(self._norm)
        better = (noise < self.noise) & is_finite_throughout(params, self.spec)
        self.noise = torch.where(better, noise, self.noise)
        self.params = params.where(better, self.params)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)


def choose_for(
    x: Tensor, spec: QuantSpec, noise: ElementNoise, shares: Sequence[float], *, mirrored: bool = False
) -> Choice:
    """Choose the scales of some rows from shares of their ranges; arguments as for `Choice` and `Choice.narrow`."""
    choice = Choice(*extremes(x, spec), spec, lambda params: _totals(noise, x, params, spec)[0])
    choice.narrow(shares, mirrored=mirrored)
    return choice


def search_scales(
    x: Tensor,
    start: QuantParams,
    spec: QuantSpec,
    steps: int,
    *,
    norm: float = 2,
    importance: Tensor | None = None,
) -> QuantParams:
    """Search the scales with the least sum of weighted powers of the errors, for each group.

    Args:
        x: (rows, columns).
        start: parameters that the result must not be worse than.
        spec: with its `scale_dtype` set. The parameters of a whole tensor stay as they are.
        steps: how many shares of a group's range to try, from the whole range down to a share that hardly any group
            prefers: ``bits / 8``, at most 0.6.
        norm: the power of each error.
        importance: the factor of each column, (columns,); None for one.
    """
    if spec.granularity == "tensor":
        return start
    weights = None if importance is None else grouped(importance.to(x.dtype).unsqueeze(0), spec)

    def noise(rows: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        squares = rounding_noise(rows, params, spec)
        powers = squares if norm == 2 else squares.pow_(norm / 2)
        return powers if weights is None else powers.mul_(weights)

    found = []
    size = _BLOCKS_AT_ONCE * block_rows(x.shape[1])
    for at in range(0, len(x), size):
        rows, own = x[at : at + size], start.rows(slice(at, at + size))
        choice = Choice(*extremes(rows, spec), spec, _noise_of(noise, rows, spec), norm, own)
        choice.narrow(shares(steps, min(0.6, spec.bits / 8)), mirrored=True)
        if norm == 2:
            fit(choice, rows, weights)
        found.append(choice.params)
    return QuantParams.joined(found)


def _noise_of(noise: ElementNoise, rows: Tensor, spec: QuantSpec) -> Noise:
    return lambda params: _totals(noise, rows, params, spec)[0]


def fit(choice: Choice, x: Tensor, weights: Tensor | None = None) -> None:
    """Refit the chosen scales of some rows to their codes, and keep them where the noise is less.

    Args:
        choice: what was chosen.
        x: the rows.
        weights: factors of the squared errors, which broadcast against the result of `grouped`; None for one.
    """

    def terms(x: Tensor, params: QuantParams, spec: QuantSpec) -> tuple[Tensor, ...]:
        plain = fit_terms(x, params, spec)
        return plain if weights is None else tuple(term * weights for term in plain)

    products, squares = _totals(terms, x, choice.params, choice.spec)
    choice.offer(choice.low, choice.high, refit(choice.params, products, squares, choice.spec))


def _totals(
    terms: Callable[[Tensor, QuantParams, QuantSpec], Tensor | tuple[Tensor, ...]],
    x: Tensor,
    params: QuantParams,
    spec: QuantSpec,
) -> list[Tensor]:
    """Sum each term over each group, in the shape of the scales."""
    if spec.granularity != "tensor":
        return [group_sums(values) for values in _as_tuple(terms(x, params, spec))]
    # A single group may need more memory for intermediate results than there is, so sum a block of rows at a time.
    sums = [
        [group_sums(values.flatten()) for values in _as_tuple(terms(rows, params, spec))]
        for rows in torch.split(x, block_rows(x.shape[1]))
    ]
    return [group_sums(torch.stack(parts)).reshape(1) for parts in zip(*sums, strict=True)]


def _as_tuple(terms: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return terms if isinstance(terms, tuple) else (terms,)
