"""`PackedWeight`: a stored weight of codes, in the layout that the kernels of its layer read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.kernels import onnx
from fewbits.kernels.base import Compute, Kernel, PreparedWeight, TracedWeight
from fewbits.kernels.choose import KERNELS, kernels_reading, preferred
from fewbits.kernels.int8_rows import PlainInt8
from fewbits.kernels.ops import describe
from fewbits.kernels.reference import REFERENCE, is_wrapped
from fewbits.kernels.row_parts import row_part
from fewbits.kernels.stack import Stack, as_matrix, first_matrix, prepack_rows
from fewbits.kernels.weight_layouts import WEIGHT_LAYOUTS, PackedInt32, Rows, WeightLayout
from fewbits.nn.coded import CODED_DTYPES, CodedTensor
from fewbits.nn.stored import CastWeight, StoredWeight
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.layout import Layout
from fewbits.numerics.params import QuantParams
from fewbits.numerics.parts import pack_params, part_shapes
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, narrow


class PackedWeight(StoredWeight):
    """Codes with their scales, in the layout that the layer's kernels read; canonical until `prepack` is called.

    Attributes:
        spec: The spec of the codes.
        layout: How the weight was cut into rows and columns.
        compute: How the layer may gain speed; see `set_compute`.
        offered: The kernels to choose from; None stands for `fewbits.kernels.choose.KERNELS`.
    """

    spec: QuantSpec
    layout: Layout
    compute: Compute = "exact"
    offered: tuple[Kernel[Any], ...] | None = None

    #: The ids of the buffers, and the weight prepared from them; its description, kept apart for compilers.
    _made: tuple[tuple[int, ...], PreparedWeight]
    _description: str | None
    #: The last weight that `parts_in` gave to a state dict, its key, and its words.
    _last_parts: tuple[PreparedWeight | None, str, weakref.ref[Tensor] | None] = (None, "", None)
    #: Parts with their kernels, by their rows; and the weight that they are parts of.
    _parts: tuple[PreparedWeight | None, dict[tuple[int, int], PreparedWeight | None]] = (None, {})

    def __init__(self, value: QuantizedTensor) -> None:
        super().__init__()
        self.dtype, self.spec, self.layout = value.dtype, value.spec, value.layout
        self._rows_are_first = value.layout == Layout.of(value.shape)
        self._hold(PackedInt32.of_value(value))

    def weight_layout(self) -> WeightLayout:
        """Return the weight in its current layout; it shares the buffers."""
        return (self.traced() if torch.compiler.is_compiling() else self.prepared()).weight

    @property
    def candidates(self) -> Sequence[Kernel[Any]]:
        """The kernels to choose from, the most preferred first."""
        return KERNELS if self.offered is None else self.offered

    def prepared(self) -> PreparedWeight:
        """Return the weight in its current layout, with its kernels."""
        # Prepared once, and again if somebody has replaced a buffer.
        (objects, made), buffers = self._made, self._buffers
        return made if objects == tuple(map(id, buffers.values())) else self._prepare(self.wrapped(buffers))

    def traced(self) -> PreparedWeight | TracedWeight:
        """Return what a compiler sees of the weight: the buffers, and no more of the prepared weight than needed."""
        buffers: Any = self._buffers
        if onnx.is_exporting():
            return self._for_onnx(self._made[1].weight, buffers["scale"])
        text = self._description
        return PreparedWeight(self.wrapped(buffers)) if text is None else TracedWeight(buffers, text, self)

    def wrapped(self, buffers: Mapping[str, Any]) -> WeightLayout:
        """Return the weight in the layout that these buffers belong to."""
        # The names of the buffers tell the layout, so that names and tensors change in one assignment.
        kind = next(layout for layout in WEIGHT_LAYOUTS.values() if layout.data[0] in buffers)
        return kind(**buffers, spec=self.spec, layout=self.layout)

    def _prepare(self, weight: WeightLayout) -> PreparedWeight:
        if not self.computes or any(map(is_wrapped, weight.tensors().values())):
            return PreparedWeight(weight)
        kernels = kernels_reading(weight, self.compute, self.candidates)
        if kernels[0] is REFERENCE:
            return PreparedWeight(weight)
        is_words = isinstance(weight, PackedInt32)  # compilers trace the reference then
        return PreparedWeight(weight, kernels, None if is_words else describe(weight, self.compute, self.candidates))

    def part(self, rows: slice) -> PreparedWeight | None:
        """Return some rows of the matrix of codes, with the kernels that compute with them.

        Returns:
            the rows; None if only the reference computes with them, or the layout cannot be cut there.
        """
        prepared, (whole, known) = self.prepared(), self._parts
        if whole is not prepared:
            known = {}
            self._parts = prepared, known
        key = rows.start, rows.stop
        if key not in known:
            part = row_part(prepared.weight, rows)
            kernels = () if part is None else kernels_reading(part, self.compute, self.candidates)
            known[key] = None if part is None or kernels[0] is REFERENCE else PreparedWeight(part, kernels)
        return known[key]

    def read(self) -> Tensor:
        """Return the weight for a forward that is not of fewbits: a coded tensor, if that can save work."""
        may_compute = (self.is_read or self.computes) and self.spec.activations is None
        may_compute = may_compute and self.weight_layout().scale.device.type == "cpu"
        stack = Stack.of(self.layout) if may_compute and self.dtype in CODED_DTYPES else None
        # Of a stack, no more is decoded than a forward uses, even if no kernel computes.
        if stack is None or (len(stack.shape) == 2 and self.part(stack.rows) is None):
            return self.dequantize()
        return CodedTensor(self, stack, self.dtype)

    def _for_onnx(self, weight: WeightLayout, fake: Tensor | None) -> PreparedWeight:
        # The exporter has put fake tensors into the buffers; the prepared weight still has the real ones.
        is_product = self.computes and onnx.refuses_nbits(weight) is None
        return PreparedWeight(onnx.constants(weight, fake), (REFERENCE,) if is_product else ())

    def prepack(
        self, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None, *, reuse_memory: bool = False
    ) -> None:
        """Convert the weight to the layout of the most preferred kernel that can compute with it.

        Buffers are replaced, and not overwritten, so that a forward in another thread keeps valid buffers.

        Args:
            compute: How the layer may gain speed.
            kernels: The kernels to choose from; None stands for `fewbits.kernels.choose.KERNELS`.
            reuse_memory: Whether the memory of the words may be overwritten, if nobody else uses it.

        Raises:
            ArgumentError: If the layout of the kernel cannot be registered.
        """
        self.compute, self.offered = compute, None if kernels is None else tuple(kernels)
        # Tensors made in inference mode could not be differentiated later.
        with torch.inference_mode(False), torch.no_grad():
            self._hold(self._prepacked(compute, reuse_memory=reuse_memory))

    def _prepacked(self, compute: Compute, *, reuse_memory: bool) -> WeightLayout:
        kernel, weight = self._preferred(compute), self.weight_layout()
        if kernel is REFERENCE:
            layout = self._layout_read_by(kernel, compute)
            return weight if isinstance(weight, layout) else layout.of(weight, reuse_memory=reuse_memory)
        prepack = kernel.prepack if self.computes else partial(prepack_rows, kernel=kernel)
        return prepack(weight, reuse_memory=reuse_memory)

    def stays(self, compute: Compute) -> bool:
        """Whether `prepack` would keep the current tensors; their shapes decide, not their values."""
        return isinstance(self.weight_layout(), self._layout_read_by(self._preferred(compute), compute))

    def _layout_read_by(self, kernel: Kernel[Any], compute: Compute) -> type[WeightLayout]:
        if kernel is not REFERENCE:
            return kernel.weight_layout
        is_plain = self.is_decoded and compute != "exact" and PlainInt8.refuses(self.weight_layout()) is None
        return PlainInt8 if is_plain else PackedInt32

    def _preferred(self, compute: Compute) -> Kernel[Any]:
        held = self.weight_layout()
        weight = held if self.computes else None
        if self.is_read:
            weight = first_matrix(held)
        elif self.is_pointwise and self.spec.activations is None:
            weight = as_matrix(held)
        return REFERENCE if weight is None else preferred(weight, compute, self.candidates)

    def _hold(self, weight: WeightLayout) -> None:
        type(weight).register()
        buffers: dict[str, Tensor | None] = dict(weight.tensors())
        made = self._prepare(weight)
        self._made, self._description = (tuple(map(id, buffers.values())), made), made.description
        self._buffers = buffers

    def value(self) -> QuantizedTensor:
        """Return the canonical value; it shares the buffers if they are in the canonical layout."""
        return self.weight_layout().value(self.dtype)

    def rescale(self, params: QuantParams, spec: QuantSpec) -> None:
        """Replace the scales, and the spec with one that has the same parts; the codes stay."""
        value = attrs.evolve(self.value(), spec=spec, **pack_params(params, spec))
        self.spec = spec
        self._hold(PackedInt32.of_value(value))
        self.prepack(self.compute, self.offered)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors for a state dict: ``_packed``, ``_scale``, ``_shape``...; see `QuantizedTensor.parts`."""
        return {f"_{name}": part for name, part in self.value().parts().items()}

    @property
    def suffixes(self) -> list[str]:
        """The keys of `parts`."""
        return [f"_{name}" for name in part_shapes(self.layout, self.spec, self.dtype)]

    def parts_in(self, destination: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
        """Return the parts for a state dict that holds them under this key.

        The canonical tensors are made for each state dict. Layers with tied weights share them: if another layer has
        put this weight into `destination`, its parts are returned.
        """
        prepared, (last, last_key, last_words) = self.prepared(), self._last_parts
        words = last_words() if last_words is not None and last is prepared else None
        if words is not None and destination.get(f"{last_key}_packed") is words:
            return {suffix: destination[last_key + suffix] for suffix in self.suffixes}
        parts = super().parts_in(destination, key)
        self._last_parts = prepared, key, weakref.ref(parts["_packed"])
        return parts

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over codes and scales of the same shapes and spec."""
        loaded = {name.removeprefix("_"): part for name, part in parts.items()}
        value = QuantizedTensor.from_parts(loaded, spec=self.spec, layout=self.layout, dtype=self.dtype)
        before = self.weight_layout()
        if assign and before.scale.device != value.scale.device:  # from the meta device, which has one layout
            self._hold(PackedInt32.of_value(value))
            self.prepack(self.compute, self.offered)
            return
        weight = type(before).of(PackedInt32.of_value(value))
        if not assign:
            for name, tensor in weight.tensors().items():
                getattr(before, name).copy_(tensor)
            weight = self.wrapped(self._buffers)
        self._hold(weight)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight in float32 (float64 for float64 scales), in its own shape, and cast it to `dtype`."""
        return self.weight_layout().dequantize(dtype or self.dtype)

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix: (len(index), columns)."""
        if not self._rows_are_first:
            return self.dequantize(dtype).index_select(0, index)
        return self.matrix_rows(index, dtype)

    def matrix_rows(self, where: Rows, dtype: torch.dtype) -> Tensor:
        """Return some rows of the matrix of codes, whatever the shape of the weight: (rows, columns)."""
        return narrow(self.weight_layout().decoded(where), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        device = self.weight_layout().scale.device
        if fn(torch.empty(0, dtype=torch.int8, device=device)).device == device:
            super()._apply(fn, recurse)
            self._hold(self.wrapped(self._buffers))
            return self
        # On another device another layout may be the best.
        self._hold(PackedInt32.of(self.weight_layout()))
        super()._apply(fn, recurse)
        self.prepack(self.compute, self.offered)
        return self

    # Copies and pickles hold the canonical layout, and the reader converts it for its own CPU. Pickles for another
    # process of this machine are an exception, see `_reduce_for_process`.
    def __getstate__(self) -> dict[str, Any]:
        tensors = PackedInt32.of(self.weight_layout()).tensors()
        if tensors["scale"].dtype == POWERS_OF_TWO:  # pickle refuses tensors of this dtype
            tensors["scale"] = tensors["scale"].view(torch.uint8)
        return self._state(tensors)

    def _state(self, buffers: Mapping[str, Tensor | None]) -> dict[str, Any]:
        derived: dict[str, Any] = {"_made": ((), None), "_last_parts": (None, "", None), "_parts": (None, {})}
        return self.__dict__ | derived | {"_description": None, "_buffers": dict(buffers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        scale = self._buffers["scale"]
        if scale is not None and scale.dtype == torch.uint8 and POWERS_OF_TWO is not None:
            self._buffers["scale"] = scale.view(POWERS_OF_TWO)
        self.prepack(self.compute, self.offered)


def store(value: QuantizedTensor | Tensor, dtype: torch.dtype) -> StoredWeight:
    """Return the module that holds this value in place of a weight of `dtype`."""
    return PackedWeight(value) if isinstance(value, QuantizedTensor) else CastWeight(value, dtype)


def _reduce_for_process(stored: PackedWeight) -> tuple[Any, ...]:
    # Another process of this machine shares the memory of the buffers. Canonical words made for the pickle would be
    # freed before that process opens them.
    return _blank, (type(stored.weight_layout()),), stored._state(stored._buffers)


def _blank(layout: type[WeightLayout]) -> PackedWeight:
    layout.register()
    return PackedWeight.__new__(PackedWeight)


ForkingPickler.register(PackedWeight, _reduce_for_process)
