"""`QuantizedModule`: a module that stores some of its parameters as codes, and reads them as float tensors."""

from __future__ import annotations

import copyreg
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor, nn

from fewbits.errors import ArgumentError, ReadOnlyWeightError
from fewbits.nn.state_dict import add_weights, take_weights
from fewbits.nn.stored import SUFFIX, StoredWeight, part_of, read, reading_once, stored_weights
from fewbits.numerics.layout import Layout

#: The attribute of classes made at run time: the registered class whose forward the quantized form may replace.
_REPLACED = "_replaced_class"

#: Classes made at run time, by float class, quantized form, and replaced class.
_made: dict[tuple[type[nn.Module], type[QuantizedModule], type[nn.Module]], type[QuantizedModule]] = {}

#: The quantized form of each registered class, by class or by full name.
_registered: dict[type[nn.Module] | str, type[QuantizedModule]] = {}


class QuantizedModule(nn.Module):
    """Base class of quantized modules: reading a quantized parameter dequantizes it.

    A forward that reads its parameters as attributes needs no change. If `own_weight` is None, a call of the module's
    forward dequantizes each parameter once. Any other read gives a new read-only tensor, except in forwards of
    `torch.nn.modules`, and while compiling or tracing.

    A subclass declares how modules of a float class are quantized. Defining a subclass with `float_class` registers it
    for that class; `register` adds other classes.

    Attributes:
        float_class: The float class: modules of this class become quantized modules, and `dequantize` gives them this
            class again.
        own_weight: The parameter that `forward` reads as stored codes. The subclass applies only to modules in which
            that parameter is quantized. If None, `forward` reads float tensors.
        input_axes: For each parameter, the axes that run over inputs. Without an entry, `declared_layout` decides, or
            else the shape.
        rounds_inputs: Whether `forward` rounds its inputs to int8 if the spec of `own_weight` has int8 activations.
        forward_methods: The methods of the float class that `forward` replaces or calls. A subclass of the float class
            that overrides one of these methods does not round its inputs.
        reads_weights_of_children: Whether `forward` may read the weights of child modules without calling the children.
            If so, the children do not round their inputs.
        rebuilt_attributes: The attributes in which the float module also holds its parameters, and which the quantized
            module rebuilds. A parameter that any other attribute holds is kept.
    """

    float_class: ClassVar[type[nn.Module]]
    own_weight: ClassVar[str | None] = None
    input_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    rounds_inputs: ClassVar[bool] = False
    forward_methods: ClassVar[tuple[str, ...]] = ("forward",)
    reads_weights_of_children: ClassVar[bool] = False
    rebuilt_attributes: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _REPLACED in vars(cls):
            return
        if cls.own_weight is None and not {"forward", "float_class"}.isdisjoint(vars(cls)) and _has_forward(cls):
            cls.forward = reading_once(cls.forward)
        if "float_class" in vars(cls):
            cls.register(cls.float_class)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Become a float module: adapters make layers of their own by ``type(layer)(...)``, and have no codes."""
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "__class__", self.float_class)

    @classmethod
    def register(cls, float_class: type[nn.Module] | str) -> None:
        """Use this quantized form for a float class and its subclasses.

        A forward that this class defines replaces the forward of `float_class`; a subclass that overrides `forward`
        keeps its own. A warning tells if `float_class` is itself such a subclass. A later registration for the same
        class replaces an earlier one. Modules that are quantized already do not change.

        Args:
            float_class: The class, or its full name (``"package.module.Class"``) if it should not be imported; a class
                that is given by name is not checked for a forward of its own.

        Raises:
            ArgumentError: If it is neither a name nor a class of float modules.
        """
        if not isinstance(float_class, str):
            is_layer = isinstance(float_class, type) and issubclass(float_class, nn.Module)
            if not is_layer or float_class is nn.Module or issubclass(float_class, (QuantizedModule, StoredWeight)):
                raise ArgumentError(
                    f"register takes a class of float layers, a subclass of torch.nn.Module, or its full name, not "
                    f"{float_class!r}"
                )
            cls._warn_of_replaced_forward(float_class)
        _registered[float_class] = cls

    @classmethod
    def _warn_of_replaced_forward(cls, float_class: type[nn.Module]) -> None:
        own = vars(cls).get("float_class", float_class)
        overrides = issubclass(float_class, own) and float_class.forward is not own.forward
        if overrides and replaces_forward(float_class, cls, float_class):
            name, form, base = float_class.__name__, cls.__name__, own.__name__
            warnings.warn(
                f"{name} overrides the forward of {base}, and {form}.forward now replaces it. If {name} computes what "
                f"{base} computes, declare that with a subclass of {form} that has float_class = {name}; otherwise do "
                f"not register {name}: it then keeps its forward, which reads float weights",
                stacklevel=3,
            )

    @classmethod
    def declared_layout(cls, module: nn.Module, name: str, shape: tuple[int, ...]) -> Layout | None:
        """Say how a parameter of a float module is cut into outputs and inputs; None lets its shape decide.

        Args:
            module: The float module.
            name: The name of its parameter.
            shape: The shape of the parameter.
        """
        axes = cls.input_axes.get(name)
        if axes is None and len(shape) == 3 and isinstance(getattr(module, "is_transposed", None), bool):
            # Fused experts of transformers: (experts, inputs, outputs) or (experts, outputs, inputs).
            axes = (1,) if module.is_transposed else (2,)
        return None if axes is None else Layout.of(shape, inputs=axes)

    def read_together(self) -> Iterable[StoredWeight]:
        """List the weights that this module's forward reads; each is dequantized once per forward."""
        return stored_weights(self).values()

    def stores(self) -> None:
        """Adjust the module after a parameter has become a stored weight."""
        for stored in stored_weights(self).values():
            stored.is_read |= self.own_weight is None

    def restored(self) -> None:
        """Adjust the float module after its parameters have come back."""

    def __getattr__(self, name: str) -> Any:
        stored = self.__dict__.get("_modules", {}).get(name + SUFFIX)
        if isinstance(stored, StoredWeight):
            return read(self, name, stored)
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Other tools look up every key of the state dict in the module.
            if (part := part_of(self, name)) is None:
                raise
            return part

    def _refuse_change(self, name: str) -> None:
        stored = self.__dict__.get("_modules", {}).get(name + SUFFIX)
        if isinstance(stored, StoredWeight):
            raise ReadOnlyWeightError(
                f"{type(self).__name__}.{name} is quantized ({stored.spec}) and cannot be assigned to or deleted; load "
                "other codes with load_state_dict, or get a float model with fewbits.dequantize(model) first"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one that would replace a quantized one."""
        if name + SUFFIX in self._modules:
            setattr(self, name, param)
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name; `_blank` makes it again.
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        made_by = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]
        if not isinstance(reduced, tuple) or reduced[0] not in made_by:
            return reduced
        replaced = vars(type(self)).get(_REPLACED, self.float_class)
        return (_blank, (self.float_class, form_of(type(self)), replaced), *reduced[2:])

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the children that the float module has: a forward may go through them."""
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        add_weights(self, destination, prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        _, missing_keys, _, error_msgs = rest
        others = take_weights(self, state_dict, prefix, local_metadata, missing_keys, error_msgs)
        super()._load_from_state_dict(others, prefix, local_metadata, *rest)


def form_of(cls: type[QuantizedModule]) -> type[QuantizedModule]:
    """Return the declared class that a quantized class is, or that it was made from at run time."""
    return next(base for base in cls.__mro__ if issubclass(base, QuantizedModule) and _REPLACED not in vars(base))


def quantized_form(
    float_class: type[nn.Module], names: Collection[str]
) -> tuple[type[QuantizedModule], type[nn.Module]]:
    """Find the quantized form that is registered for a class or for the nearest of its base classes.

    Args:
        float_class: The class of a float module.
        names: The names of its quantized parameters.

    Returns:
        The quantized form, and the class that it is registered for; `QuantizedModule` and `torch.nn.Module` if there is
        no such registration.
    """
    for cls in float_class.__mro__:
        form = _registered.get(cls) or _registered.get(f"{cls.__module__}.{cls.__qualname__}")
        if form is not None and (form.own_weight is None or form.own_weight in names):
            return form, cls
    return QuantizedModule, nn.Module


def replaces_forward(float_class: type[nn.Module], form: type[QuantizedModule], replaced: type[nn.Module]) -> bool:
    """Whether modules of a float class compute with the forward of their quantized form, and not with their own."""
    defines_forward = form.forward is not getattr(form, "float_class", nn.Module).forward
    return defines_forward and float_class.forward is replaced.forward


def made_class(
    float_class: type[nn.Module], form: type[QuantizedModule], replaced: type[nn.Module]
) -> type[QuantizedModule]:
    """Return the quantized class of modules of a float class; make it at the first call.

    Args:
        float_class: The class of the float modules.
        form: The quantized form.
        replaced: The class that the form is registered for.

    Raises:
        TypeError: If the float class cannot be subclassed.
    """
    if vars(form).get("float_class") is float_class and issubclass(form, float_class):
        return form
    key = float_class, form, replaced
    if key in _made:
        return _made[key]
    namespace: dict[str, Any] = {"float_class": float_class, "__doc__": float_class.__doc__, _REPLACED: replaced}
    if replaces_forward(float_class, form, replaced):
        namespace["forward"] = form.forward
    elif _has_forward(float_class):
        namespace["forward"] = reading_once(float_class.forward)
    # The float class comes first: its methods are used, and their calls of `super()` reach the quantized form.
    bases = (form,) if issubclass(form, float_class) else (float_class, form)
    return _made.setdefault(key, type(f"Quantized{float_class.__name__}", bases, namespace))


def _has_forward(cls: type[nn.Module]) -> bool:
    defined = inspect.getattr_static(cls, "forward")
    return cls.forward is not nn.Module.forward and isinstance(defined, FunctionType)


def _blank(float_class: type[nn.Module], form: type[QuantizedModule], replaced: type[nn.Module]) -> QuantizedModule:
    """Make an empty module for pickle and deepcopy to fill."""
    cls = made_class(float_class, form, replaced)
    return cls.__new__(cls)
