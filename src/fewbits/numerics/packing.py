"""Pack codes of 2 to 8 bits into int32 words: a dense bitstream along the rows, least significant bit first.

This is the layout of compressed-tensors' ``pack-quantized`` format: code ``j`` of a row takes bits ``j * bits`` to
``(j + 1) * bits - 1`` of that row's words. Unused bits of the last word are zero. Words are little-endian.

Codes are packed in units. A unit is the smallest number of codes that fills whole bytes: 1 code of 8 bits (1 byte),
2 codes of 4 bits (1 byte), 4 codes of 6 bits (3 bytes), 8 codes of 5 bits (5 bytes).
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.numerics.scratch import Scratch

if sys.byteorder != "little":
    raise ImportError("fewbits reads and writes little-endian words through views, and this machine is big-endian")

#: bits -> (codes, bytes) of one unit. A table, because some versions of torch.compile cannot trace `math.gcd`.
_UNITS = {bits: (8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)) for bits in range(1, 9)}


def packed_words(columns: int, bits: int) -> int:
    """Return how many int32 words hold `columns` codes of `bits` bits.

    >>> packed_words(128, 4), packed_words(5, 6)
    (16, 1)
    """
    return -(-columns * bits // 32)


#: bits -> shifts and masks that give each code of a byte a byte of its own, in one integer.
_SPREADS = {4: ((4, 0x0F0F),), 2: ((12, 0x000F000F), (6, 0x03030303))}


def pack(codes: Tensor, bits: int, out: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: uint8, (rows, columns), each below ``2**bits``.
        bits: 2 to 8.
        out: contiguous tensor to write the words to; None allocates one.
        scratch: memory for intermediate results.

    Returns:
        int32, (rows, ``packed_words(columns, bits)``).

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
    tensor([[801]], dtype=torch.int32)
    """
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    out = torch.empty(rows, words, dtype=torch.int32, device=codes.device) if out is None else out
    per_unit, unit_bytes = _UNITS[bits]
    units = -(-words * 4 // unit_bytes)
    lanes = _joined(_whole_units(codes, units * per_unit, per_unit), bits, scratch or Scratch())
    stream = out.view(torch.uint8)
    if unit_bytes == 1:
        # A conversion drops the empty upper bytes several times faster than a strided copy.
        stream.copy_(lanes.view(rows, units))
    else:
        data = lanes.view(torch.uint8).view(rows, units, per_unit)[..., :unit_bytes]
        stream.copy_(data.reshape(rows, units * unit_bytes)[:, : words * 4])
    return out


def _whole_units(codes: Tensor, columns: int, per_unit: int) -> Tensor:
    """Flatten the codes, padded to `columns` per row and aligned so that a unit can be viewed as one integer."""
    if codes.shape[1] != columns or not codes.is_contiguous() or codes.storage_offset() % per_unit:
        padded = codes.new_zeros(codes.shape[0], columns)
        padded[:, : codes.shape[1]] = codes
        codes = padded
    return codes.view(-1)


def _joined(codes: Tensor, bits: int, scratch: Scratch) -> Tensor:
    """Turn each unit into an integer with one byte per code, whose lowest bits hold the packed codes."""
    lanes, width = codes, 8
    for dtype in (torch.int16, torch.int32, torch.int64):
        if bits % 8 == 0:
            break
        # Join two neighbouring lanes, each using `bits` of its `width` bits: the upper moves down next to the lower.
        pairs = lanes.view(dtype)
        upper = scratch.take(str(dtype), pairs.shape, dtype, pairs.device)
        torch.bitwise_right_shift(pairs, width, out=upper)
        lanes = torch.sub(pairs, upper, alpha=(1 << width) - (1 << bits), out=upper)
        bits, width = 2 * bits, 2 * width
    return lanes


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: int32, (rows, ``packed_words(columns, bits)``).
        bits: 2 to 8.
        columns: the number of codes in a row.

    Returns:
        uint8, (rows, columns).

    >>> unpack(torch.tensor([[801]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    rows = packed.shape[0]
    per_unit, unit_bytes = _UNITS[bits]
    units = -(-columns // per_unit)
    stream = packed.contiguous().reshape(-1).view(torch.uint8).reshape(rows, packed.shape[1] * 4)
    if units * unit_bytes > stream.shape[1]:
        stream = F.pad(stream, (0, units * unit_bytes - stream.shape[1]))
    if bits == 8:
        return stream[:, :columns].clone()
    if unit_bytes == 1:
        return _spread(stream[:, :units], bits)[:, :columns]
    data = stream[:, : units * unit_bytes].reshape(rows, units, unit_bytes).unbind(-1)
    mask = (1 << bits) - 1
    codes = []
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        code = data[byte] >> shift
        if shift + bits > 8:
            code = code | data[byte + 1] << (8 - shift)
        codes.append(code & mask)
    return torch.stack(codes, -1).reshape(rows, units * per_unit)[:, :columns]


def _spread(data: Tensor, bits: int) -> Tensor:
    """Unpack bytes of 4 codes of 2 bits, or 2 of 4 bits; whole rows of integers are several times faster than stacks.

    Args:
        data: uint8, (rows, bytes).
        bits: 2 or 4.

    Returns:
        uint8, (rows, codes).
    """
    # A row of one byte, and the result of an operation on no rows, may have any stride, which a view would refuse.
    lanes = data.to(torch.int16 if bits == 4 else torch.int32, memory_format=torch.contiguous_format)
    for shift, mask in _SPREADS[bits]:
        lanes.bitwise_or_(lanes << shift).bitwise_and_(mask)
    return lanes.view(torch.uint8)
