"""A weight as a module holds it: packed codes or a narrower float, in one place however many layers share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError, FormatError
from fewbits.numerics.affine import steps_of
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import unpack
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor, decode_packed, narrow, unpack_zero_point

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_Self = TypeVar("_Self", bound="StoredWeight")


class StoredWeight(nn.Module, ABC):
    """The stored form of one weight.

    Layers with tied weights hold the same instance, which is what keeps them tied through ``.to``, deepcopy and
    pickle. Its buffers never change dtype: ``.half()`` and the like change only the dtype that `dequantize` returns
    by default, so that a scale is never rounded twice and never becomes 0 or Inf.

    Attributes:
        dtype: what `dequantize` returns unless asked otherwise; the dtype of the float weight in its place.
        trainable: whether the parameter in its place required gradients.
    """

    dtype: torch.dtype
    trainable: bool = True

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """How the weight is stored."""

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""
        return None

    @abstractmethod
    def value(self) -> QuantizedTensor | Tensor:
        """The stored form as a value."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors a state dict holds, by what follows the parameter's name in their keys."""

    def how(self) -> list[Any]:
        """Spec and layout, as plain values: what the parts alone do not tell."""
        return [self.spec.to_dict(), None]

    @abstractmethod
    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over other parts of the same shapes: copied in place, or used as they are."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, in memory of its own."""

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with: not to be written to, because it may be what is stored."""
        return self.dequantize(dtype)

    @abstractmethod
    def steps(self) -> tuple[Tensor, Tensor]:
        """The weight as whole numbers, in its own shape, and what they are multiplied with; see `Operand.steps`."""

    @abstractmethod
    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that is a matrix: (len(index), columns)."""

    def extra_repr(self) -> str:
        """How the weight is stored."""
        return f"{self.spec}, reads as {dtype_name(self.dtype)}"

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        for name, buffer in list(self.named_buffers(recurse=False)):
            # As integers, so that a change of dtype cannot reach them; changes of device and memory do.
            integers = buffer.view(_INTEGERS[buffer.element_size()])
            moved = fn(integers)
            if moved.dtype != integers.dtype:
                moved = integers.to(moved.device)
            self._buffers[name] = moved.view(buffer.dtype)
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=buffer.device)).dtype
        return self

    # Keys are written and read by the layer that holds this weight, under the parameter's own name.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix)]


class PackedWeight(StoredWeight):
    """Packed codes with their scales; see `fewbits.numerics.tensor.QuantizedTensor`."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    _input_scale: Tensor | None

    def __init__(self, value: QuantizedTensor) -> None:
        super().__init__()
        self.dtype, self._spec, self.layout = value.dtype, value.spec, value.layout
        self._rows_are_first = value.layout == Layout.of(value.shape)
        self.register_buffer("packed", value.packed)
        self.register_buffer("scale", value.scale)
        self.register_buffer("zero_point", value.zero_point)
        self.register_buffer("_input_scale", value.input_scale)

    @property
    def spec(self) -> QuantSpec:
        """How the codes look."""
        return self._spec

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""
        return self._input_scale

    def how(self) -> list[Any]:
        """Spec and layout, as plain values: what the parts alone do not tell."""
        return [self.spec.to_dict(), self.layout.to_dict()]

    def value(self) -> QuantizedTensor:
        """The stored form as a value; it shares the buffers."""
        parts = self.packed, self.scale, self.zero_point
        return QuantizedTensor(*parts, self.spec, self.layout, self.dtype, self._input_scale)

    def parts(self) -> dict[str, Tensor]:
        """The tensors of a state dict: ``_packed``, ``_scale``, ``_shape`` and so on, as `QuantizedTensor.parts`."""
        return {f"_{name}": part for name, part in self.value().parts().items()}

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over codes and scales of the same shapes and spec."""
        loaded = {name.removeprefix("_"): part for name, part in parts.items()}
        QuantizedTensor.from_parts(loaded, spec=self.spec, layout=self.layout, dtype=self.dtype)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                part = loaded[name.removeprefix("_")]
                self._buffers[name] = part if assign else buffer.copy_(part)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, computed in float32 (float64 for float64 scales) and cast to `dtype`."""
        zero_point = unpack_zero_point(self.zero_point, self.scale, self.spec)
        matrix = decode_packed(self.packed, self.scale, zero_point, self.spec, self.layout.columns)
        return self.layout.from_matrix(narrow(matrix, dtype or self.dtype))

    def steps(self) -> tuple[Tensor, Tensor]:
        """Codes less zero points, and scales as (rows,) or (1,), both float64."""
        zero_point = unpack_zero_point(self.zero_point, self.scale, self.spec)
        codes = unpack(self.packed, self.spec.bits, self.layout.columns)
        return self.layout.from_matrix(steps_of(codes, zero_point, self.spec)), self.scale.double().flatten()

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that is a matrix: (len(index), columns)."""
        if not self._rows_are_first:
            return self.dequantize(dtype).index_select(0, index)
        scale, zero_point = self.scale, unpack_zero_point(self.zero_point, self.scale, self.spec)
        if self.spec.granularity != "tensor":
            scale = scale.index_select(0, index)
            zero_point = None if zero_point is None else zero_point.index_select(0, index)
        packed = self.packed.index_select(0, index)
        return narrow(decode_packed(packed, scale, zero_point, self.spec, self.layout.columns), dtype)


class CastWeight(StoredWeight):
    """A weight in a narrower floating dtype."""

    narrow: Tensor

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._spec = dtype, CastSpec(value.dtype)
        self.register_buffer("narrow", value)

    @property
    def spec(self) -> CastSpec:
        """The dtype it is stored in."""
        return self._spec

    def value(self) -> Tensor:
        """The narrow tensor itself."""
        return self.narrow

    def parts(self) -> dict[str, Tensor]:
        """The narrow tensor, under the parameter's own name."""
        return {"": self.narrow}

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over another tensor of the same shape and dtype."""
        value = parts[""]
        if (value.shape, value.dtype) != (self.narrow.shape, self.narrow.dtype):
            raise FormatError(
                f"a weight of shape {tuple(self.narrow.shape)} in {dtype_name(self.narrow.dtype)} cannot take "
                f"shape {tuple(value.shape)} in {dtype_name(value.dtype)}"
            )
        self.narrow = value if assign else self.narrow.copy_(value)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, cast to `dtype`."""
        return self.narrow.to(dtype or self.dtype, copy=True)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight, cast to `dtype` if it has another."""
        return self.narrow.to(dtype)

    def steps(self) -> tuple[Tensor, Tensor]:
        """Never asked for: a cast has no whole numbers.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(f"a weight in {self.spec} has no integer codes")

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that is a matrix."""
        return self.narrow.index_select(0, index).to(dtype)


def store(value: QuantizedTensor | Tensor, dtype: torch.dtype) -> StoredWeight:
    """The module that holds this value in the place of a weight of `dtype`."""
    return PackedWeight(value) if isinstance(value, QuantizedTensor) else CastWeight(value, dtype)
