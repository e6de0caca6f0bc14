"""Write and read the metadata of a fewbits file, as strings; ``docs/format.md`` describes every key."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from fewbits._version import __version__
from fewbits.checkpoint.codec import CODEC
from fewbits.checkpoint.header import parse_json
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import ArgumentError, DigestError, FewbitsError, FormatError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import Measurement
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: The version of the format that is written, and the only one that is read so far.
FORMAT_VERSION = 1

#: The keys of the two strings that are no JSON.
VERSION_KEY, HEADER_DIGEST_KEY = "fewbits.format_version", "fewbits.header_digest"

_PLACEHOLDER_DIGEST = "0" * 64
#: No float is longer in JSON.
_LONGEST_FLOAT = -2.2250738585072014e-308

#: Errors that JSON of an unexpected form may raise.
_UNREADABLE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, FewbitsError)

_is = attrs.validators.instance_of
_maps_strings = attrs.validators.deep_mapping(_is(str), _is(str), _is(dict))


def _check_figure(name: str, value: object) -> None:
    if value is not None and not (isinstance(value, (float, int)) and math.isfinite(value)):
        raise ArgumentError(f"{name} must be a finite number or None, not {value!r}")


def _is_figure(_: object, attribute: attrs.Attribute[float | None], value: object) -> None:
    _check_figure(attribute.name, value)


def _rounded(figure: float) -> float | None:
    """Return six significant digits; None for a figure that is not finite."""
    return float(f"{figure:.6g}") if math.isfinite(figure) else None


@attrs.frozen
class Metrics:
    """The measurement of one tensor, rounded for the file; None for a figure that is not finite.

    Attributes:
        sqnr_db: the ratio of signal to noise, in dB; None where there is no error at all.
        max_abs_error: the largest error.
        cosine: the cosine between original and decoded tensor.
        worst_bound_ratio: the largest ratio of an error to its bound.
    """

    sqnr_db: float | None = attrs.field(validator=_is_figure)
    max_abs_error: float | None = attrs.field(validator=_is_figure)
    cosine: float | None = attrs.field(validator=_is_figure)
    worst_bound_ratio: float | None = attrs.field(validator=_is_figure)

    @classmethod
    def of(cls, measurement: Measurement) -> Metrics:
        """Six significant digits of each figure."""
        figures = (getattr(measurement, field.name) for field in attrs.fields(cls))
        return cls(*map(_rounded, figures))

    def to_dict(self) -> dict[str, float | None]:
        """The figures by name."""
        return attrs.asdict(self)


@attrs.frozen
class Metadata:
    """Everything a file says about itself.

    Attributes:
        ledger: the fate of every tensor of the source, with spec and layout.
        architecture: the class of the model; None if the source had none.
        versions: the versions of fewbits and torch that wrote the file.
        metrics: the measurement of each tensor, by name; empty if nothing was measured.
        digests: SHA-256 of the bytes of every stored tensor, by its name in the file.
        output_sqnr_db: the SQNR of the outputs of layers, in dB, by the names of their weights; empty if their inputs
            were not seen. Infinite where the output has no error.
        model_metrics: how the outputs of the model compare with those of the float model; empty if it was not run.
        extra: other strings, carried over from the source.
    """

    ledger: Ledger
    architecture: str | None = attrs.field(default=None, validator=_is((str, type(None))))
    metrics: Mapping[str, Metrics] = attrs.field(factory=dict)
    digests: Mapping[str, str] = attrs.field(factory=dict, validator=_maps_strings)
    versions: Mapping[str, str] = attrs.field(
        factory=lambda: {"fewbits": __version__, "torch": str(torch.__version__)}, validator=_maps_strings
    )
    extra: Mapping[str, str] = attrs.field(factory=dict)
    output_sqnr_db: Mapping[str, float] = attrs.field(factory=dict)
    model_metrics: Mapping[str, float | None] = attrs.field(factory=dict)

    def placeholder_strings(self) -> dict[str, str]:
        """Strings as long as those of the complete file can get, before anything is measured or written."""
        longest = Metrics(*[_LONGEST_FLOAT] * 4)
        metrics = {row.name: longest for row in self.ledger if row.spec is not None}
        digests = dict.fromkeys(stored_entries(self.ledger), _PLACEHOLDER_DIGEST)
        complete = attrs.evolve(self, metrics=metrics, digests=digests)
        return complete._strings() | {HEADER_DIGEST_KEY: _PLACEHOLDER_DIGEST}

    def to_strings(self, entries: Mapping[str, Entry]) -> dict[str, str]:
        """The header's strings, with a digest of the header itself."""
        strings = self._strings()
        return strings | {HEADER_DIGEST_KEY: header_digest(strings, entries)}

    def _strings(self) -> dict[str, str]:
        metrics = {name: _rounded(f) if isinstance(f, float) else f for name, f in self.model_metrics.items()}
        of_data = {"fewbits.output_sqnr_db": self._own_outputs(), "fewbits.model_metrics": metrics}
        return (
            dict(self.extra)
            | {key: _dump(figures) for key, figures in of_data.items() if figures}
            | {
                "format": "pt",
                VERSION_KEY: str(FORMAT_VERSION),
                "fewbits.ledger": _dump([row.to_dict() for row in self.ledger]),
                "fewbits.architecture": _dump(self.architecture),
                "fewbits.versions": _dump(dict(self.versions)),
                "fewbits.metrics": _dump({name: metrics.to_dict() for name, metrics in self.metrics.items()}),
                "fewbits.digests": _dump(dict(self.digests)),
            }
        )

    def _own_outputs(self) -> dict[str, float | None]:
        """The figures of the tensors in this file: null if infinite, left out if the output has no signal."""
        found = ((row.name, self.output_sqnr_db.get(row.name, -math.inf)) for row in self.ledger)
        return {name: _rounded(figure) for name, figure in found if figure > -math.inf}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], entries: Mapping[str, Entry], where: object) -> Metadata:
        """Read back the strings of `to_strings`, and check them against the file's entries.

        Raises:
            FormatError: if it was not written by fewbits, by a version of the format that is not known, or its
                parts contradict one another.
            DigestError: if the header has changed since it was written.
        """
        version = strings.get(VERSION_KEY)
        if version is None:
            raise FormatError(f"{where} was not written by fewbits; quantize it first")
        if version != str(FORMAT_VERSION):
            raise FormatError(f"{where} has format version {version}; this release of fewbits reads {FORMAT_VERSION}")
        if strings.get(HEADER_DIGEST_KEY) != header_digest(strings, entries):
            raise DigestError(f"{where}: the header has changed since it was written; the file is damaged")
        try:
            metadata = cls._parse(strings, where)
        except _UNREADABLE as error:
            raise FormatError(f"{where}: the metadata cannot be read: {error}") from error
        metadata._check(entries, where)
        return metadata

    @classmethod
    def _parse(cls, strings: Mapping[str, str], where: object) -> Metadata:
        fields = {key: parse_json(strings[f"fewbits.{key}"], where, key) for key in
                  ("ledger", "architecture", "versions", "metrics", "digests")}  # fmt: skip
        return cls(
            ledger=Ledger(LedgerRow.from_dict(row) for row in fields["ledger"]),
            architecture=fields["architecture"],
            versions=fields["versions"],
            metrics={name: Metrics(**metrics) for name, metrics in fields["metrics"].items()},
            digests=fields["digests"],
            output_sqnr_db={
                name: math.inf if figure is None else figure
                for name, figure in _figures(strings, "output_sqnr_db", where).items()
            },
            model_metrics=_figures(strings, "model_metrics", where),
            extra={key: value for key, value in strings.items() if key != "format" and not is_own_key(key)},
        )

    def _check(self, entries: Mapping[str, Entry], where: object) -> None:
        quantized = {row.name for row in self.ledger if row.fate == "quantized"}
        if unknown := sorted(self.output_sqnr_db.keys() - quantized):
            raise FormatError(f"{where}: outputs of {', '.join(unknown)} were measured, but these are not quantized")
        expected = stored_entries(self.ledger)
        for name in sorted(expected.keys() | entries.keys()):
            if expected.get(name) != entries.get(name):
                raise FormatError(
                    f"{where}: the ledger announces {name} as {expected.get(name)}, the file has {entries.get(name)}"
                )
        for row in self.ledger:
            before = {0 if row.fate == "alias" else Entry(row.shape, row.source_dtype).nbytes}
            if row.fate == "merged":
                before.add(0)  # of two scales that share their bytes, one counts them
            if row.bytes_before not in before or row.bytes_after != CODEC.nbytes(row):
                raise FormatError(f"{where}: the ledger's bytes of {row.name} are not those of its shape and dtype")
        if self.digests.keys() != entries.keys():
            unsigned = sorted(self.digests.keys() ^ entries.keys())
            raise FormatError(f"{where}: tensors without a digest, or digests without a tensor: {', '.join(unsigned)}")


