"""`Scheme`: how tensors are encoded: the spec, the strategies, and the two methods that an author may override."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import attrs
import torch

from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Serializer
from fewbits.conversion.encoder import TensorEncoder
from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.dtypes import FLOAT_DTYPES
from fewbits.numerics.layout import WeightMatrix
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.observers import OBSERVERS
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.observers.named import ObserverRecipe, make_observer
from fewbits.quantizers.plan import plan, skip_reason
from fewbits.rounding.named import RoundingRecipe, resolve_rounding
from fewbits.rounding.nearest import RoundToNearest
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger
from fewbits.selection.rules import TypeRule, check_types
from fewbits.selection.selector import Decision, LayerSelector

#: How to treat rows that groups do not divide; see `Scheme.__init__`.
Ragged = Literal["auto", "shorter", "fallback", "error"]


class Scheme(ABC):
    """How tensors are encoded. `fewbits.Quantizer` adds the lifecycle; subclass that one.

    Attributes:
        spec: how the codes of this scheme look.
        name: the scheme's name in tables and messages; by default the name of the class.
        default_skip: classes that this scheme keeps unless asked.
        min_elements: smaller tensors are kept unless asked: their scales, names and shapes would cost about as much as
            their codes save.
    """

    spec: Spec
    name: str
    default_skip: tuple[TypeRule, ...] = ()
    min_elements: ClassVar[int] = 512

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __init__(
        self,
        *,
        observer: ObserverRecipe | None = None,
        rounding: RoundingRecipe | None = None,
        activation_observer: ObserverRecipe | None = None,
        selector: LayerSelector | None = None,
        serializer: Serializer | None = None,
        skip_types: Sequence[TypeRule] | None = None,
        scale_dtype: torch.dtype | None = None,
        ragged: Ragged = "auto",
    ) -> None:
        """Choose strategies.

        Args:
            observer: picks scales and zero points: a name in `fewbits.observers.OBSERVERS` such as ``"mse"``, a table
                with that ``name`` and the observer's arguments, or an observer. Every layer gets a fresh copy.
            rounding: picks the codes: a name in `fewbits.rounding.ROUNDINGS` such as ``"gptq"``, a table with that
                ``name`` and the strategy's arguments, or a strategy. None rounds to the nearest code.
            activation_observer: picks the scales of inputs, for specs with static int8 activations; given like
                `observer`.
            selector: decides which tensors are quantized.
            serializer: writes and reads the result.
            skip_types: classes, or their names, that are kept unless a rule of the selector names them; None takes the
                scheme's `default_skip`.
            scale_dtype: the dtype of all scales; None takes the dtype of each weight.
            ragged: how to treat rows that groups do not divide. ``"auto"``: rows shorter than one group get per-channel
                int8, longer ones a shorter last group. ``"shorter"``: a shorter last (or only) group. ``"fallback"``:
                per-channel int8. ``"error"``: `prepare` refuses them by name.

        Raises:
            ArgumentError: if an argument is not allowed, or the class has no spec.
        """
        if not isinstance(getattr(self, "spec", None), Spec):
            raise ArgumentError(f"{type(self).__name__} has no spec; set one: spec = QuantSpec(...) or CastSpec(...)")
        self.observer: Observer = _resolve_strategy("observer", observer, Observer, MinMaxObserver)
        self.rounding = resolve_rounding(rounding)
        if rounding is not None and self._makes_codes():
            raise ArgumentError(f"{type(self).__name__} makes codes in quantize_tensor; it takes no rounding")
        self.activation_observer: Observer = _resolve_strategy(
            "activation_observer", activation_observer, Observer, MinMaxObserver
        )
        self.selector: LayerSelector = _resolve_strategy("selector", selector, LayerSelector, LayerSelector)
        self.serializer: Serializer = _resolve_strategy("serializer", serializer, Serializer, SafetensorsSerializer)
        self.skip_types = check_types("skip_types", self.default_skip if skip_types is None else skip_types)
        if (scale_dtype, rounding) != (None, None) and isinstance(self.spec, CastSpec):
            raise ArgumentError(f"{self.name} has no codes; scale_dtype and rounding are for schemes with codes")
        self.scale_dtype = scale_dtype
        check_choice("ragged", ragged, get_args(Ragged))
        self.ragged = ragged

    def spec_for(self, info: TensorInfo) -> Spec:
        """The spec for one tensor; `info.layout` says which axes are rows. A rule of the selector overrides it."""
        return self.spec

    def quantize_tensor(self, weight: WeightMatrix, spec: QuantSpec, observer: Observer) -> QuantizedTensor:
        """Make the codes of one weight.

        Args:
            weight: the tensor as a matrix.
            spec: how the codes must look. Its `scale_dtype` is set, and `activations` is None.
            observer: the layer's own copy, after calibration.
        """
        return quantize(weight, spec, observer.observe_weight)

    def _plan(self, infos: Sequence[TensorInfo]) -> Ledger:
        """Decide the fate of every tensor."""
        infos = [
            attrs.evolve(info, skip=skip_reason(info, self.skip_types, self.name), min_elements=self.min_elements)
            for info in infos
        ]
        ledger = plan(infos, list(self.selector.select(infos)), self._choose)
        _refuse_ragged(ledger, self.ragged)
        return ledger

    def _choose(self, info: TensorInfo, decision: Decision) -> tuple[Spec, str]:
        """The spec for a tensor, and the reason for the ledger."""
        own = self.spec_for(info)
        spec = own if decision.override is None else decision.override.spec(own)
        reason = decision.reason if spec == self.spec or decision.override else f"{self.name} chose {spec} for it"
        if isinstance(spec, CastSpec):
            return spec, reason
        if self.scale_dtype is not None and (decision.override is None or spec.scale_dtype is None):
            spec = attrs.evolve(spec, scale_dtype=self.scale_dtype)
        resolved, reason = _resolve_spec(spec, info, self.ragged, reason)
        if not isinstance(resolved, QuantSpec) or isinstance(self.rounding, RoundToNearest):
            return resolved, reason
        return self.rounding.spec_for(resolved), f"{reason}; codes by {self.rounding!r}"

    def _makes_codes(self) -> bool:
        """Whether a subclass makes codes itself."""
        return getattr(self.quantize_tensor, "__func__", None) is not Scheme.quantize_tensor

    def _encoder(self) -> TensorEncoder:
        """The encoder with the strategies of this scheme."""
        scheme = type(self).__name__
        if not self._makes_codes():
            return TensorEncoder(scheme, [self.observer, self.rounding], self.rounding)
        # The ledger holds the decisions of the selector. `quantize_tensor` may read any other attribute.
        apart = {"selector", "serializer", "activation_observer", "_state", "_job"}
        settings = {name: value for name, value in vars(self).items() if name not in apart}
        return TensorEncoder(scheme, [type(self), settings], self.rounding, self.quantize_tensor)


def _resolve_strategy(name: str, value: Any, expected: type, default: Callable[[], Any]) -> Any:
    """Check that a strategy is an instance of its base class, and not the class itself. None gives the default.

    An observer may be given by its name, or as a mapping with its name and arguments.

    Raises:
        ArgumentError: if it is something else.
    """
    if value is None:
        return default()
    if expected is Observer and isinstance(value, (str, Mapping)):
        return make_observer(name, value)
    if not isinstance(value, expected):
        known = f", or the name of one: {', '.join(map(repr, OBSERVERS))};" if expected is Observer else ","
        raise ArgumentError(f"{name} must be an instance of {expected.__name__}{known} not {value!r}")
    return value


def _resolve_spec(spec: QuantSpec, info: TensorInfo, ragged: Ragged, reason: str) -> tuple[Spec, str]:
    """The spec that fits this tensor, and the reason for the ledger."""
    if not info.rounds_inputs:
        spec = spec.weight_only()
    if not info.declared:
        reason += "; cut by its shape, which input_axes can correct"
    if spec.group_size is None or info.layout is None:
        return spec, reason
    columns, size = info.layout.columns, spec.group_size
    if ragged == "auto" and columns < size:
        reason = f"rows of {columns} are shorter than one group of {size}"
    elif ragged == "fallback" and columns % size:
        reason = f"groups of {size} do not divide rows of {columns}"
    else:
        return spec, reason
    # Powers of two are too coarse for int8.
    scale_dtype = spec.scale_dtype if spec.scale_dtype in FLOAT_DTYPES else None
    return QuantSpec(bits=8, granularity="channel", scale_dtype=scale_dtype), reason


def _refuse_ragged(ledger: Ledger, ragged: Ragged) -> None:
    """Refuse rows that groups do not divide, if `ragged` is "error".

    Raises:
        SelectionError: naming every such tensor with its shape.
    """
    if ragged != "error":
        return
    found = [
        f"{row.name}, shape {row.shape}, rows of {row.layout.columns} in groups of {row.spec.group_size}"
        for row in ledger
        if isinstance(row.spec, QuantSpec) and row.layout is not None and row.spec.group_size is not None
        and row.layout.columns % row.spec.group_size
    ]  # fmt: skip
    if found:
        raise SelectionError(
            f"groups do not divide the rows of {len(found)} tensors: {'; '.join(found)}. Override their group_size, "
            "exclude them, or choose ragged='auto', 'shorter' or 'fallback'"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not one of the choices. Types must match too: 1 is not True.

    Raises:
        ArgumentError: listing the choices.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise ArgumentError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")
