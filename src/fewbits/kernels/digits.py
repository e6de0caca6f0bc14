"""Write the codes of any spec as sums of four-bit digits, which torch's four-bit kernel multiplies.

A code of up to 4 bits is one digit. Wider integers have two digits, and levels two, three or four: the kernel then
multiplies with two or more planes of digits.
"""

from __future__ import annotations

import functools

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.numerics.spec import QuantSpec

#: The largest digit; the smallest one is -8. A nibble holds a digit plus 8.
_LARGEST = 7
#: The search for two units of levels starts with these ratios of the units, and with these sizes of the levels.
_RATIOS, _SIZES = [step / 4 for step in range(5, 69)], [step / 256 for step in range(128, 257)]
#: How often the search fits units and digits to one another.
_FITS = 4


@attrs.frozen(eq=False)
class Digits:
    """The digits of every code: a code stands for ``sum(units * (nibbles - 8))``.

    Attributes:
        nibbles: For each plane, the digits plus 8 of all unsigned codes. No two codes have the same digits.
        units: For each plane, the value of a digit.
    """

    nibbles: list[list[int]]
    units: list[float]


def planes(spec: QuantSpec) -> int:
    """Return how many digits a code has."""
    if spec.levels is None:
        return 1 if spec.bits <= 4 else 2
    return 2 if spec.bits <= 4 else 3 if spec.bits < 8 else 4


