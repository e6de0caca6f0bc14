"""`QuantizedModule`: any module, some of whose parameters are stored as codes and read as float tensors."""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import FrameType, FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError, ReadOnlyWeightError
from fewbits.nn.stored import StoredWeight
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.read_only import ReadOnlyTensor
from fewbits.numerics.spec import CastSpec

#: A parameter ``p`` that is quantized lives in a child module ``p_stored``.
SUFFIX = "_stored"

#: The weights that are dequantized once during the forward that runs now, and those that have been.
_once: ContextVar[dict[StoredWeight, Tensor | None] | None] = ContextVar("fewbits_once", default=None)

#: The key in the metadata of a state dict that says how each weight is stored: other codes may have the same shapes.
_STORAGE_SPEC = "fewbits"

#: What to do with the state dict of a float model.
_WAY_OUT = (
    "Load the state dict of a float model into the float model, and quantize that; to fill a float model with a file "
    "that fewbits wrote, use fewbits.load(path, into=model)."
)

#: Every class that was made at run time, by what it was made from: it is made once.
_classes: dict[tuple[type[nn.Module], type[QuantizedModule]], type[QuantizedModule]] = {}

#: Marks classes that are made at run time.
_MADE = "_made_at_run_time"


class QuantizedModule(nn.Module):
    """What all quantized modules share: reading a quantized parameter gives a float tensor, dequantized anew.

    A forward that uses its parameters as attributes, as all of torch does, needs no change. Inside one forward a
    parameter that is read again is not dequantized again. Outside of the module's own forward the tensor is read-only.

    Attributes:
        float_class: the class to go back to.
    """

    float_class: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Become a float module: adapters make layers of their own by ``type(layer)(...)``, and have no codes."""
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "__class__", self.float_class)

    def __getattr__(self, name: str) -> Any:
        stored = self.__dict__.get("_modules", {}).get(name + SUFFIX)
        return _read(self, name, stored) if isinstance(stored, StoredWeight) else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        stored = self.__dict__.get("_modules", {}).get(name + SUFFIX)
        if isinstance(stored, StoredWeight):
            raise ReadOnlyWeightError(
                f"{type(self).__name__}.{name} is quantized ({stored.spec}) and cannot be assigned to; load other "
                "codes with load_state_dict, or get a float model with fewbits.dequantize(model) first"
            )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one in the place of a quantized one."""
        if name + SUFFIX in self._modules:
            setattr(self, name, param)
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that was made at run time is made again where this is read.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        made_by = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]
        own = isinstance(reduced, tuple) and reduced[0] in made_by
        return (_blank, (self.float_class, type(self).base_class()), *reduced[2:]) if own else reduced

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The children that the float module has: a forward may go through them."""
        stored = stored_weights(self).values()
        return ((name, child) for name, child in super().named_children() if child not in stored)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for stored in stored_weights(self).values() if recurse else ():
            stored._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Any:
        """Set the training flag, of the stored weights too."""
        for stored in stored_weights(self).values():
            stored.train(mode)
        return super().train(mode)

    @classmethod
    def base_class(cls) -> type[QuantizedModule]:
        """The class of the library that this one is, or was made from."""
        return next(base for base in cls.__mro__ if issubclass(base, QuantizedModule) and _MADE not in vars(base))

    def read_together(self) -> Iterable[StoredWeight]:
        """The weights that this module's forward reads; each is dequantized once in it."""
        return stored_weights(self).values()

    def stores(self) -> None:
        """Called when a parameter has become a stored weight."""

    def restored(self) -> None:
        """Called on the float module when its parameters have come back."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_STORAGE_SPEC] = {name: stored.storage_spec() for name, stored in stored_weights(self).items()}
        for name, stored in stored_weights(self).items():
            parts = stored.parts() if keep_vars else stored.parts_in(destination, prefix + name)
            destination.update((prefix + name + suffix, part) for suffix, part in parts.items())

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
        others = dict(state_dict)
        for name, stored in stored_weights(self).items():
            keys = {suffix: prefix + name + suffix for suffix in stored.suffixes}
            missing = [key for key in keys.values() if key not in others]
            parts = {suffix: others.pop(key) for suffix, key in keys.items() if key in others}
            plain = others.pop(prefix + name, None) if missing else parts.get("")
            storage_spec = local_metadata.get(_STORAGE_SPEC, {}).get(name)
            if storage_spec is not None and storage_spec != stored.storage_spec() and (parts or plain is not None):
                error_msgs.append(
                    f"{prefix}{name} is stored as {storage_spec} in the state dict, here as {stored.storage_spec()}"
                )
                continue
            cast_to = stored.spec.dtype if isinstance(stored.spec, CastSpec) else None
            if isinstance(plain, Tensor) and plain.dtype != cast_to:
                _tell_float_state(error_msgs, f"{prefix}{name} is {dtype_name(plain.dtype)}", stored)
                continue
            if missing:
                missing_keys += missing
                continue
            try:
                stored.load_parts(parts, assign=bool(local_metadata.get("assign_to_params_buffers")))
            except FewbitsError as error:
                error_msgs.append(f"{prefix}{name}: {error}")
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _tell_float_state(error_msgs: list[str], what: str, stored: StoredWeight) -> None:
    """Say once for a whole state dict, not for each layer, that it is one of the float model."""
    if not any(message.endswith(_WAY_OUT) for message in error_msgs):
        error_msgs.append(f"{what} in the state dict, and stored as {stored.spec} in this model. {_WAY_OUT}")


def made_class(float_class: type[nn.Module], base: type[QuantizedModule]) -> type[QuantizedModule]:
    """The quantized class of modules of this float class.

    The float class comes first, so that its forward is used, and what that calls with ``super()`` is found in `base`.

    Raises:
        TypeError: if the float class cannot be subclassed.
    """
    if vars(base).get("float_class") is float_class:
        return base
    key = float_class, base
    return _classes[key] if key in _classes else _classes.setdefault(key, _make_class(*key))


def _make_class(float_class: type[nn.Module], base: type[QuantizedModule]) -> type[QuantizedModule]:
    namespace: dict[str, Any] = {"float_class": float_class, "__doc__": float_class.__doc__, _MADE: True}
    own = float_class.forward is not getattr(base, "float_class", nn.Module).forward
    if own and isinstance(inspect.getattr_static(float_class, "forward"), FunctionType):
        namespace["forward"] = reading_once(float_class.forward)
    bases = (base,) if issubclass(base, float_class) else (float_class, base)
    return type(f"Quantized{float_class.__name__}", bases, namespace)


def reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, in which a quantized parameter is dequantized once, however often it is read."""

    @functools.wraps(forward)
    def reading(self: QuantizedModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler sees by itself what is computed twice
            return forward(self, *args, **kwargs)
        token = _once.set(dict.fromkeys(self.read_together()))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _once.reset(token)

    return reading


def reads(module: nn.Module, name: str, stored: StoredWeight) -> bool:
    """Whether reading this attribute gives the stored weight; a class can read its attributes as it likes."""
    probe = torch.empty(0)
    token = _once.set({stored: probe})
    try:
        return getattr(module, name, None) is probe
    finally:
        _once.reset(token)


def stored_weights(module: nn.Module) -> dict[str, StoredWeight]:
    """The stored weights that a module itself holds, by parameter name."""
    return {
        name.removesuffix(SUFFIX): child for name, child in module._modules.items() if isinstance(child, StoredWeight)
    }


def _blank(float_class: type[nn.Module], base: type[QuantizedModule]) -> QuantizedModule:
    """A module without anything in it yet, for pickle and deepcopy to fill."""
    cls = made_class(float_class, base)
    return cls.__new__(cls)


def _read(module: QuantizedModule, name: str, stored: StoredWeight) -> Tensor:
    """The weight, dequantized: once in a forward that reads it once, and read-only for a reader from outside."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return stored.dequantize()
    weights = _once.get()
    if weights is None or stored not in weights:
        weight = stored.dequantize()
        what = f"{type(module).__name__}.{name} is quantized ({stored.spec})"
        return weight if _is_forward_of_torch(sys._getframe(2)) else ReadOnlyTensor.of(weight, what)
    held = weights[stored]
    if held is None or (held.is_inference() and not torch.is_inference_mode_enabled()):
        held = weights[stored] = stored.dequantize()
    return held


def _is_forward_of_torch(frame: FrameType) -> bool:
    """Whether this code is a forward of torch's own: attention and transformer layers read weights of their children.

    They take their fast path, with other bits, only where no weight is of a subclass.
    """
    return frame.f_code.co_name == "forward" and frame.f_globals.get("__name__", "").startswith("torch.nn.modules.")
