"""Specs describe the codes of a tensor. A spec is an immutable value that can be stored and refers to no model."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import FLOAT_DTYPES, POWERS_OF_TWO, SCALE_DTYPES, dtype_from_name, dtype_name, for_json
from fewbits.numerics.levels import E2M1, E4M3, E5M2, NF4

Granularity = Literal["tensor", "channel", "group"]
Activations = Literal["dynamic", "static"]
Rounding = Literal["nearest", "free"]

#: What specs with known levels are called.
_NAMES = {NF4: "nf4", E2M1: "e2m1", E4M3: "e4m3", E5M2: "e5m2"}

#: Smaller numbers are subnormal and lose digits: half of one may be zero.
_TINY = torch.finfo(torch.float32).tiny


def _one_of(*allowed: object) -> Callable[[Any, attrs.Attribute[Any], object], None]:
    """Make a validator that refuses all but these values; False is not 0."""

    def check(_: Any, attribute: attrs.Attribute[Any], value: object) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            *names, last = [dtype_name(one) if isinstance(one, torch.dtype) else repr(one) for one in allowed]
            raise ArgumentError(f"{attribute.name} must be {', '.join(names)} or {last}, not {value!r}")

    return check


def _check_bits(_: Any, __: Any, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ArgumentError(f"bits must be an integer from 2 to 8, not {bits!r}")


def _check_group_size(spec: QuantSpec, _: Any, group_size: object) -> None:
    if spec.granularity != "group":
        if group_size is not None:
            raise ArgumentError(f"group_size needs granularity 'group', not {spec.granularity!r}")
    elif type(group_size) is not int or group_size < 1:
        raise ArgumentError(f"group_size must be a positive integer, not {group_size!r}")


def _check_scale_bits(spec: QuantSpec, _: Any, scale_bits: object) -> None:
    if scale_bits is None:
        return
    if type(scale_bits) is not int or not 2 <= scale_bits <= 8:
        raise ArgumentError(f"scale_bits must be an integer from 2 to 8, or None, not {scale_bits!r}")
    if spec.granularity != "group":
        raise ArgumentError(f"scale_bits needs granularity 'group', not {spec.granularity!r}")
    if spec.scale_dtype is not None and spec.scale_dtype == POWERS_OF_TWO:  # torch 2.6: None
        raise ArgumentError("scale_bits needs a scale_dtype that is not a power of two, such as float16")


def _levels(values: Iterable[float] | None) -> tuple[float, ...] | None:
    """Round levels to float32, so that they decode to the same numbers everywhere."""
    if values is None:
        return None
    try:
        return tuple(struct.unpack("f", struct.pack("f", value))[0] for value in values)
    except (TypeError, struct.error, OverflowError) as error:
        raise ArgumentError(f"levels must be numbers that float32 can hold: {error}") from None


def _check_levels(spec: QuantSpec, _: Any, levels: tuple[float, ...] | None) -> None:
    if levels is None:
        return
    if not spec.symmetric:
        raise ArgumentError("levels need symmetric=True: one of the levels is zero, so there is no zero point")
    rising = all(low < high for low, high in pairwise(levels))
    normal = all(level == 0 or _TINY <= abs(level) < math.inf for level in levels)
    least, most = 2 ** (spec.bits - 1) + 1, 2**spec.bits
    if not least <= len(levels) <= most or not rising or not normal or 0.0 not in levels[1:-1]:
        raise ArgumentError(
            f"levels of {spec.bits} bits must be {least} to {most} finite numbers in rising order, none of them "
            f"subnormal; 0 must be one of them, but neither the first nor the last; not {levels}"
        )


def _check_activations(spec: QuantSpec, _: Any, activations: object) -> None:
    if activations is not None and (spec.granularity == "group" or spec.levels is not None):
        raise ArgumentError(
            "int8 activations need integer codes and granularity 'channel' or 'tensor' (one scale per row or tensor)"
        )


@attrs.frozen(cache_hash=True)
class QuantSpec:
    """Integer codes with scales: ``w ≈ (q - zero_point) * scale``, or ``levels[i] * scale`` for the i-th code.

    Args:
        bits: width of a code, 2 to 8; codes run from ``-2**(bits-1)`` to ``2**(bits-1) - 1``, or to the code of the
            last level.
        granularity: which elements share one scale: the whole ``"tensor"``, a row (``"channel"``), or ``group_size``
            neighbours within a row (``"group"``; the last group of a row may be shorter).
        group_size: elements in a group, for granularity ``"group"`` only.
        symmetric: True for no zero point: code 0 decodes to zero.
        scale_dtype: dtype of the stored scales; None means the dtype of the weight. Scales of ``float8_e8m0fnu`` are
            powers of two.
        scale_bits: None stores one scale of ``scale_dtype`` for each group. 2 to 8 stores two levels of scales: one
            scale of ``scale_dtype`` for each row, and a code of ``scale_bits`` for each group, which says how many
            parts of the row's scale the group's scale is. A row's scale has ``2**scale_bits`` parts. If the spec is
            symmetric, one bit is the sign, and there are half as many parts. For granularity ``"group"`` only.
        levels: the numbers that codes decode to, in units of the scale, lowest code first: at most ``2**bits`` and more
            than ``2**(bits-1)`` rising numbers, rounded to float32, one of them 0. A code without a level is invalid.
            None means that codes decode to integers.
        activations: how the layer rounds its inputs to int8: ``"dynamic"``, with one scale for each row of an input;
            ``"static"``, with one scale from calibration; None, not at all.
        rounding: ``"nearest"``: each element has the nearest code. ``"free"``: it may have any code, because errors
            were fed forward, or scales were tuned afterwards. The error bound is then the distance to the farther end
            of the code range.

    Raises:
        ArgumentError: for any other value.

    >>> print(QuantSpec(bits=4, granularity="group", group_size=128, symmetric=False))
    int4 group 128 asymmetric
    >>> print(QuantSpec(bits=8, granularity="channel"))
    int8 channel
    >>> print(QuantSpec(bits=4, granularity="group", group_size=32, scale_bits=6))
    int4 group 32, 6-bit scales
    """

    bits: int = attrs.field(validator=_check_bits)
    granularity: Granularity = attrs.field(validator=_one_of(*get_args(Granularity)))
    group_size: int | None = attrs.field(default=None, validator=_check_group_size)
    symmetric: bool = attrs.field(default=True, validator=_one_of(True, False))
    scale_dtype: torch.dtype | None = attrs.field(default=None, validator=_one_of(None, *SCALE_DTYPES))
    scale_bits: int | None = attrs.field(default=None, validator=_check_scale_bits, kw_only=True)
    levels: tuple[float, ...] | None = attrs.field(default=None, converter=_levels, validator=_check_levels)
    activations: Activations | None = attrs.field(
        default=None, validator=[_one_of(None, *get_args(Activations)), _check_activations]
    )
    rounding: Rounding = attrs.field(default="nearest", validator=_one_of(*get_args(Rounding)))

    @property
    def code_min(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code that has a meaning."""
        return self.code_min + (1 << self.bits if self.levels is None else len(self.levels)) - 1

    @property
    def invalid_codes(self) -> int:
        """How many codes of this width have no level."""
        return (1 << self.bits) - 1 - (self.code_max - self.code_min)

    @property
    def scale_parts(self) -> int:
        """The number of equal parts of a row's scale; a group's scale is one or more of them. See `scale_bits`."""
        bits = self.scale_bits or 0
        return 1 << (bits - 1 if bits and self.symmetric else bits)

    def width(self, columns: int) -> int:
        """Return how many neighbouring elements of a row of `columns` share a scale (at least one)."""
        return max(1, min(columns, self.group_size or columns))

    def groups(self, columns: int) -> int:
        """Return how many groups a row of `columns` elements has."""
        return -(-columns // self.width(columns))

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the scales of a (rows, columns) matrix: (1,), or (rows, groups)."""
        return (1,) if self.granularity == "tensor" else (rows, self.groups(columns))

    def for_dtype(self, dtype: torch.dtype) -> QuantSpec:
        """Return this spec with the scale dtype set; if it is None, a weight of `dtype` has scales of `dtype`."""
        return self if self.scale_dtype is not None else attrs.evolve(self, scale_dtype=dtype)

    def one_level(self) -> QuantSpec:
        """Return this spec with one level of scales."""
        return self if self.scale_bits is None else attrs.evolve(self, scale_bits=None)

    def weight_only(self) -> QuantSpec:
        """Return this spec without rounding of inputs."""
        return self if self.activations is None else attrs.evolve(self, activations=None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `spec_from_dict` reads it."""
        return {"kind": "affine", **for_json(self)}

    def __str__(self) -> str:
        codes = f"int{self.bits}" if self.levels is None else _NAMES.get(self.levels, f"{len(self.levels)} levels")
        group = f" {self.group_size}" if self.granularity == "group" else ""
        inputs = "" if self.activations is None else f", {self.activations} int8 inputs"
        rounding = "" if self.rounding == "nearest" else ", rounded freely"
        scales = "" if self.scale_bits is None else f", {self.scale_bits}-bit scales"
        symmetry = "" if self.symmetric else " asymmetric"
        return f"{codes} {self.granularity}{group}{symmetry}{scales}{rounding}{inputs}"


@attrs.frozen
class CastSpec:
    """A narrower floating dtype in place of codes.

    >>> print(CastSpec(torch.float16))
    float16
    """

    dtype: torch.dtype = attrs.field(validator=_one_of(*FLOAT_DTYPES))
    activations: ClassVar[None] = None

    def for_dtype(self, dtype: torch.dtype) -> CastSpec:
        """Return this spec: a cast does not depend on the source's dtype."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `spec_from_dict` reads it."""
        return {"kind": "cast", **for_json(self)}

    def __str__(self) -> str:
        return dtype_name(self.dtype)


Spec = QuantSpec | CastSpec

#: The specs of the built-in schemes, by their short names.
SPECS: Mapping[str, Spec] = {
    "int8-tensor": QuantSpec(bits=8, granularity="tensor"),
    "int8": QuantSpec(bits=8, granularity="channel"),
    **{f"int{bits}": QuantSpec(bits, "group", group_size=128 if bits == 4 else 64) for bits in range(2, 8)},
    "nf4": QuantSpec(bits=4, granularity="group", group_size=64, levels=NF4),
    "mxfp4": QuantSpec(bits=4, granularity="group", group_size=32, levels=E2M1, scale_dtype=POWERS_OF_TWO),
    "fp8": QuantSpec(bits=8, granularity="channel", levels=E4M3),
    "fp16": CastSpec(torch.float16),
}


def spec_of_scheme(name: str) -> Spec:
    """Return the spec of a built-in scheme.

    Raises:
        ArgumentError: if this version of torch lacks the dtype of its scales.
    """
    if name == "mxfp4":
        dtype_from_name("float8_e8m0fnu")
    return SPECS[name]


#: The spec for the inputs of a layer with static int8 activations.
INPUT_SPEC = QuantSpec(bits=8, granularity="tensor", scale_dtype=torch.float32)


def spec_from_dict(fields: dict[str, Any]) -> Spec:
    """Read back what `QuantSpec.to_dict` or `CastSpec.to_dict` wrote.

    Raises:
        ArgumentError: if a field is missing, unknown, or out of range.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    names = {"affine": "scale_dtype", "cast": "dtype"}
    if not isinstance(kind, str) or kind not in names:
        raise ArgumentError(f"the kind of a spec must be 'affine' or 'cast', not {kind!r}")
    dtype = names[kind]
    if fields.get(dtype) is not None:
        fields[dtype] = dtype_from_name(fields[dtype])
    try:
        return QuantSpec(**fields) if kind == "affine" else CastSpec(**fields)
    except TypeError as error:
        raise ArgumentError(f"a spec of kind {kind!r} has missing or unknown fields: {error}") from None
