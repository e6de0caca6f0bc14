"""A weight as a module holds it: packed codes or a narrower float, in one place however many layers share it."""

from __future__ import annotations

import copyreg
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError, FormatError
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.choose import KERNELS, kernels_for, kernels_reading
from fewbits.kernels.ops import describe
from fewbits.kernels.prepared import PreparedWeight
from fewbits.kernels.reference import REFERENCE
from fewbits.kernels.transforms import is_wrapped
from fewbits.kernels.weight_layouts import WEIGHT_LAYOUTS, PackedInt32, WeightLayout
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor, narrow, part_shapes

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_Self = TypeVar("_Self", bound="StoredWeight")


class StoredWeight(nn.Module, ABC):
    """The stored form of one weight.

    Layers with tied weights hold the same instance, which is what keeps them tied through ``.to``, deepcopy and
    pickle. Its buffers never change dtype: ``.half()`` and the like change only the dtype that `dequantize` returns
    by default, so that a scale is never rounded twice and never becomes 0 or Inf.

    Attributes:
        dtype: what `dequantize` returns unless asked otherwise; the dtype of the float weight in its place.
        trainable: whether the parameter in its place required gradients.
        computes: whether a linear layer computes with it, rather than reading it as a float tensor.
        compute: what that layer may do to be fast; see `fewbits.set_compute`.
        offered: what kernels are chosen from; None stands for `fewbits.kernels.choose.KERNELS`.
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
        """The weight as it lies in memory, with its kernels; None if no kernel ever computes with it."""
        return None

    @abstractmethod
    def value(self) -> QuantizedTensor | Tensor:
        """The stored form as a value."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors a state dict holds, by what follows the parameter's name in their keys."""

    @property
    @abstractmethod
    def suffixes(self) -> list[str]:
        """What follows the parameter's name in the keys of `parts`."""

    def parts_in(self, destination: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
        """The same, detached, to be put under this key."""
        return {suffix: part.detach() for suffix, part in self.parts().items()}

    def storage_spec(self) -> list[Any]:
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

    scale: Tensor

    @abstractmethod
    def centered_codes(self) -> Tensor:
        """Codes less zero points: float64, in the weight's own shape."""

    @abstractmethod
    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that is a matrix: (len(index), columns)."""

    def extra_repr(self) -> str:
        """How the weight is stored."""
        return f"{self.spec}, reads as {dtype_name(self.dtype)}"

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        buffers = dict(self._buffers)
        for name, buffer in buffers.items():
            if buffer is None:
                continue
            # As integers, so that a change of dtype cannot reach them; changes of device and memory do.
            integers = buffer.view(_INTEGERS[buffer.element_size()])
            moved = fn(integers)
            if moved.dtype != integers.dtype:
                moved = integers.to(moved.device)
            buffers[name] = moved.view(buffer.dtype)
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=buffer.device)).dtype
        # All at once: another thread may be reading.
        self._buffers = buffers
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
    """Codes with their scales, in the form that the layer's kernels read; canonical until `prepack` is called.

    Attributes:
        layout: how the weight was cut.
    """

    #: The ids of the buffers, and what was made of them.
    _made: tuple[tuple[int, ...], PreparedWeight]
    #: What a state dict was given the words of last, the key there, and the words.
    _given: tuple[PreparedWeight | None, str, weakref.ref[Tensor] | None] = (None, "", None)

    def __init__(self, value: QuantizedTensor) -> None:
        super().__init__()
        self.dtype, self._spec, self.layout = value.dtype, value.spec, value.layout
        self._rows_are_first = value.layout == Layout.of(value.shape)
        self._hold(PackedInt32.of_value(value))

    @property
    def spec(self) -> QuantSpec:
        """How the codes look."""
        return self._spec

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""
        return self._buffers["input_scale"]

    def form(self) -> WeightLayout:
        """The weight as it lies in memory now; it shares the buffers."""
        return self.prepared().form

    @property
    def kernels(self) -> tuple[Kernel[Any], ...]:
        """Those that compute with it, the most preferred first; none where the reference does."""
        return self.prepared().kernels

    def prepared(self) -> PreparedWeight:
        """The weight as it lies in memory now, with its kernels."""
        # It is made once, and anew where somebody has put other buffers here; a compiler has to see the buffers.
        (objects, made), buffers = self._made, self._buffers
        if torch.compiler.is_compiling():
            return PreparedWeight(self._as_form(buffers), made.kernels, made.description)
        return made if objects == tuple(map(id, buffers.values())) else self._lay(self._as_form(buffers))

    def _as_form(self, buffers: Mapping[str, Any]) -> WeightLayout:
        kind = next(form for form in WEIGHT_LAYOUTS.values() if form.data[0] in buffers)
        return kind(**buffers, spec=self._spec, layout=self.layout)

    def _lay(self, form: WeightLayout) -> PreparedWeight:
        """A form with the kernels that compute with it."""
        if not self.computes or any(map(is_wrapped, form.tensors().values())):
            return PreparedWeight(form)
        offered = KERNELS if self.offered is None else self.offered
        kernels = kernels_reading(form, self.compute, offered)
        if kernels[0] is REFERENCE:
            return PreparedWeight(form)
        return PreparedWeight(
            form, kernels, None if isinstance(form, PackedInt32) else describe(form, self.compute, offered)
        )

    def prepack(
        self, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None, *, reuse_memory: bool = False
    ) -> None:
        """Take the form of the most preferred kernel that can compute with this weight.

        Buffers are replaced, and not written to, so that a forward in another thread goes on with those it has.

        Args:
            compute: what the layer may do to be fast.
            kernels: to choose from; None stands for `fewbits.kernels.choose.KERNELS`.
            reuse_memory: whether the memory of the words may be reused: nothing else holds it, and nothing computes.
        """
        form = self.form()
        self.compute, self.offered = compute, None if kernels is None else tuple(kernels)
        able = self._able(form, compute, kernels)
        # What is made in inference mode could not be differentiated with later.
        with torch.inference_mode(False), torch.no_grad():
            self._hold(able[0].prepack(form, reuse_memory=reuse_memory))

    def stays(self, compute: Compute) -> bool:
        """Whether `prepack` would leave the tensors as they are now; it depends on their shapes, not their numbers."""
        form, first = self.form(), self._able(self.form(), compute, None)[0]
        return isinstance(form, PackedInt32 if first is REFERENCE else first.form)

    def _able(
        self, form: WeightLayout, compute: Compute, kernels: Sequence[Kernel[Any]] | None
    ) -> tuple[Kernel[Any], ...]:
        """The kernels that compute with the weight once it has the form of the first; the reference alone if none."""
        return kernels_for(form, compute, KERNELS if kernels is None else kernels) if self.computes else (REFERENCE,)

    def _hold(self, form: WeightLayout) -> None:
        """Keep the tensors of a form as buffers, in the place of those that were there."""
        buffers = _buffers_of(form)
        self._made = tuple(map(id, buffers.values())), self._lay(form)
        self._buffers = buffers

    def storage_spec(self) -> list[Any]:
        """Spec and layout, as plain values: what the parts alone do not tell."""
        return [self.spec.to_dict(), self.layout.to_dict()]

    def value(self) -> QuantizedTensor:
        """The canonical form as a value; it shares the buffers if that is the form they are in."""
        return self.form().value(self.dtype)

    def parts(self) -> dict[str, Tensor]:
        """The tensors of a state dict: ``_packed``, ``_scale``, ``_shape`` and so on, as `QuantizedTensor.parts`."""
        return {f"_{name}": part for name, part in self.value().parts().items()}

    @property
    def suffixes(self) -> list[str]:
        """What follows the parameter's name in the keys of `parts`."""
        return [f"_{name}" for name in part_shapes(self.layout, self.spec, self.dtype)]

    def parts_in(self, destination: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
        """The same, to be put under this key: those that are there already, if another layer has put this weight.

        The canonical form is made anew for every state dict; layers with tied weights are to have one between them.
        """
        prepared, (of, before, words) = self.prepared(), self._given
        there = words() if words is not None and of is prepared else None
        if there is not None and destination.get(f"{before}_packed") is there:
            return {suffix: destination[before + suffix] for suffix in self.suffixes}
        parts = super().parts_in(destination, key)
        self._given = prepared, key, weakref.ref(parts["_packed"])
        return parts

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over codes and scales of the same shapes and spec."""
        loaded = {name.removeprefix("_"): part for name, part in parts.items()}
        value = QuantizedTensor.from_parts(loaded, spec=self.spec, layout=self.layout, dtype=self.dtype)
        before = self.form()
        if assign and before.scale.device != value.scale.device:  # from the meta device, where there is but one form
            self._hold(PackedInt32.of_value(value))
            self.prepack(self.compute, self.offered)
            return
        form = type(before).of(PackedInt32.of_value(value))
        if not assign:
            for name, tensor in form.tensors().items():
                getattr(before, name).copy_(tensor)
            form = self._as_form(self._buffers)
        self._hold(form)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, computed in float32 (float64 for float64 scales) and cast to `dtype`."""
        return self.form().dequantize(dtype or self.dtype)

    def centered_codes(self) -> Tensor:
        """Codes less zero points: float64, in the weight's own shape."""
        return self.form().centered_codes()

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that is a matrix: (len(index), columns)."""
        if not self._rows_are_first:
            return self.dequantize(dtype).index_select(0, index)
        return narrow(self.form().decoded(index), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        device = self.form().scale.device
        if fn(torch.empty(0, dtype=torch.int8, device=device)).device == device:
            super()._apply(fn, recurse)
            self._hold(self._as_form(self._buffers))
            return self
        # On another device another form may be the best.
        self._hold(PackedInt32.of(self.form()))
        super()._apply(fn, recurse)
        self.prepack(self.compute, self.offered)
        return self

    # Copies and pickles hold the canonical form. Whoever reads one takes the form that suits its own CPU. What goes to
    # another process of this machine is an exception, see `_reduce_for_process`.
    def __getstate__(self) -> dict[str, Any]:
        return self._state(_buffers_of(PackedInt32.of(self.form())))

    def _state(self, buffers: Mapping[str, Tensor | None]) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": dict(buffers), "_made": ((), None), "_given": (None, "", None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepack(self.compute, self.offered)


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

    @property
    def suffixes(self) -> list[str]:
        """None: the key is the parameter's own name."""
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
        """The weight, cast to `dtype`."""
        return self.narrow.to(dtype or self.dtype, copy=True)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight, cast to `dtype` if it has another."""
        return self.narrow.to(dtype)

    def centered_codes(self) -> Tensor:
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


def _reduce_for_process(stored: PackedWeight) -> tuple[Any, ...]:
    """For another process of this machine: the buffers as they are, so that it shares their memory.

    Canonical words that were made for the pickle would be freed before the process opens their memory.
    """
    return copyreg.__newobj__, (PackedWeight,), stored._state(stored._buffers)  # type: ignore[attr-defined]


ForkingPickler.register(PackedWeight, _reduce_for_process)


def _buffers_of(form: WeightLayout) -> dict[str, Tensor | None]:
    return {name: getattr(form, name) for name in (*form.data, "scale", "zero_point", "input_scale")}
