"""`FP8Blocks`: 8-bit floats with one scale for each block of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.levels import E4M3
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers.base import Observer
from fewbits.quantizers.base import Quantizer

#: Rows of a block, and columns.
_SIZE = 128


class FP8Blocks(Quantizer):
    """8-bit floats (e4m3) per weight, one scale for each block of 128 rows and 128 columns, as DeepSeek-V3 has them.

    The last blocks of a weight may be smaller. Rows shorter than 128 get per-channel int8, unless `ragged` says
    otherwise. The scheme takes no `rounding`, and no rule can name it.

    - Stored bits per weight: ``8 + s / 128`` with scales of s bits, because the scale of a block is stored for each of
      its rows: 8.125 with 16-bit scales, 8.25 with 32-bit scales. Files of other tools store it once, which takes
      ``8 + s / 16384``.
    - Error bound: ``|w| / 16``, at least ``scale / 1024``, plus ``|w| * 2**-23``. The scale is the largest magnitude of
      a block over 448, or, with another observer, the largest scale that it chooses in the block.
    - Read by: fewbits only. Codes are indices of the 253 finite numbers, not e4m3 bytes.

    Args:
        strategies: the arguments of `Quantizer`, without `rounding`.
    """

    name = "fp8-block"
    spec = QuantSpec(bits=8, granularity="group", group_size=_SIZE, levels=E4M3)

    def quantize_tensor(self, weight: WeightMatrix, spec: QuantSpec, observer: Observer) -> QuantizedTensor:
        """Choose scales for the groups of each row, and give all rows of a block the largest."""
        by_row = super().quantize_tensor(weight, spec, observer)
        if (spec.levels, spec.group_size) != (E4M3, _SIZE):  # a rule, or a short row, asks for another spec
            return by_row
        left = _largest_in_blocks(by_row.params().scale)

        def next_rows(rows: Tensor, _: QuantSpec) -> QuantParams:
            nonlocal left
            own, left = left[: len(rows)], left[len(rows) :]
            return QuantParams(own)

        return quantize(weight, spec, next_rows)


def _largest_in_blocks(scale: Tensor) -> Tensor:
    """Replace each scale, (rows, groups), by the largest magnitude among those of its group in its block of rows."""
    blocks = torch.split(scale.double().abs(), _SIZE)  # there is no maximum of scales that are powers of two
    return torch.cat([block.amax(0, keepdim=True).expand_as(block) for block in blocks]).to(scale.dtype)
