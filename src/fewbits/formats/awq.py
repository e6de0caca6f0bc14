"""`AWQ`: reads checkpoints of AutoAWQ and other tools that write its GEMM format.

``qweight`` is (inputs, words) and ``qzeros`` is (groups, words): both are packed along the outputs. The eight codes of
a word belong to eight neighbouring outputs, in the order of `_ORDER`.
"""

from __future__ import annotations

from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.qweight import Packed, QweightCheckpoint
from fewbits.numerics.packing import pack, unpack

#: The place in a word of the code of each of eight neighbouring outputs; the lowest four bits are place 0.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

_BITS = 4


class AWQ(QweightCheckpoint):
    """A checkpoint of AWQ in the GEMM format, with codes of 4 bits."""

    format = "AWQ"
    method = "awq"
    versions = ("gemm",)

    @classmethod
    def has_words(cls, words: int, outputs: int) -> bool:
        """Tell the format from the number of words in a row of ``qweight``."""
        return words * len(_ORDER) == outputs

    def describe(self, prefix: str) -> tuple[int, int]:
        """Return bits per code and number of inputs of a weight, after its shapes were checked."""
        if self.settings.bits not in (None, _BITS):
            raise FormatError(f"{prefix}qweight has codes of {self.settings.bits} bits; fewbits reads AWQ with 4 bits")
        groups, outputs = self.entry(prefix, "scales").shape
        inputs = self.entry(prefix, "qweight").shape[0]
        for part, rows in (("qweight", inputs), ("qzeros", groups)):
            if outputs % len(_ORDER) or self.entry(prefix, part).shape != (rows, outputs // len(_ORDER)):
                self.refuse(prefix, part, f"{rows} rows of one word for each 8 of {outputs} outputs")
        return _BITS, inputs

    def codes(self, weight: Packed) -> Tensor:
        """Read the codes of a weight, packed as in `fewbits.numerics.packing`."""
        return pack(self._unpacked(weight, "qweight").T.contiguous(), _BITS)

    def zero_points(self, weight: Packed) -> Tensor:
        """Read the zero points of a weight: uint8, (groups, outputs)."""
        return self._unpacked(weight, "qzeros")

    def _unpacked(self, weight: Packed, part: str) -> Tensor:
        fields = unpack(self.tensors.read_whole(f"{weight.prefix}{part}"), _BITS, weight.outputs)
        return fields.view(-1, weight.outputs // len(_ORDER), len(_ORDER))[..., list(_ORDER)].flatten(1)
