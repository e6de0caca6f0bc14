"""`LedgerRow`: the fate of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_from_name, for_json
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec, spec_from_dict

Fate = Literal["quantized", "cast", "kept", "alias", "merged"]

#: fate -> (type of `spec`, whether `layout` is set, whether `alias_of` is set, whether `merged_into` is set).
_KINDS = {
    "quantized": (QuantSpec, True, False, False),
    "cast": (CastSpec, False, False, False),
    "kept": (type(None), False, False, False),
    "alias": (type(None), False, True, False),
    "merged": (type(None), False, False, True),
}

#: Functions that read the values of these fields from JSON.
_READ: dict[str, Callable[[Any], Any]] = {
    "shape": tuple,
    "dtype": dtype_from_name,
    "spec": spec_from_dict,
    "layout": lambda fields: Layout(**fields),
    "dequantized_from": dtype_from_name,
}

_is = attrs.validators.instance_of


def _is_size(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    if type(value) is not int or value < 0:
        raise ArgumentError(f"{attribute.name} must be an integer from 0 up, not {value!r}")


@attrs.frozen
class LedgerRow:
    """The fate of one tensor.

    Attributes:
        name: full dotted name.
        shape: the shape of the tensor.
        dtype: the dtype before quantization; if the source's codes are dequantized on reading, the dtype they get.
        fate: ``"quantized"``, ``"cast"``, ``"kept"``, ``"alias"`` of another tensor, or ``"merged"``: a scale of the
            source, used up when its weight is dequantized.
        reason: why the tensor has this fate.
        bytes_before: bytes in the source; 0 for an alias.
        bytes_after: bytes in the result, as predicted from shapes and spec.
        spec: the spec of the stored tensor; None unless quantized or cast.
        layout: the layout that cuts the tensor into rows and columns; None unless quantized.
        alias_of: the name whose storage it shares; None unless an alias.
        persistent: whether the source's state dict has it.
        dequantized_from: the dtype of the source's codes, if they are dequantized on reading; None otherwise.
        merged_into: the name of the weight whose scale this tensor is; None unless merged.
        tuned: whether tuning, or a merged adapter, changed the stored values after the conversion.
    """

    name: str = attrs.field(validator=_is(str))
    shape: tuple[int, ...] = attrs.field(validator=attrs.validators.deep_iterable(_is_size, _is(tuple)))
    dtype: torch.dtype = attrs.field(validator=_is(torch.dtype))
    fate: Fate = attrs.field(validator=attrs.validators.in_(get_args(Fate)))
    reason: str = attrs.field(validator=_is(str))
    bytes_before: int = attrs.field(validator=_is_size)
    bytes_after: int = attrs.field(validator=_is_size)
    spec: Spec | None = attrs.field(default=None, validator=_is((QuantSpec, CastSpec, type(None))))
    layout: Layout | None = attrs.field(default=None, validator=_is((Layout, type(None))))
    alias_of: str | None = attrs.field(default=None, validator=_is((str, type(None))))
    persistent: bool = attrs.field(default=True, validator=_is(bool))
    dequantized_from: torch.dtype | None = attrs.field(default=None, validator=_is((torch.dtype, type(None))))
    merged_into: str | None = attrs.field(default=None, validator=_is((str, type(None))))
    tuned: bool = attrs.field(default=False, validator=_is(bool))

    def __attrs_post_init__(self) -> None:
        """Refuse a row whose fields contradict one another.

        Raises:
            ArgumentError: if `spec`, `layout`, `alias_of` or `merged_into` do not fit the fate, the layout is for
                another shape, or a tensor without elements is quantized.
        """
        kinds = (type(self.spec), self.layout is not None, self.alias_of is not None, self.merged_into is not None)
        if kinds != _KINDS[self.fate] or (self.layout is not None and self.layout.shape != self.shape):
            raise ArgumentError(
                f"{self.name}: spec, layout, alias_of and merged_into do not fit a tensor of {self.shape} that is "
                f"{self.fate}"
            )
        if self.fate == "quantized" and 0 in self.shape:
            raise ArgumentError(f"{self.name}: a tensor of {self.shape} has no elements, and is never quantized")

    @property
    def holder(self) -> str:
        """The name under which the tensor is stored; for an alias, the other tensor's name."""
        return self.alias_of or self.name

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype in the source."""
        return self.dequantized_from or self.dtype

    @property
    def scheme(self) -> str:
        """The spec as text; "" without a spec."""
        return "" if self.spec is None else str(self.spec)

    def as_tuned(self) -> LedgerRow:
        """Return this row for a tensor whose values were tuned."""
        spec = attrs.evolve(self.spec, rounding="free") if isinstance(self.spec, QuantSpec) else self.spec
        return attrs.evolve(self, spec=spec, tuned=True, reason=f"{self.reason}; tuned")

    def continues(self, planned: LedgerRow) -> bool:
        """Tell whether this is a planned row, perhaps with remarks that were added to its reason, or tuned."""
        expected = planned.as_tuned() if self.tuned and not planned.tuned else planned
        return self.reason.startswith(planned.reason) and attrs.evolve(self, reason=expected.reason) == expected

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON; `from_dict` reads it."""
        return for_json(self) | {"scheme": self.scheme}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LedgerRow:
        """Read the result of `to_dict`."""
        given = {name: value for name, value in fields.items() if name != "scheme"}
        for name in given.keys() & _READ.keys():
            given[name] = None if given[name] is None else _READ[name](given[name])
        return cls(**given)
