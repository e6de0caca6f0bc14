"""Weights in ONNX graphs: the form of a quantized module for `torch.onnx.export`.

A linear layer becomes one `MatMulNBits` of ONNX Runtime. Every other weight becomes a tensor of bytes and the
arithmetic that decodes it.
"""

from __future__ import annotations

import math
import sys
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.kernels.weight_layouts import Rows, WeightLayout, refuses_any, taken
from fewbits.numerics.affine import encode_input
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import dynamic_scale

#: `MatMulNBits` takes blocks of so many neighbouring codes, or of a larger power of two.
_SMALLEST_BLOCK = 16

#: The block for rows that share one scale, and that no power of two divides.
_PADDED_BLOCK = 32


def is_exporting() -> bool:
    """Whether `torch.onnx.export` runs."""
    if torch.compiler.is_dynamo_compiling():  # torch.compile cannot trace the next line
        return False
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


@attrs.define(eq=False, kw_only=True)
class Constants(WeightLayout):
    """The real tensors of a weight while an exporter traces with fake ones; modules never hold this layout.

    Each tensor is made once: the exporter writes a tensor once, however many layers use it.

    Attributes:
        source: The weight, in the layout that its module holds.
    """

    name = "constants"
    data = ()

    source: WeightLayout
    _codes: Tensor | None = attrs.field(default=None, init=False)
    _params: QuantParams | None = attrs.field(default=None, init=False)
    _operands: tuple[Tensor, Tensor, Tensor | None] | None = attrs.field(default=None, init=False)

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> Constants:
        """Wrap a weight that holds real tensors."""
        return cls(source=weight, **weight.shared())

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        if self._codes is None:
            with _disable_current_modes():
                self._codes = self.source.codes(slice(None))
        return taken(self._codes, where)

    def params(self, where: Rows) -> QuantParams:
        """Return the scales and zero points of some rows."""
        if self._params is None:
            with _disable_current_modes():
                params = self.source.params(slice(None))
                self._params = QuantParams(params.scale.to(compute_dtype(self.scale.dtype)), params.zero_point)
        return self._params.rows(where)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the inputs of `MatMulNBits`: the packed codes, and scales and zero points of all blocks."""
        if self._operands is None:
            with _disable_current_modes():
                self._operands = _operands(self.source)
        return self._operands


#: The weights that an export has met, for as long as its mode for fake tensors exists.
_met: WeakKeyDictionary[Any, dict[WeightLayout, Constants]] = WeakKeyDictionary()


def constants(weight: WeightLayout, fake: Any) -> Constants:
    """Return the real tensors of a weight; the same ones throughout an export.

    Args:
        weight: The weight with its real tensors.
        fake: A tensor that the exporter put into its place.
    """
    met = _met.setdefault(fake.fake_mode, {})
    return met.setdefault(weight, Constants.of(weight))


def refuses_nbits(weight: WeightLayout) -> str | None:
    """Say why `MatMulNBits` cannot compute with a weight; None if it can."""
    if reason := refuses_any(weight):
        return reason
    if weight.spec.granularity == "group" and not _block(weight):
        return f"groups of {weight.spec.group_size} do not consist of blocks of {_SMALLEST_BLOCK}, 32, 64..."
    return None


def _block(weight: WeightLayout) -> int:
    """Return the number of codes in a block, a power of two; 0 if groups cannot be cut into such blocks.

    Blocks that divide the rows are preferred: OpenVINO takes no others.
    """
    columns, spec = weight.layout.columns, weight.spec
    group = spec.group_size if spec.groups(columns) > 1 and spec.group_size else columns
    for width in (math.gcd(group, columns), group):
        largest = width & -width
        if largest >= _SMALLEST_BLOCK:
            return largest
    return _PADDED_BLOCK if group == columns else 0


def product(x: Tensor, weight: Constants) -> Tensor:
    """Return ``x @ weight.T``, as one `MatMulNBits` of the graph.

    Inputs that the scheme rounds to int8 are whole numbers in float32: their products are those of the reference.
    """
    if weight.spec.activations is None:
        return _product(x, weight)
    wide = x.float()
    scale = dynamic_scale(wide, (-1,)) if weight.input_scale is None else weight.input_scale
    return (_product(encode_input(wide, scale), weight) * scale).to(x.dtype)


def _product(x: Tensor, weight: Constants) -> Tensor:
    rows, columns = weight.layout.matrix_shape
    words, scale, zero_point = weight.operands()
    with _disable_current_modes():
        # The operator takes scales in the dtype of its input only.
        dtype = x.dtype if torch.equal(scale.to(x.dtype).float(), scale) else torch.float32
        scale = scale.to(dtype)
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": _bits(weight), "block_size": _block(weight)}
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        [x.to(dtype), words, scale] if zero_point is None else [x.to(dtype), words, scale, zero_point],
        attributes,
        dtype=dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )
    return output.to(x.dtype)


def _bits(weight: WeightLayout) -> int:
    """Return the width of codes in the graph: ONNX Runtime computes with 4 and 8 bits everywhere."""
    return 4 if weight.spec.bits <= 4 else 8


def _operands(weight: WeightLayout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the packed codes, (rows, blocks, bytes), and scales and zero points, one for each block of each row."""
    rows, columns = weight.layout.matrix_shape
    bits, block, spec = _bits(weight), _block(weight), weight.spec
    blocks = -(-columns // block)
    # A wider code of the same number: the zero of unsigned codes is in the middle.
    wider = (1 << (bits - 1)) + spec.code_min
    codes = F.pad(weight.codes(slice(None)) + wider, (0, blocks * block - columns)).reshape(rows, blocks, block)

    def for_blocks(per_group: Tensor) -> Tensor:
        whole = per_group.expand(rows, 1) if per_group.dim() == 1 else per_group
        ratio = -(-spec.width(columns) // block)
        return whole.repeat_interleave(ratio, 1)[:, :blocks].contiguous()

    params = weight.params(slice(None))
    zero_point = params.zero_point
    if zero_point is not None:
        zero_point = _packed((for_blocks(zero_point) + (1 << (bits - 1))).to(torch.uint8), bits)
    return _packed(codes, bits), for_blocks(params.scale.float()), zero_point


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack two codes of 4 bits into a byte, the first one into the lower half; codes of 8 bits stay."""
    if bits == 8:
        return codes
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << 4
