"""Specs: how the codes of a tensor look. A spec is a value, can be stored, and knows nothing of any model."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_from_name, dtype_name

Granularity = Literal["tensor", "channel", "group"]


def _check_bits(_: Any, __: Any, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ArgumentError(f"bits must be an integer from 2 to 8, not {bits!r}")


def _check_granularity(_: Any, __: Any, granularity: object) -> None:
    if granularity not in ("tensor", "channel", "group"):
        raise ArgumentError(f"granularity must be 'tensor', 'channel' or 'group', not {granularity!r}")


def _check_group_size(spec: QuantSpec, _: Any, group_size: object) -> None:
    if spec.granularity != "group":
        if group_size is not None:
            raise ArgumentError(f"group_size goes with granularity 'group', not {spec.granularity!r}")
    elif type(group_size) is not int or group_size < 1:
        raise ArgumentError(f"group_size must be a positive integer, not {group_size!r}")


def _check_symmetric(_: Any, __: Any, symmetric: object) -> None:
    if not isinstance(symmetric, bool):
        raise ArgumentError(f"symmetric must be True or False, not {symmetric!r}")


def _check_scale_dtype(_: Any, __: Any, dtype: object) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"scale_dtype must be one of {[dtype_name(d) for d in FLOAT_DTYPES]}, not {dtype!r}")


def _check_cast_dtype(_: Any, __: Any, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"a cast goes to one of {[dtype_name(d) for d in FLOAT_DTYPES]}, not {dtype!r}")


@attrs.frozen
class QuantSpec:
    """Integer codes with scales: ``w ≈ (q - zero_point) * scale``.

    Args:
        bits: width of a code, 2 to 8; codes run from ``-2**(bits-1)`` to ``2**(bits-1) - 1``.
        granularity: what shares one scale: the whole ``"tensor"``, a row (``"channel"``), or ``group_size``
            neighbours within a row (``"group"``; the last group of a row may be shorter).
        group_size: elements in a group, for granularity ``"group"`` only.
        symmetric: no zero point; zero is code 0.
        scale_dtype: dtype the scales are stored in; None stands for the weight's own dtype.

    Raises:
        ArgumentError: for a value outside what is listed here.

    >>> QuantSpec(bits=4, granularity="group", group_size=128)
    QuantSpec(bits=4, granularity='group', group_size=128, symmetric=True, scale_dtype=None)
    >>> print(QuantSpec(bits=8, granularity="channel"))
    int8 channel
    """

    bits: int = attrs.field(validator=_check_bits)
    granularity: Granularity = attrs.field(validator=_check_granularity)
    group_size: int | None = attrs.field(default=None, validator=_check_group_size)
    symmetric: bool = attrs.field(default=True, validator=_check_symmetric)
    scale_dtype: torch.dtype | None = attrs.field(default=None, validator=_check_scale_dtype)

    @property
    def code_min(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def width(self, columns: int) -> int:
        """How many neighbouring elements of a row of `columns` share a scale (at least one)."""
        return max(1, min(columns, self.group_size or columns))

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` elements has."""
        return -(-columns // self.width(columns))

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of a (rows, columns) matrix: (1,), or (rows, groups)."""
        return (1,) if self.granularity == "tensor" else (rows, self.groups(columns))

    def for_dtype(self, dtype: torch.dtype) -> QuantSpec:
        """This spec with the scale dtype settled for a weight of `dtype`."""
        return self if self.scale_dtype is not None else attrs.evolve(self, scale_dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `spec_from_dict` reads it."""
        return {
            "kind": "affine",
            "bits": self.bits,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": None if self.scale_dtype is None else dtype_name(self.scale_dtype),
        }

    def __str__(self) -> str:
        group = f" {self.group_size}" if self.granularity == "group" else ""
        return f"int{self.bits} {self.granularity}{group}" + ("" if self.symmetric else " asymmetric")


@attrs.frozen
class CastSpec:
    """A narrower floating dtype in place of codes.

    >>> print(CastSpec(torch.float16))
    float16
    """

    dtype: torch.dtype = attrs.field(validator=_check_cast_dtype)

    def for_dtype(self, dtype: torch.dtype) -> CastSpec:
        """This spec: a cast does not depend on where it comes from."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `spec_from_dict` reads it."""
        return {"kind": "cast", "dtype": dtype_name(self.dtype)}

    def __str__(self) -> str:
        return dtype_name(self.dtype)


Spec = QuantSpec | CastSpec


def spec_from_dict(fields: dict[str, Any]) -> Spec:
    """Read back what `QuantSpec.to_dict` or `CastSpec.to_dict` wrote.

    Raises:
        ArgumentError: if a field is missing, unknown, or out of range.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    names = {"affine": "scale_dtype", "cast": "dtype"}
    if not isinstance(kind, str) or kind not in names:
        raise ArgumentError(f"a spec is of kind 'affine' or 'cast', not {kind!r}")
    dtype = names[kind]
    if fields.get(dtype) is not None:
        fields[dtype] = dtype_from_name(fields[dtype])
    try:
        return QuantSpec(**fields) if kind == "affine" else CastSpec(**fields)
    except TypeError as error:
        raise ArgumentError(f"the fields of this {kind} spec are not the ones it needs: {error}") from None
