"""The built-in schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
from torch import Tensor, nn

from fewbits.errors import ArgumentError
from fewbits.numerics.levels import NF4
from fewbits.numerics.spec import SPECS, Activations, QuantSpec, spec_of_scheme
from fewbits.quantizers.base import Quantizer
from fewbits.selection.rules import TypeRule

#: Modules that schemes of up to 4 bits keep: they have few bytes, or their errors do much harm.
_SENSITIVE: tuple[TypeRule, ...] = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class _Int8(Quantizer):
    """The base of both int8 schemes."""

    def __init__(self, activations: Activations | None = None, **strategies: Any) -> None:
        self.spec = attrs.evolve(type(self).spec, activations=activations)  # type: ignore[arg-type]
        super().__init__(**strategies)


class Int8PerTensor(_Int8):
    """8 bits per weight, one scale for each tensor. Prefer `Int8PerChannel`: it is more accurate and hardly larger.

    - Stored bits per weight: 8, and one scale for the whole tensor.
    - Error bound: ``scale / 2 + |w| * 2**-23``. The scale is the largest magnitude of the tensor over 127.
    - Read by: transformers, without `activations`.

    Args:
        activations: whether Linear layers and convolutions round their inputs to int8 too. ``"dynamic"``: one scale for
            each row (of a convolution: for each sample). ``"static"``: one scale for each layer, which `observe` finds.
            None: no rounding.
        strategies: the arguments of `Quantizer`.
    """

    name = "int8-tensor"
    spec = SPECS["int8-tensor"]


class Int8PerChannel(_Int8):
    """8 bits per weight, one scale for each output channel (row).

    - Stored bits per weight: ``8 + s / columns`` with scales of s bits.
    - Error bound: ``scale / 2 + |w| * 2**-23``. The scale is the largest magnitude of the row over 127.
    - Read by: transformers, without `activations`.

    Args:
        activations: whether Linear layers and convolutions round their inputs to int8 too. ``"dynamic"``: one scale for
            each row (of a convolution: for each sample). ``"static"``: one scale for each layer, which `observe` finds.
            None: no rounding.
        strategies: the arguments of `Quantizer`.
    """

    name = "int8"
    spec = SPECS["int8"]


class _Grouped(Quantizer):
    """The base of schemes with groups. Up to 4 bits, embeddings and normalizations are kept unless asked for.

    Args:
        spec: the spec of the codes.
        scale_bits: None stores the scale of each group in `scale_dtype`. 2 to 8 stores a code of so many bits for each
            group, and one scale for each row; see `QuantSpec`.
        strategies: the arguments of `Quantizer`.
    """

    def __init__(self, spec: QuantSpec, *, scale_bits: int | None = None, **strategies: Any) -> None:
        self.spec = attrs.evolve(spec, scale_bits=scale_bits)
        self.default_skip = _SENSITIVE if spec.bits <= 4 else ()
        super().__init__(**strategies)


class IntNGrouped(_Grouped):
    """2 to 8 bits per weight, evenly spaced codes, one scale for each group of neighbouring inputs.

    Up to 4 bits, embeddings and normalizations are kept unless asked for.

    - Stored bits per weight: ``bits + s / group_size`` with scales of s bits; ``bits + (s + bits) / group_size`` if
      asymmetric. Int3 in groups of 64 has 3.25 bits with 16-bit scales, 3.5 with 32-bit scales.
    - Error bound: ``scale / 2 + |w| * 2**-23``. The scale is the largest magnitude of a group over
      ``2**(bits-1) - 1``; if asymmetric, the range of a group over ``2**bits - 1``.
    - Read by: transformers, for 4 or 8 bits, if symmetric and in groups that divide the rows.

    Args:
        bits: of a code.
        group_size: inputs in a group.
        symmetric: without a zero point.
        strategies: the arguments of `Quantizer`, and `scale_bits`: None stores the scale of each group in
            `scale_dtype`; 2 to 8 stores a code of so many bits for each group, and one scale for each row.
    """

    def __init__(self, bits: int, group_size: int = 64, *, symmetric: bool = True, **strategies: Any) -> None:
        self.name = f"int{bits}"
        super().__init__(QuantSpec(bits, "group", group_size=group_size, symmetric=symmetric), **strategies)


class Int4Grouped(IntNGrouped):
    """4 bits per weight, evenly spaced codes, one scale for each group of neighbouring inputs.

    Embeddings and normalizations are kept unless asked for.

    - Stored bits per weight: ``4 + s / group_size`` with scales of s bits; ``4 + (s + 4) / group_size`` if asymmetric.
      Groups of 128 have 4.125 bits with 16-bit scales, 4.25 with 32-bit scales.
    - Error bound: ``scale / 2 + |w| * 2**-23``. The scale is the largest magnitude of a group over 7; if asymmetric,
      the range of a group over 15.
    - Read by: transformers, if symmetric and in groups that divide the rows.

    Args:
        group_size: inputs in a group.
        symmetric: without a zero point.
        strategies: the arguments of `Quantizer`, and `scale_bits`; see `IntNGrouped`.
    """

    name = "int4"

    def __init__(self, group_size: int = 128, *, symmetric: bool = True, **strategies: Any) -> None:
        super().__init__(4, group_size, symmetric=symmetric, **strategies)


class _FixedBits(IntNGrouped):
    """The base of `IntNGrouped` with a fixed number of bits, for settings."""

    bits: ClassVar[int]

    def __init__(self, group_size: int = 64, *, symmetric: bool = True, **strategies: Any) -> None:
        super().__init__(self.bits, group_size, symmetric=symmetric, **strategies)


class Int2Grouped(_FixedBits):
    """`IntNGrouped` of 2 bits. Groups of 64 have 2.25 bits per weight with 16-bit scales, 2.5 with 32-bit scales."""

    name, bits = "int2", 2


class Int3Grouped(_FixedBits):
    """`IntNGrouped` of 3 bits. Groups of 64 have 3.25 bits per weight with 16-bit scales, 3.5 with 32-bit scales."""

    name, bits = "int3", 3


class Int5Grouped(_FixedBits):
    """`IntNGrouped` of 5 bits. Groups of 64 have 5.25 bits per weight with 16-bit scales, 5.5 with 32-bit scales."""

    name, bits = "int5", 5


class Int6Grouped(_FixedBits):
    """`IntNGrouped` of 6 bits. Groups of 64 have 6.25 bits per weight with 16-bit scales, 6.5 with 32-bit scales."""

    name, bits = "int6", 6


class Int7Grouped(_FixedBits):
    """`IntNGrouped` of 7 bits. Groups of 64 have 7.25 bits per weight with 16-bit scales, 7.5 with 32-bit scales."""

    name, bits = "int7", 7


class LevelsGrouped(_Grouped):
    """Any levels, one scale for each group of neighbouring inputs.

    Up to 4 bits, embeddings and normalizations are kept unless asked for.

    - Stored bits per weight: ``bits + s / group_size`` with scales of s bits; 2**bits codes hold the levels.
    - Error bound: half the distance of the two levels around the weight, times the scale, plus ``|w| * 2**-23``. The
      scale is the smallest with which nothing lies beyond the first or the last level.
    - Read by: fewbits only.

    Args:
        levels: 3 to 256 rising numbers, 0 inside; `fewbits.schemes.fit_levels` fits them to weights.
        group_size: inputs in a group.
        strategies: the arguments of `Quantizer`.

    Raises:
        ArgumentError: for other levels, or another group size.
    """

    name = "levels"

    def __init__(self, levels: Sequence[float], group_size: int = 64, **strategies: Any) -> None:
        if not isinstance(levels, (Sequence, Tensor)):
            raise ArgumentError(f"levels must be a list of numbers, such as fit_levels(weights), not {levels!r}")
        bits = max(2, (len(levels) - 1).bit_length())
        super().__init__(QuantSpec(bits, "group", group_size=group_size, levels=tuple(levels)), **strategies)


class NF4Grouped(LevelsGrouped):
    """4 bits per weight, the 16 NormalFloat levels of QLoRA, one scale for each group of neighbouring inputs.

    Embeddings and normalizations are kept unless asked for.

    - Stored bits per weight: ``4 + s / group_size`` with scales of s bits. Groups of 64 have 4.25 bits with 16-bit
      scales, 4.5 with 32-bit scales.
    - Error bound: half the distance of the two levels around the weight, at most ``0.152 * scale``, plus
      ``|w| * 2**-23``. The scale is the largest magnitude of a group.
    - Read by: fewbits only. The numbers are those of bitsandbytes' NF4 without its quantized scales; the layout of the
      file is another.

    Args:
        group_size: inputs in a group.
        strategies: the arguments of `Quantizer`.
    """

    name = "nf4"

    def __init__(self, group_size: int = 64, **strategies: Any) -> None:
        super().__init__(NF4, group_size, **strategies)


class MXFP4Grouped(_Grouped):
    """The numbers of OCP's MXFP4: 4-bit floats (e2m1), one power of two (e8m0) as scale for each group of 32 inputs.

    Embeddings and normalizations are kept unless asked for. Another `scale_dtype` replaces the powers of two; then the
    result is not MXFP4.

    - Stored bits per weight: ``4 + 8 / 32 = 4.25``, for weights of any dtype.
    - Error bound: half the distance of the two levels around the weight, at most ``scale``, plus ``|w| * 2**-23``. The
      scale is the smallest power of two with which the largest magnitude of a group is at most 7 steps; 6 is the
      largest level. OCP's rule, ``2**floor(log2(largest / 4))``, allows 8 steps, which would clip by 2.
    - Read by: fewbits only. The layout of the file is not that of other tools' MXFP4.

    Args:
        strategies: the arguments of `Quantizer`.

    Raises:
        ArgumentError: with torch 2.6, which has no dtype for e8m0.
    """

    name = "mxfp4"

    def __init__(self, **strategies: Any) -> None:
        super().__init__(spec_of_scheme("mxfp4"), **strategies)  # type: ignore[arg-type]


class FP8PerChannel(Quantizer):
    """8-bit floats (e4m3) per weight, one scale for each output channel (row).

    Small weights of a row keep their relative precision, but large ones have less than with `Int8PerChannel`. Prefer
    it for rows with rare large weights.

    - Stored bits per weight: ``8 + s / columns`` with scales of s bits.
    - Error bound: ``|w| / 16``, at least ``scale / 1024``, plus ``|w| * 2**-23``. The scale is the largest magnitude of
      a row over 448.
    - Read by: fewbits only. Codes are indices of the 253 finite numbers, not e4m3 bytes.

    Args:
        strategies: the arguments of `Quantizer`.
    """

    name = "fp8"
    spec = SPECS["fp8"]


class FP16Cast(Quantizer):
    """Weights stored in half precision; layers compute in the dtype of their input.

    Values beyond the range of float16 raise an error.

    - Stored bits per weight: 16. Error bound: ``|w| * 2**-11``, at least ``2**-25``.
    - Read by: every reader of float16.
    """

    name = "fp16"
    spec = SPECS["fp16"]
    min_elements = 0  # a cast has no scales


#: The schemes by their short names.
SCHEMES: Mapping[str, type[Quantizer]] = {
    cls.name: cls
    for cls in (
        Int8PerTensor,
        Int8PerChannel,
        Int2Grouped,
        Int3Grouped,
        Int4Grouped,
        Int5Grouped,
        Int6Grouped,
        Int7Grouped,
        NF4Grouped,
        MXFP4Grouped,
        FP8PerChannel,
        FP16Cast,
    )
}
