"""`QuantizationConfig`: every setting as one value, for Python, for files and for the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import attrs

from fewbits.calibration import SAMPLES
from fewbits.checkpoint.serializer import Serializer
from fewbits.config.reading import read
from fewbits.config.values import (
    Table,
    dtype_as_name,
    frozen,
    frozen_overrides,
    frozen_sequence,
    in_order,
    is_number,
    is_table,
    must_be,
    one_of,
    or_none,
    plain,
    sequence_of,
    whole,
)
from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_from_name, dtype_name
from fewbits.numerics.spec import Activations
from fewbits.observers.named import ObserverRecipe, make_observer
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.outcome import OnFailure
from fewbits.quantizers.resolving import Ragged
from fewbits.quantizers.schemes import SCHEMES, takers
from fewbits.selection.nearest import checked_name, did_you_mean
from fewbits.selection.rules import OverrideRule, TypeRule, parse_override
from fewbits.selection.selector import LayerSelector, Selector
from fewbits.validation.report import CRITICAL_DB

#: The version of the form that `QuantizationConfig.to_dict` writes and `QuantizationConfig.from_dict` reads.
VERSION = 1

#: The settings of a run; all others belong to the quantizer.
RUN_SETTINGS = ("samples", "fail_under", "on_failure")

_SCHEME_SETTINGS = ("group_size", "symmetric", "activations", "scale_dtype", "ragged", "skip_types")
_RULES = (
    *("include", "exclude", "include_types", "exclude_types", "modules_to_not_convert"),
    *("overrides", "input_axes", "min_elements"),
)


def _check_scheme(_: Any, __: Any, scheme: object) -> None:
    checked_name("scheme", scheme, SCHEMES)


def _check_observer(_: Any, field: Any, recipe: object) -> None:
    if isinstance(recipe, (str, Table)):
        make_observer(field.name, recipe)
    elif recipe is not None:
        raise ArgumentError(
            f"{field.name} is named in a config, such as 'percentile' or {{'name': 'percentile', 'percentile': 99.9}}, "
            f"not {recipe!r}; an observer of your own goes to quantize(..., {field.name}=...)"
        )


_PATTERNS = must_be("a list of name patterns, such as ['lm_head']", sequence_of(str))
_TYPES = must_be("a list of classes or their names, such as ['Embedding']", sequence_of(str, type))
_OVERRIDES = must_be("a table by name pattern, such as {'lm_head': 'keep'}", is_table)
_AXES = must_be("a table by name pattern, such as {'experts.*.weight': 1}", is_table)


@attrs.frozen(kw_only=True, repr=False)
class QuantizationConfig:
    """Every setting of `fewbits.quantize`, checked, immutable, and the same wherever it comes from.

    None stands for the scheme's own choice. Whatever goes in, sequences are held as tuples, mappings as immutable
    mappings, and dtypes by name.

    Attributes:
        scheme: ``"int8"``, ``"int8-tensor"``, ``"int4"`` or ``"fp16"``.
        group_size: weights of a row that share a scale, for schemes with groups.
        symmetric: without zero points, for schemes that leave the choice.
        activations: whether layers round their inputs to int8 too: ``"dynamic"`` or ``"static"``; None: no.
        scale_dtype: the name of the dtype that scales are stored in; None stands for each weight's own.
        ragged: what becomes of rows that groups do not divide; see `Quantizer`.
        observer: picks the scales of weights: a name in `fewbits.observers.OBSERVERS`, or a table with that ``name``
            and the observer's arguments.
        activation_observer: likewise for the inputs of layers.
        include: see `LayerSelector`, as for the next seven.
        exclude: name patterns of what is kept.
        include_types: classes, or names of classes.
        exclude_types: classes, or names of classes.
        modules_to_not_convert: `exclude` under another name.
        overrides: {pattern: a scheme's name, ``"keep"``, a table such as ``{"scheme": "int4", "group_size": 64}``,
            or a spec}; the last pattern that matches wins.
        input_axes: {pattern: the axes of the weight that are inputs}.
        min_elements: smaller tensors are kept unless a rule names them.
        skip_types: classes, or their names, that are kept unless a rule names them.
        samples: how many calibration samples are looked at; None: all that come.
        fail_under: SQNR in dB below which a tensor fails validation.
        on_failure: whether a failed validation is an ``"error"``, a ``"warn"``ing, or is left to the report
            (``"ignore"``).

    Raises:
        ArgumentError: for a value outside what is listed here, or settings that do not go together.
        SelectionError: for a malformed pattern.

    >>> config = QuantizationConfig(scheme="int4", group_size=64, overrides={"lm_head": "keep"})
    >>> config
    QuantizationConfig(scheme='int4', group_size=64, overrides={'lm_head': 'keep'})
    >>> config.replace(group_size=32).group_size
    32
    """

    scheme: str = attrs.field(default="int8", validator=_check_scheme)
    group_size: int | None = attrs.field(
        default=None, validator=must_be("a whole number from 1 up, or None", or_none(whole(1)))
    )
    symmetric: bool | None = attrs.field(default=None, validator=one_of(None, True, False))
    activations: Activations | None = attrs.field(default=None, validator=one_of(None, *get_args(Activations)))
    scale_dtype: str | None = attrs.field(
        default=None, converter=dtype_as_name, validator=one_of(None, *map(dtype_name, FLOAT_DTYPES))
    )
    ragged: Ragged = attrs.field(default="auto", validator=one_of(*get_args(Ragged)))
    observer: str | Mapping[str, Any] | None = attrs.field(default=None, converter=frozen, validator=_check_observer)
    activation_observer: str | Mapping[str, Any] | None = attrs.field(
        default=None, converter=frozen, validator=_check_observer
    )
    include: Sequence[str] = attrs.field(default=(), converter=frozen_sequence, validator=_PATTERNS)
    exclude: Sequence[str] = attrs.field(default=(), converter=frozen_sequence, validator=_PATTERNS)
    include_types: Sequence[TypeRule] = attrs.field(default=(), converter=frozen_sequence, validator=_TYPES)
    exclude_types: Sequence[TypeRule] = attrs.field(default=(), converter=frozen_sequence, validator=_TYPES)
    modules_to_not_convert: Sequence[str] = attrs.field(default=(), converter=frozen_sequence, validator=_PATTERNS)
    overrides: Mapping[str, OverrideRule] = attrs.field(
        factory=dict, converter=frozen_overrides, validator=_OVERRIDES, eq=in_order
    )
    input_axes: Mapping[str, int | Sequence[int]] = attrs.field(
        factory=dict, converter=frozen, validator=_AXES, eq=in_order
    )
    min_elements: int | None = attrs.field(
        default=None, validator=must_be("a whole number from 0 up, or None", or_none(whole(0)))
    )
    skip_types: Sequence[TypeRule] | None = attrs.field(
        default=None,
        converter=frozen_sequence,
        validator=must_be("a list of classes or their names, or None", or_none(sequence_of(str, type))),
    )
    samples: int | None = attrs.field(
        default=SAMPLES, validator=must_be("a whole number from 1 up, or None", or_none(whole(1)))
    )
    fail_under: float = attrs.field(default=CRITICAL_DB, validator=must_be("a number of dB", is_number))
    on_failure: OnFailure = attrs.field(default="error", validator=one_of(*get_args(OnFailure)))

    def __attrs_post_init__(self) -> None:
        # What the scheme, the selector or a spec refuses is refused here, not on first use.
        own = self.quantizer().spec
        for pattern, rule in self.overrides.items():
            if (override := parse_override(pattern, rule)) is not None:
                override.spec(own)

    def __repr__(self) -> str:
        return f"QuantizationConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in self.changed())})"

    def changed(self) -> tuple[str, ...]:
        """The names of the settings that are not as they are by default."""
        return tuple(name for name in SETTINGS if getattr(self, name) != _DEFAULTS[name])

    def replace(self, **settings: Any) -> QuantizationConfig:
        """This config with some settings replaced, each as a whole: lists and tables are not joined.

        Raises:
            ArgumentError: for a setting that does not exist, or as for the config itself.
            SelectionError: for a malformed rule.
        """
        check_settings(settings)
        return attrs.evolve(self, **settings)

    def quantizer(
        self,
        *,
        observer: ObserverRecipe | None = None,
        activation_observer: ObserverRecipe | None = None,
        selector: Selector | None = None,
        serializer: Serializer | None = None,
    ) -> Quantizer:
        """A new quantizer with these settings.

        Args:
            observer: used in place of the `observer` that is named here.
            activation_observer: used in place of the `activation_observer` that is named here.
            selector: used in place of the default one, whose rules are settings.
            serializer: writes and reads the result; None stands for safetensors.

        Raises:
            ArgumentError: for a selector where rules are set, or what is no strategy of its kind.
        """
        return SCHEMES[self.scheme](
            observer=self.observer if observer is None else observer,
            activation_observer=self.activation_observer if activation_observer is None else activation_observer,
            selector=self._selector(selector),
            serializer=serializer,
            **self._scheme_settings(),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description that `from_dict` reads: the version, and every setting, defaults included.

        Whoever reads it need not know the defaults of the day. Classes are written by name.
        """
        return {"version": VERSION, **{name: plain(getattr(self, name)) for name in SETTINGS}}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> QuantizationConfig:
        """Read back what `to_dict` wrote, or what was written by hand: without ``version`` it is taken as version 1.

        Args:
            settings: the settings by name. ``scheme`` must be there, all others may be left out.

        Raises:
            ArgumentError: for an unknown version, a missing scheme, a setting that does not exist, or a value that is
                not allowed.
            SelectionError: for a malformed rule.
        """
        if not isinstance(settings, Mapping):
            raise ArgumentError(f"a config is a table of settings, not {settings!r}")
        given = dict(settings)
        version = given.pop("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise ArgumentError(
                f"version must be {VERSION}, not {version!r}; a config of a later version needs a later fewbits"
            )
        check_settings(given)
        if "scheme" not in given:
            raise ArgumentError(f"scheme is missing; there are {', '.join(map(repr, SCHEMES))}")
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> QuantizationConfig:
        """Read a TOML or JSON file, by its suffix; what is in it is said at `from_dict`.

        Raises:
            ArgumentError: naming the file, if it cannot be read, or for what `from_dict` refuses.
            SelectionError: naming the file, for a malformed rule.
        """
        try:
            return cls.from_dict(read(Path(path)))
        except (ArgumentError, SelectionError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    def _selector(self, selector: Selector | None) -> Selector:
        rules = {name: getattr(self, name) for name in _RULES}
        if selector is None:
            return LayerSelector(**rules)
        given = [name for name in self.changed() if name in rules]
        if given:
            raise ArgumentError(f"{', '.join(given)}: rules of the default selector; give them to yours instead")
        return selector

    def _scheme_settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _SCHEME_SETTINGS if getattr(self, name) is not None}
        for name in settings:
            taking = takers(name)
            if self.scheme not in taking:
                known = " and ".join(map(repr, taking))
                raise ArgumentError(f"{self.scheme!r} does not take {name}, which goes with {known}")
        if self.scale_dtype is not None:
            settings["scale_dtype"] = dtype_from_name(self.scale_dtype)
        return settings


#: The names of all settings, in order.
SETTINGS = tuple(field.name for field in attrs.fields(QuantizationConfig))

_DEFAULTS = {name: getattr(QuantizationConfig(), name) for name in SETTINGS}


def check_settings(settings: Iterable[str], also: Iterable[str] = ()) -> None:
    """Refuse names that are no settings.

    Args:
        settings: the names.
        also: further names that may have been meant.

    Raises:
        ArgumentError: with the nearest setting, and all that there are.
    """
    for name in settings:
        if name not in SETTINGS:
            near = did_you_mean(name, [*SETTINGS, *also])
            raise ArgumentError(f"there is no setting {name!r}{near}; there are {', '.join(SETTINGS)}")