def _figures(strings: Mapping[str, str], key: str, where: object) -> dict[str, float | None]:
    """Read the figures under a key that a file may lack."""
    figures = parse_json(strings.get(f"fewbits.{key}", "{}"), where, key)
    if not isinstance(figures, dict):
        raise ArgumentError(f"{key} must hold figures by name, not {figures!r}")
    for name, figure in figures.items():
        _check_figure(f"{key} of {name}", figure)
    return figures


def is_own_key(key: str) -> bool:
    """Whether a metadata key belongs to fewbits."""
    return key.startswith("fewbits.")


def stored_entries(ledger: Ledger) -> dict[str, Entry]:
    """Describe the tensors of a file with this ledger, by name.

    Raises:
        FormatError: if two tensors would have the same name in the file.
    """
    entries: dict[str, Entry] = {}
    for row in ledger:
        for name, entry in CODEC.entries(row).items():
            if name in entries:
                raise FormatError(
                    f"{name!r} would be in the file twice, once as a part of a quantized tensor; rename or exclude one"
                )
            entries[name] = entry
    return entries


def header_digest(strings: Mapping[str, str], entries: Mapping[str, Entry]) -> str:
    """SHA-256 of everything else in the header, in one canonical form."""
    described = {name: [dtype_name(entry.dtype), *entry.shape] for name, entry in entries.items()}
    others = {key: value for key, value in strings.items() if key != HEADER_DIGEST_KEY}
    return hashlib.sha256(json.dumps([others, described], sort_keys=True).encode()).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