@functools.lru_cache(maxsize=1024)
def digits_of(spec: QuantSpec) -> Digits:
    """Return the digits of a spec whose codes have two or more of them."""
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        if spec.levels is None:
            return _digits_of_integers(torch.arange(spec.code_min, spec.code_max + 1), 2)
        if (count := planes(spec)) == 2:
            return _pairs_near(torch.tensor(spec.levels, dtype=torch.float64), 1 << spec.bits)
        numbers, unit = _whole_numbers(spec, _LARGEST * (16**count - 1) // 15)
        return _digits_of_integers(numbers, count, unit)


@functools.lru_cache(maxsize=1024)
def levels_in_bytes(spec: QuantSpec) -> tuple[list[int], float]:
    """Return the levels of a spec as whole numbers that fit two signed bytes, and their unit."""
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        numbers, unit = _whole_numbers(spec, 127 * 257)
        return numbers.tolist(), unit


def _digits_of_integers(numbers: Tensor, count: int, unit: float = 1.0) -> Digits:
    """Write integers in base 16 with digits from -8 to 7, the largest digit first."""
    nibbles: list[list[int]] = []
    for _ in range(count):
        nibbles.insert(0, (numbers + 8 & 15).tolist())
        numbers = numbers + 8 >> 4
    return Digits(nibbles, [unit * 16.0**plane for plane in reversed(range(count))])


def _whole_numbers(spec: QuantSpec, most: int) -> tuple[Tensor, float]:
    """Round levels to different multiples of a unit, at most `most` units from zero.

    A power of two as a unit keeps most numbers of a floating dtype exact: all of float8_e4m3fn from a 448th of the
    largest on, if there are 16 bits. Smaller numbers may move by a 1200th of the largest, so that they differ.

    Returns:
        The rising multiples of all codes, int64, and the unit. Codes without a level continue after the last one.
    """
    levels = torch.tensor(spec.levels, dtype=torch.float64)
    least = levels.abs().max() / (most - (1 << spec.bits))
    candidates = [(distinct(levels / unit), float(unit)) for unit in (least, torch.exp2(least.log2().ceil()))]

    def errors(found: tuple[Tensor, float]) -> tuple[int, float]:
        error = (found[0] * found[1] - levels).abs()
        return int(error.count_nonzero()), float(error.square().sum())

    numbers, unit = min(candidates, key=errors)
    beyond = torch.arange(1, (1 << spec.bits) - len(levels) + 1)
    return torch.cat([numbers, numbers[-1] + beyond]), unit


def distinct(rising: Tensor) -> Tensor:
    """Round rising numbers to integers that differ from one another; 0 stays 0."""
    zero = int((rising == 0).nonzero())
    rounded, steps = rising.round().long(), torch.arange(len(rising))
    # Away from zero, each integer is at least one more than the one before.
    above, below = rounded[zero:], -rounded[: zero + 1].flip(0)
    above, below = ((one - steps[: len(one)]).cummax(0).values + steps[: len(one)] for one in (above, below))
    return torch.cat([-below.flip(0)[:-1], above])


def _pairs_near(levels: Tensor, codes: int) -> Digits:
    """Find two units, and a pair of digits for each level, with a small mean squared error of the levels.

    Two free units leave NF4 an SQNR of 54 dB, where digits in base 16 leave 46, and they are exact for MXFP4.
    """
    largest = float(levels.abs().max())
    # The largest pair of digits stands for the largest level, or for up to twice as much.
    units = torch.tensor([(1 / (1 + 1 / ratio), 1 / (1 + ratio)) for ratio in _RATIOS], dtype=torch.float64)
    errors, units = _fitted(units * largest / _LARGEST, levels, torch.tensor(_SIZES, dtype=torch.float64))
    for _ in range(_FITS):
        errors, units = _fitted(units, levels, torch.ones(1, dtype=torch.float64))
    return _nearest_pairs(levels, units[errors.argmin()], codes)


def _nearest_pairs(levels: Tensor, units: Tensor, codes: int) -> Digits:
    """Choose the nearest pair of digits for each level, another pair for each; 0 has the digits 0.

    Codes without a level get any other pair.
    """
    distances = (_points(units.unsqueeze(0)) - levels.unsqueeze(1)).abs()
    distances[:, 8 * 16 + 8] = torch.where(levels == 0, -1.0, torch.inf)
    chosen = dict.fromkeys(range(codes), 0)
    for code in [*distances.amin(1).argsort().tolist(), *range(len(levels), codes)]:
        chosen[code] = int(distances[min(code, len(levels) - 1)].argmin())
        distances[:, chosen[code]] = torch.inf
    return Digits([[pair // 16 for pair in chosen.values()], [pair % 16 for pair in chosen.values()]], units.tolist())


def _points(units: Tensor) -> Tensor:
    """Return the values of all pairs of digits: (candidates, 256), for units of shape (candidates, 2)."""
    digits = torch.arange(-8, _LARGEST + 1, dtype=torch.float64)
    return (units[:, :1, None] * digits.unsqueeze(1) + units[:, 1:, None] * digits).flatten(1)


def _fitted(units: Tensor, levels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Give levels of several sizes the nearest digits, then fit the units to the digits by least squares.

    Returns:
        The squared errors and the units of the best size for each candidate: (candidates,) and (candidates, 2).
    """
    points, order = _points(units).sort(1)
    wanted = (levels * sizes.unsqueeze(1)).flatten().repeat(len(units), 1)
    after = torch.searchsorted(points, wanted).clamp_(1, points.shape[1] - 1)
    is_after = points.gather(1, after) - wanted < wanted - points.gather(1, after - 1)
    nearest = order.gather(1, after - 1 + is_after.long()).view(len(units), len(sizes), len(levels))
    first, second = (nearest // 16 - 8).double(), (nearest % 16 - 8).double()
    aa, bb, ab = first.square().sum(2), second.square().sum(2), (first * second).sum(2)
    a, b = first @ levels, second @ levels
    fitted = torch.stack([a * bb - b * ab, b * aa - a * ab], 2) / (aa * bb - ab * ab).unsqueeze(2)
    errors = (fitted[..., :1] * first + fitted[..., 1:] * second - levels).square().sum(2)
    errors.nan_to_num_(nan=torch.inf)  # of units that cannot be told apart
    best = errors.argmin(1, keepdim=True)
    return errors.gather(1, best).squeeze(1), fitted.gather(1, best.unsqueeze(2).expand(-1, 1, 2)).squeeze(1)
