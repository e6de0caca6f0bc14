"""`GPTQ`: reads checkpoints of AutoGPTQ, GPTQModel and other tools that write their format.

``qweight`` is (words, outputs): the codes of one output stand below each other, packed as in
`fewbits.numerics.packing`. ``qzeros`` is (groups, words), packed along the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.qweight import Packed, QweightCheckpoint, described
from fewbits.numerics.packing import packed_words, unpack

_BITS = (2, 3, 4, 8)

#: The version of the format that stores zero points as they are. The first version subtracts 1.
_V2 = "gptq_v2"


class GPTQ(QweightCheckpoint):
    """A checkpoint of GPTQ, version 1 or 2, with codes of 2, 3, 4 or 8 bits.

    A weight whose inputs are in another order than its groups (``desc_act``) is dequantized.
    """

    format = "GPTQ"
    method = "gptq"
    versions = ("gptq", _V2)

    @classmethod
    def has_words(cls, words: int, outputs: int) -> bool:
        """Tell the format from the number of words in a row of ``qweight``."""
        return words == outputs

    def describe(self, prefix: str) -> tuple[int, int]:
        """Return bits per code and number of inputs of a weight, after its shapes were checked."""
        (depth, rows), (groups, words) = self.entry(prefix, "qweight").shape, self.entry(prefix, "qzeros").shape
        sets, outputs = self.entry(prefix, "scales").shape
        bits = self.settings.bits
        if bits is None:
            fits = [width for width in _BITS if packed_words(outputs, width) == words]
            if len(fits) != 1:
                self.refuse(prefix, "qzeros", "a number of words that tells the bits, or bits in the settings")
            bits = fits[0]
        if bits not in _BITS:
            raise FormatError(f"{prefix}qweight has codes of {bits} bits; fewbits reads GPTQ with 2, 3, 4 or 8 bits")
        if (groups, words) != (sets, packed_words(outputs, bits)):
            self.refuse(prefix, "qzeros", f"shape {(sets, packed_words(outputs, bits))} with {bits} bits")
        index = self.tensors.entries.get(f"{prefix}g_idx")
        inputs = depth * 32 // bits if index is None else index.numel
        if rows != outputs or packed_words(inputs, bits) != depth:
            expected = (packed_words(inputs, bits), outputs)
            self.refuse(prefix, "qweight", f"shape {expected} for {inputs} inputs of {bits} bits")
        return bits, inputs

    def groups(self, prefix: str, width: int, shape: tuple[int, int]) -> Tensor | None:
        """Return the group of each input, if they are not in the order of the groups."""
        name, (count, inputs) = f"{prefix}g_idx", shape
        entry = self.tensors.entries.get(name)
        if entry is None:
            return None
        if entry.dtype not in (torch.int32, torch.int64) or entry.shape != (inputs,):
            raise FormatError(f"{described(name, entry)} cannot be read: it must be one integer per input ({inputs})")
        groups = self.tensors.read_whole(name).long()
        low, high = map(int, torch.aminmax(groups))
        if low < 0 or high >= count:
            raise FormatError(f"{described(name, entry)} names groups from {low} to {high}; there are {count} groups")
        return None if torch.equal(groups, torch.arange(inputs, device="cpu") // width) else groups

    def codes(self, weight: Packed) -> Tensor:
        """Read the codes of a weight, packed as in `fewbits.numerics.packing`."""
        return self.tensors.read_whole(f"{weight.prefix}qweight").T.contiguous()

    def zero_points(self, weight: Packed) -> Tensor:
        """Read the zero points of a weight: uint8, (groups, outputs)."""
        words, bits = self.tensors.read_whole(f"{weight.prefix}qzeros"), weight.bits
        if self.settings.version == _V2:
            return unpack(words, bits, weight.outputs)
        if 32 % bits == 0:
            # GPTQModel subtracts 1 from all fields of a word at once, so that a zero point of 0 borrows from the next
            # field. Only adding to whole words restores such zero points.
            words += sum(1 << shift for shift in range(0, 32, bits))
            return unpack(words, bits, weight.outputs)
        return unpack(words, bits, weight.outputs) + 1 & (1 << bits) - 1
