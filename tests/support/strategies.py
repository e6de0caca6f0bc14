"""The strategies of `fewbits.testing`, and the same maths written another way."""

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits import QuantSpec
from fewbits import testing as kit
from fewbits.extend import Layout
from fewbits.numerics.dtypes import SCALE_DTYPES
from fewbits.testing.strategies import FLOATS, contents, layouts, numbers, restrided, rounded, seeds, shapes, weights

__all__ = ["FLOATS", "contents", "layouts", "numbers", "restrided", "rounded", "seeds", "shapes", "weights"]

NO_LEVELS = {"levels": None, "scale_dtypes": (None, *SCALE_DTYPES)}


def specs(**fixed: object) -> st.SearchStrategy[QuantSpec]:
    """Specs without levels, which the oracles below do not know; some have scales that are powers of two."""
    return kit.specs(**NO_LEVELS | fixed)


def problems(**fixed: object) -> st.SearchStrategy[tuple[Tensor, QuantSpec, Layout]]:
    """(weight, spec, layout), with such specs."""
    return kit.problems(**NO_LEVELS | fixed)


def as_matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """The matrix that a layout cuts, in one expression."""
    return tensor.reshape(layout.view).permute(layout.permutation).reshape(layout.rows, layout.columns)


def per_element(params: Tensor, spec: QuantSpec, rows: int, columns: int) -> Tensor:
    """Scales or zero points, one for each element of a (rows, columns) matrix."""
    if spec.granularity == "tensor":
        return params.expand(rows, columns)
    return params[:, torch.arange(columns) // (spec.group_size or columns)]


def fractions(tensor: Tensor) -> list[Fraction]:
    """The elements, without rounding."""
    return [Fraction(value) for value in tensor.flatten().tolist()]


def ulp(x: float, dtype: torch.dtype) -> float:
    """The distance from a normal number to the next larger one of a dtype."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(x)[1] - 1)


def quantize_group(values: list[float], spec: QuantSpec, dtype: torch.dtype) -> tuple[list[int], float, int]:
    """(codes, scale, zero point) of one group of a weight of `dtype`, with the min-max rule, in plain Python."""
    real = np.float64 if dtype == torch.float64 else np.float32
    steps, low, high = 2**spec.bits - 1, min(0.0, *values), max(0.0, *values)
    exact = max(-low, high) / (steps // 2) if spec.symmetric else high / steps - low / steps
    scale_dtype = spec.scale_dtype or dtype
    nearest = max(rounded(exact, scale_dtype), torch.finfo(scale_dtype).tiny)
    for scale in (nearest, nearest + ulp(nearest, scale_dtype)):
        zero = 0 if spec.symmetric else min(max(round(spec.code_min - low / scale), spec.code_min), spec.code_max)
        above, below = (Fraction(scale) * (end - zero) for end in (spec.code_max, spec.code_min))
        if Fraction(high) <= above + Fraction(scale) / 2 and Fraction(low) >= below - Fraction(scale) / 2:
            break
    codes = [round(float(real(value) / real(scale))) + zero for value in values]
    return [min(max(code, spec.code_min), spec.code_max) for code in codes], scale, zero
