"""`QuantizationConfig`: all settings as one value, for Python, files and the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import attrs

from fewbits.calibration.batches import SAMPLES
from fewbits.config.reading import read
from fewbits.config.values import (
    Table,
    dtype_as_name,
    frozen,
    frozen_embeddings,
    frozen_overrides,
    frozen_sequence,
    in_order,
    is_number,
    is_table,
    one_of,
    or_none,
    plain,
    sequence_of,
    setting,
    whole,
)
from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.dtypes import SCALE_DTYPES, dtype_from_name, dtype_name
from fewbits.numerics.spec import Activations
from fewbits.observers.named import accepted_arguments, make_observer
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.outcome import OnFailure
from fewbits.quantizers.scheme import Ragged
from fewbits.rounding.named import resolve_rounding
from fewbits.schemes import SCHEMES
from fewbits.selection.nearest import checked_name, did_you_mean
from fewbits.selection.rules import OverrideRule, TypeRule, parse_rule, place_of_override
from fewbits.selection.selector import LayerSelector
from fewbits.validation.tensors import CRITICAL_DB

#: The format version that `QuantizationConfig.to_dict` writes and `QuantizationConfig.from_dict` reads.
VERSION = 1

#: The settings of a run; the others belong to the quantizer.
RUN_SETTINGS = ("samples", "fail_under", "on_failure")

_SCHEME_SETTINGS = ("group_size", "symmetric", "activations", "scale_dtype", "scale_bits", "ragged", "skip_types")
_RULES = accepted_arguments(LayerSelector)

#: The name of an observer, or a table with its ``name`` and its arguments.


def _check_scheme(_: Any, __: Any, scheme: object) -> None:
    checked_name("scheme", scheme, SCHEMES)


def _check_observer(_: Any, field: Any, recipe: object) -> None:
    if isinstance(recipe, (str, Table)):
        make_observer(field.name, recipe)
    elif recipe is not None:
        raise ArgumentError(
            f"{field.name} must be a name or a table in a config, such as 'percentile' or "
            f"{{'name': 'percentile', 'percentile': 99.9}}, not {recipe!r}; pass an observer of your own to "
            f"quantize(..., {field.name}=...)"
        )


def _check_rounding(_: Any, __: Any, recipe: object) -> None:
    if recipe is not None and not isinstance(recipe, (str, Table)):
        raise ArgumentError(
            f"rounding must be a name or a table in a config, such as 'gptq' or {{'name': 'gptq', 'damping': 0.05}}, "
            f"not {recipe!r}; pass a strategy of your own to quantize(..., rounding=...)"
        )
    resolve_rounding(recipe)


_PATTERNS, _are_names = "a list of name patterns, such as ['lm_head']", sequence_of(str)
_TYPES, _are_types = "a list of classes or their names, such as ['Embedding']", sequence_of(str, type)
_OVERRIDES = "a table by name pattern, such as {'lm_head': 'keep'}"
_AXES = "a table by name pattern, such as {'experts.*.weight': 1}"


@attrs.frozen(kw_only=True, repr=False)
class QuantizationConfig:
    """Every setting of `fewbits.quantize`, checked and immutable.

    None means the default of the scheme. Sequences become tuples, mappings become immutable mappings, and dtypes become
    names.

    Attributes:
        scheme: a name in `fewbits.schemes.SCHEMES`, such as ``"int8"``, ``"int4"`` or ``"nf4"``.
        group_size: how many neighbouring weights of a row share a scale, for schemes with groups.
        symmetric: whether there are no zero points, for schemes that support both.
        activations: whether layers round their inputs to int8 too: ``"dynamic"`` or ``"static"``; None: no.
        scale_dtype: the name of the dtype of stored scales; None takes the dtype of each weight.
        scale_bits: stores the scale of each group as a code of so many bits, 2 to 8, beside one scale for each row,
            for schemes with groups; None stores the scale itself.
        ragged: how to treat rows that groups do not divide; see `Quantizer`.
        observer: picks the scales of weights: a name in `fewbits.observers.OBSERVERS`, or a table with that ``name``
            and the observer's arguments.
        rounding: picks the codes: a name in `fewbits.rounding.ROUNDINGS`, or a table with that ``name`` and the
            strategy's arguments.
        activation_observer: picks the scales of inputs; given like `observer`.
        include: name patterns of tensors to quantize. For this and the next eight settings, see `LayerSelector`.
        exclude: name patterns of tensors to keep.
        include_types: classes, or names of classes.
        exclude_types: classes, or names of classes.
        modules_to_not_convert: `exclude` under another name.
        overrides: {pattern: a scheme's name, ``"keep"``, a table such as ``{"scheme": "int4", "group_size": 64}``,
            or a spec}; the last pattern that matches wins.
        embeddings: a rule as in `overrides`, for embeddings that no other rule names.
        input_axes: {pattern: the axes of the weight that are inputs}.
        min_elements: smaller tensors are kept unless a rule names them.
        skip_types: classes, or their names, that are kept unless a rule names them.
        samples: how many calibration samples to run; None: all.
        fail_under: SQNR in dB below which a tensor fails validation.
        on_failure: whether a failed validation raises (``"error"``), warns (``"warn"``), or only appears in the report
            (``"ignore"``).

    Raises:
        ArgumentError: for a value that is not allowed, or settings that contradict each other.
        SelectionError: for a malformed pattern.

    >>> config = QuantizationConfig(scheme="int4", group_size=64, overrides={"lm_head": "keep"})
    >>> config
    QuantizationConfig(scheme='int4', group_size=64, overrides={'lm_head': 'keep'})
    >>> config.replace(group_size=32).group_size
    32
    """

    scheme: str = attrs.field(default="int8", validator=_check_scheme)
    group_size: int | None = setting(None, "a whole number from 1 up, or None", or_none(whole(1)))
    symmetric: bool | None = attrs.field(default=None, validator=one_of(None, True, False))
    activations: Activations | None = attrs.field(default=None, validator=one_of(None, *get_args(Activations)))
    scale_dtype: str | None = attrs.field(
        default=None, converter=dtype_as_name, validator=one_of(None, *map(dtype_name, SCALE_DTYPES))
    )
    scale_bits: int | None = attrs.field(default=None, validator=one_of(None, *range(2, 9)))
    ragged: Ragged = attrs.field(default="auto", validator=one_of(*get_args(Ragged)))
    observer: str | Mapping[str, Any] | None = attrs.field(default=None, converter=frozen, validator=_check_observer)
    rounding: str | Mapping[str, Any] | None = attrs.field(default=None, converter=frozen, validator=_check_rounding)
    activation_observer: str | Mapping[str, Any] | None = attrs.field(
        default=None, converter=frozen, validator=_check_observer
    )
    include: Sequence[str] = setting((), _PATTERNS, _are_names, converter=frozen_sequence)
    exclude: Sequence[str] = setting((), _PATTERNS, _are_names, converter=frozen_sequence)
    include_types: Sequence[TypeRule] = setting((), _TYPES, _are_types, converter=frozen_sequence)
    exclude_types: Sequence[TypeRule] = setting((), _TYPES, _are_types, converter=frozen_sequence)
    modules_to_not_convert: Sequence[str] = setting((), _PATTERNS, _are_names, converter=frozen_sequence)
    overrides: Mapping[str, OverrideRule] = setting(
        Table({}), _OVERRIDES, is_table, converter=frozen_overrides, eq=in_order
    )
    embeddings: OverrideRule | None = attrs.field(default=None, converter=frozen_embeddings)
    input_axes: Mapping[str, int | Sequence[int]] = setting(Table({}), _AXES, is_table, converter=frozen, eq=in_order)
    min_elements: int | None = setting(None, "a whole number from 0 up, or None", or_none(whole(0)))
    skip_types: Sequence[TypeRule] | None = setting(
        None, "a list of classes or their names, or None", or_none(_are_types), converter=frozen_sequence
    )
    samples: int | None = setting(SAMPLES, "a whole number from 1 up, or None", or_none(whole(1)))
    fail_under: float = setting(CRITICAL_DB, "a number of dB", is_number)
    on_failure: OnFailure = attrs.field(default="error", validator=one_of(*get_args(OnFailure)))

    def __attrs_post_init__(self) -> None:
        # Raise errors of the scheme, the selector and the overrides now, not on first use.
        own = self.quantizer().spec
        rules = {place_of_override(pattern): rule for pattern, rule in self.overrides.items()}
        if self.embeddings is not None:
            rules["embeddings"] = self.embeddings
        for where, rule in rules.items():
            if (override := parse_rule(where, rule)) is not None:
                override.spec(own)

    def __repr__(self) -> str:
        return f"QuantizationConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in self.changed())})"

    def changed(self) -> tuple[str, ...]:
        """The names of the settings that differ from their defaults."""
        return tuple(name for name in SETTINGS if getattr(self, name) != _DEFAULTS[name])

    def replace(self, **settings: Any) -> QuantizationConfig:
        """Copy this config with some settings replaced. Lists and tables are replaced, not merged.

        Raises:
            ArgumentError: for an unknown setting, or a value that is not allowed.
            SelectionError: for a malformed rule.
        """
        check_settings(settings)
        return attrs.evolve(self, **settings)

    def quantizer(self, *, selector: LayerSelector | None = None, **strategies: Any) -> Quantizer:
        """Make a quantizer with these settings.

        Args:
            selector: replaces the default selector and its rules.
            strategies: other arguments of the scheme: an `observer`, `rounding` or `activation_observer`, which replace
                those of this config, or a `serializer`. None has no effect.

        Raises:
            ArgumentError: for a selector if the config has rules, or an argument that is no such strategy.
        """
        own = {name: getattr(self, name) for name in ("observer", "rounding", "activation_observer")}
        given = {name: value for name, value in strategies.items() if value is not None}
        settings = self._scheme_settings() | own | given
        return SCHEMES[self.scheme](selector=self._selector(selector), **settings)

    def to_dict(self) -> dict[str, Any]:
        """Describe the config for JSON: the version and all settings, with their defaults and classes by name.

        Defaults are included because they may change; `from_dict` reads the result.
        """
        return {"version": VERSION, **{name: plain(getattr(self, name)) for name in SETTINGS}}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> QuantizationConfig:
        """Read a table of settings, by hand or from `to_dict`.

        Args:
            settings: the settings by name. ``scheme`` is required. ``version`` defaults to 1.

        Raises:
            ArgumentError: for an unknown version, a missing scheme, an unknown setting, or a value that is not allowed.
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
        """Read a TOML or JSON file, by its suffix; see `from_dict` for its contents.

        Raises:
            ArgumentError: naming the file, if it cannot be read, or for the errors of `from_dict`.
            SelectionError: naming the file, for a malformed rule.
        """
        try:
            return cls.from_dict(read(Path(path)))
        except (ArgumentError, SelectionError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    def _selector(self, selector: LayerSelector | None) -> LayerSelector:
        rules = {name: getattr(self, name) for name in _RULES}
        if selector is None:
            return LayerSelector(**rules)
        given = [name for name in self.changed() if name in rules]
        if given:
            raise ArgumentError(
                f"{', '.join(given)}: rules of the default selector; pass them to your selector instead"
            )
        return selector

    def _scheme_settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _SCHEME_SETTINGS if getattr(self, name) is not None}
        for name in settings:
            taking = [scheme for scheme, cls in SCHEMES.items() if name in accepted_arguments(cls)]
            if self.scheme not in taking:
                known = ", ".join(map(repr, taking))
                raise ArgumentError(f"{self.scheme!r} does not take {name}, a setting of {known}")
        if self.scale_dtype is not None:
            settings["scale_dtype"] = dtype_from_name(self.scale_dtype)
        return settings


#: The names of all settings, in order.
SETTINGS = tuple(field.name for field in attrs.fields(QuantizationConfig))

_DEFAULTS = {name: getattr(QuantizationConfig(), name) for name in SETTINGS}


def check_settings(settings: Iterable[str], also: Iterable[str] = ()) -> None:
    """Refuse unknown settings.

    Args:
        settings: the names.
        also: further names to suggest for a misspelled one.

    Raises:
        ArgumentError: with the nearest setting, and all settings.
    """
    for name in settings:
        if name not in SETTINGS:
            near = did_you_mean(name, [*SETTINGS, *also])
            raise ArgumentError(f"there is no setting {name!r}{near}; there are {', '.join(SETTINGS)}")
