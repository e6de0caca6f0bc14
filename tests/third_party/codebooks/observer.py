"""`InputWeightedObserver`: scales with the least error in the output of a layer."""

import torch

from fewbits import MinMaxObserver
from fewbits.errors import ArgumentError
from fewbits.extend import Observer, QuantParams

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


class InputWeightedObserver(Observer):
    """Tries a few shares of the largest magnitude; the inputs of a column weight its errors."""

    needs_data = True

    def __init__(self):
        self.reset()

    def reset(self):
        self._squares = None

    def observe_input(self, x):
        squares = x.double().square().flatten(0, -2).sum(0) if x.dim() > 1 else x.double().square()
        self._squares = squares if self._squares is None else self._squares + squares

    def merge(self, other):
        if type(other) is not type(self):
            raise ArgumentError(f"{self!r} cannot merge the inputs of {other!r}")
        if other._squares is not None:
            self._squares = other._squares if self._squares is None else self._squares + other._squares

    def observe_weight(self, weight, spec):
        params = MinMaxObserver().observe_weight(weight, spec)
        widest, zero_point = params.scale, params.zero_point
        least = torch.full(widest.shape, torch.inf, dtype=torch.float64)
        best = widest.clone()
        for share in SHARES:
            scale = (widest * share).clamp(min=torch.finfo(widest.dtype).tiny)
            error = self._error(weight.double(), scale.double(), zero_point, spec)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return QuantParams(best, zero_point)

    def _error(self, weight, scale, zero_point, spec):
        """The weighted error of each scale, float64, in units of the largest step."""
        columns = weight.shape[1]
        step = per_element(scale, spec, columns)
        shift = 0 if zero_point is None else per_element(zero_point, spec, columns)
        error = (nearest(weight / step, shift, spec) - weight / step) * (step / step.amax())
        return per_scale(error.square() * self._squares / self._squares.amax().clamp(min=1e-300), spec)


def nearest(scaled, shift, spec):
    """The nearest level, in units of the scale."""
    if spec.levels is None:
        return (scaled + shift).round().clamp(spec.code_min, spec.code_max) - shift
    levels = torch.tensor(spec.levels, dtype=torch.float64)
    above = torch.bucketize(scaled.contiguous(), levels).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return torch.where(scaled - low < high - scaled, low, high)


def per_element(params, spec, columns):
    """Repeat (rows, groups) or (1,) so that it broadcasts over the elements."""
    return params if params.dim() == 1 else params.repeat_interleave(spec.width(columns), 1)[:, :columns]


def per_scale(values, spec):
    """Sum the values that share a scale."""
    rows, columns = values.shape
    if spec.granularity == "tensor":
        return values.sum().reshape(1)
    width, groups = spec.width(columns), spec.groups(columns)
    return torch.nn.functional.pad(values, (0, groups * width - columns)).reshape(rows, groups, width).sum(2)
