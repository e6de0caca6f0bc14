"""`QuantParams`: the scale and zero point that codes are made with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from fewbits.errors import NumericsError
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.spec import QuantSpec


# Not frozen: torch.compile cannot trace the `__init__` that attrs writes for frozen classes.
@attrs.define(eq=False)
class QuantParams:
    """Scale and zero point of some rows, or of a whole tensor.

    Attributes:
        scale: (rows, groups), or (1,) where one scale serves the whole tensor.
        zero_point: integer, the shape of `scale`; None if symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None

    def rows(self, where: slice | Tensor) -> QuantParams:
        """Return the parameters of some rows; all of them if one scale serves the whole tensor."""
        if self.scale.dim() == 1:
            return self
        return QuantParams(self.scale[where], None if self.zero_point is None else self.zero_point[where])

    def where(self, better: Tensor, other: QuantParams) -> QuantParams:
        """Return these parameters where `better` is true, and the other ones elsewhere."""
        zero_point = self.zero_point
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(better, zero_point, other.zero_point)
        return QuantParams(torch.where(better, self.scale, other.scale), zero_point)

    def to(self, device: torch.device) -> QuantParams:
        """Return the parameters on a device."""
        return QuantParams(self.scale.to(device), None if self.zero_point is None else self.zero_point.to(device))

    @classmethod
    def joined(cls, parts: Sequence[QuantParams]) -> QuantParams:
        """Join the parameters of consecutive rows; parameters of a whole tensor are all the same."""
        first = parts[0]
        if first.scale.dim() == 1:
            return first
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        return cls(torch.cat([part.scale for part in parts]), torch.cat(zero_points) if zero_points else None)


def magnitudes(scale: Tensor) -> Tensor:
    """Return the magnitudes of scales, in a dtype that torch computes with."""
    return scale.abs() if scale.dtype in FLOAT_DTYPES else scale.float()


def are_sound(scale: Tensor) -> bool:
    """Tell whether all scales are finite and not zero."""
    if not scale.numel():
        return True
    least, largest = torch.aminmax(magnitudes(scale))  # both are NaN if one scale is NaN
    return float(least) > 0 and float(largest) < math.inf


def check_params(params: object, spec: QuantSpec, shape: tuple[int, int]) -> QuantParams:
    """Return the parameters for a (rows, columns) block, with zero points in int32.

    Raises:
        NumericsError: if codes cannot be made with them: not a `QuantParams`, another shape or dtype than the spec
            needs, a scale that is zero, NaN or Inf, or a zero point outside the code range.
    """
    if not isinstance(params, QuantParams):
        raise NumericsError(f"scale and zero point come as QuantParams(scale, zero_point), not {type(params).__name__}")
    scale, zero_point = params.scale, params.zero_point
    expected = spec.scale_shape(*shape)
    if not isinstance(scale, Tensor) or not isinstance(zero_point, (Tensor, type(None))):
        raise NumericsError("scales must be a tensor, zero points a tensor or None")
    if tuple(scale.shape) != expected or scale.dtype != spec.scale_dtype:
        raise NumericsError(
            f"scales of shape {tuple(scale.shape)} in {dtype_name(scale.dtype)} for {shape[0]} rows of {shape[1]}; "
            f"{spec} needs shape {expected} in {spec.scale_dtype}"
        )
    if not are_sound(scale):
        raise NumericsError("a scale is zero, NaN or Inf; scales must be finite and not zero")
    if (zero_point is None) != spec.symmetric:
        raise NumericsError(f"asymmetric specs need zero points, symmetric specs must have none; this spec is {spec}")
    if zero_point is None:
        return params
    whole = not zero_point.is_floating_point() and zero_point.dtype != torch.bool
    wide = zero_point.to(torch.int64)
    if not whole or tuple(wide.shape) != expected or bool(((wide < spec.code_min) | (wide > spec.code_max)).any()):
        raise NumericsError(
            f"these zero points are not integers of shape {expected} between {spec.code_min} and {spec.code_max}"
        )
    return QuantParams(scale, wide.to(torch.int32))
