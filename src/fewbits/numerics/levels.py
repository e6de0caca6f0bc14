"""The levels of known formats, for ``QuantSpec(levels=...)``; `fewbits.numerics.fitting` fits levels to weights."""

from __future__ import annotations

#: NormalFloat of 4 bits: quantiles of a normal distribution, from Dettmers et al., "QLoRA: Efficient Finetuning of
#: Quantized LLMs", 2023, appendix E. These are the float32 numbers of bitsandbytes (`get_4bit_type`).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _float_levels(mantissa: int, bias: int, last: int) -> tuple[float, ...]:
    """Return the finite numbers of a small floating format, in rising order; zero once.

    Args:
        mantissa: bits of the mantissa.
        bias: bias of the exponent.
        last: exponent and mantissa bits of the largest finite number, read as one integer.
    """
    magnitudes = [_magnitude(bits, mantissa, bias) for bits in range(1, last + 1)]
    return (*(-magnitude for magnitude in reversed(magnitudes)), 0.0, *magnitudes)


def _magnitude(bits: int, mantissa: int, bias: int) -> float:
    exponent, fraction = divmod(bits, 1 << mantissa)
    if exponent:
        fraction += 1 << mantissa
    return fraction * 2.0 ** (max(exponent, 1) - bias - mantissa)


#: The 15 numbers of e2m1, the elements of MXFP4: OCP Microscaling Formats v1.0, section 5.3.3.
E2M1 = _float_levels(1, 1, 7)

#: The 253 finite numbers of e4m3: OCP 8-bit Floating Point v1.0; torch's float8_e4m3fn.
E4M3 = _float_levels(3, 7, 126)

#: The 247 finite numbers of e5m2: OCP 8-bit Floating Point v1.0; torch's float8_e5m2.
E5M2 = _float_levels(2, 15, 123)
