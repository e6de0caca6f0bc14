"""`StoredWeight`: a weight as a module holds it, shared by all layers with that weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError, FormatError
from fewbits.kernels.base import Compute, Kernel, PreparedWeight
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.spec import CastSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_Self = TypeVar("_Self", bound="StoredWeight")


class StoredWeight(nn.Module, ABC):
    """The stored form of one weight.

    Layers with tied weights hold the same instance, so they stay tied through ``.to``, deepcopy and pickle. Its buffers
    never change dtype: ``.half()`` and similar calls change only the default dtype of `dequantize`, so that a scale is
    never rounded twice and never becomes 0 or Inf.

    Attributes:
        dtype: the dtype that `dequantize` returns by default; the dtype of the float weight.
        trainable: whether the float parameter required gradients.
        computes: whether kernels compute with it; otherwise a forward reads it as a float tensor.
        compute: how its layer may gain speed; see `fewbits.set_compute`.
        offered: the kernels to choose from; None stands for `fewbits.kernels.choose.KERNELS`.
    """

    dtype: torch.dtype
    trainable: bool = True
    computes: bool = False
    compute: Compute = "exact"
    offered: tuple[Kernel[Any], ...] | None = None

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """How the weight is stored."""

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""
        return None

    def prepared(self) -> PreparedWeight | None:
        """Return the weight in its current layout, with its kernels; None if only the reference computes with it."""
        return None

    @abstractmethod
    def value(self) -> QuantizedTensor | Tensor:
        """Return the stored value."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Return the tensors for a state dict, by the suffix that their keys add to the parameter's name."""

    @property
    @abstractmethod
    def suffixes(self) -> list[str]:
        """The keys of `parts`."""

    def parts_in(self, destination: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
        """Return the parts, detached, for a state dict that holds them under this key."""
        return {suffix: part.detach() for suffix, part in self.parts().items()}

    def storage_spec(self) -> list[Any]:
        """Return spec and layout as plain values: the parts do not hold them."""
        return [self.spec.to_dict(), None]

    @abstractmethod
    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over other parts of the same shapes: copy them in place, or assign them."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in its own shape, in memory of its own."""

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight to compute with; callers must not write to it, it may be the stored tensor."""
        return self.dequantize(dtype)

    scale: Tensor

    @abstractmethod
    def centered_codes(self) -> Tensor:
        """Return codes minus zero points: float64, in the weight's own shape."""

    @abstractmethod
    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix: (len(index), columns)."""

    def extra_repr(self) -> str:
        """Describe how the weight is stored."""
        return f"{self.spec}, reads as {dtype_name(self.dtype)}"

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        buffers = dict(self._buffers)
        for name, buffer in buffers.items():
            if buffer is None:
                continue
            # A view as integers: changes of dtype do not apply to it, changes of device and memory do.
            integers = buffer.view(_INTEGERS[buffer.element_size()])
            moved = fn(integers)
            if moved.dtype != integers.dtype:
                moved = integers.to(moved.device)
            buffers[name] = moved.view(buffer.dtype)
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=buffer.device)).dtype
        # One assignment: another thread may be reading.
        self._buffers = buffers
        return self

    # The layer that holds this weight writes and reads its keys, under the parameter's own name.
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


class CastWeight(StoredWeight):
    """A weight in a narrower floating dtype."""

    narrow: Tensor

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._spec = dtype, CastSpec(value.dtype)
        self.register_buffer("narrow", value)

    @property
    def spec(self) -> CastSpec:
        """The dtype that the weight is stored in."""
        return self._spec

    def value(self) -> Tensor:
        """Return the narrow tensor itself."""
        return self.narrow

    def parts(self) -> dict[str, Tensor]:
        """Return the narrow tensor, under the parameter's own name."""
        return {"": self.narrow}

    @property
    def suffixes(self) -> list[str]:
        """No suffix: the key is the parameter's own name."""
        return [""]

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
        """Return the weight, cast to `dtype`, in memory of its own."""
        return self.narrow.to(dtype or self.dtype, copy=True)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, cast to `dtype` if it has another."""
        return self.narrow.to(dtype)

    def centered_codes(self) -> Tensor:
        """Refuse: a cast weight has no codes.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(f"a weight in {self.spec} has no integer codes")

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix."""
        return self.narrow.index_select(0, index).to(dtype)
