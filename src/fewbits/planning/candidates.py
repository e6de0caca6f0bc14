"""Candidates: the settings among which every tensor gets one, and the rows that a ledger would have with each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from fewbits.checkpoint.codec import CODEC
from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.numerics.spec import SPECS, CastSpec, spec_of_scheme
from fewbits.observers.named import accepted_arguments
from fewbits.schemes import SCHEMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.patterns import Pattern, Patterns
from fewbits.selection.row import LedgerRow
from fewbits.selection.rules import is_embedding
from fewbits.sources.base import Source

#: A candidate as a user gives it: the name of a scheme, "keep", or a scheme with settings.
CandidateRule = str | Mapping[str, Any]

#: From about 2 to 8 bits, and the source itself. NF4 with two levels of scales has 4.2 bits.
DEFAULT_CANDIDATES: tuple[CandidateRule, ...] = (
    {"scheme": "int2", "group_size": 32, "scale_bits": 6},
    {"scheme": "int3", "group_size": 32, "scale_bits": 6},
    {"scheme": "nf4", "group_size": 32, "scale_bits": 6},
    {"scheme": "int5", "group_size": 32, "scale_bits": 6},
    {"scheme": "int6", "group_size": 64},
    "int8",
    "keep",
)

#: The settings of a scheme that a candidate may have.
_SETTINGS = ("group_size", "symmetric", "scale_dtype", "scale_bits")


@attrs.frozen
class Candidate:
    """One choice for a tensor.

    Attributes:
        scheme: the name of a scheme, or "keep".
        settings: settings of the scheme.
    """

    scheme: str
    settings: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of(cls, rule: CandidateRule) -> Candidate:
        """Parse a candidate.

        Raises:
            ArgumentError: for an unknown scheme or setting.
        """
        fields = {"scheme": rule} if isinstance(rule, str) else dict(rule) if isinstance(rule, Mapping) else {}
        scheme, unknown = fields.pop("scheme", None), [name for name in fields if name not in _SETTINGS]
        if scheme not in (*SPECS, "keep") or unknown or (scheme == "keep" and fields):
            raise ArgumentError(
                f"a candidate is a scheme ({', '.join(SPECS)}), 'keep', or a scheme with some of "
                f"{', '.join(_SETTINGS)}, such as {{'scheme': 'nf4', 'group_size': 32}}, not {rule!r}"
            )
        return cls(scheme, fields)

    def with_scales_of(self, config: QuantizationConfig) -> Candidate:
        """Return the candidate with the dtype of scales that a config has, unless it has its own, or takes none."""
        if config.scale_dtype is None or not self.makes_codes or not self._takes("scale_dtype"):
            return self
        return Candidate(self.scheme, {"scale_dtype": config.scale_dtype, **self.settings})

    @property
    def makes_codes(self) -> bool:
        """Whether it is a scheme with codes; otherwise it keeps or casts."""
        return self.scheme != "keep" and not isinstance(spec_of_scheme(self.scheme), CastSpec)

    @property
    def rule(self) -> str | dict[str, Any]:
        """The rule in a config."""
        return {"scheme": self.scheme, **self.settings} if self.settings else self.scheme

    @property
    def label(self) -> str:
        """A short name: the scheme, the group size and the bits of scales, such as ``"nf4:32:6"``."""
        parts = [self.settings.get("group_size"), self.settings.get("scale_bits")]
        return ":".join([self.scheme, *(str(part) for part in parts if part is not None)])

    def config(self, base: QuantizationConfig) -> QuantizationConfig:
        """Return a config with this scheme for all tensors that no other rule names.

        Raises:
            ArgumentError: if the scheme does not take a setting, or allows no such value.
        """
        scale_dtype = base.scale_dtype if self._takes("scale_dtype") else None
        settings = {"group_size": None, "symmetric": None, "scale_bits": None, "scale_dtype": scale_dtype}
        return base.replace(scheme=self.scheme, **{**settings, **self.settings})

    def _takes(self, setting: str) -> bool:
        return setting in accepted_arguments(SCHEMES[self.scheme])

    def derived(self, row: LedgerRow) -> LedgerRow:
        """Return the row of a tensor that this candidate keeps or casts, from its row with another candidate."""
        kept = attrs.evolve(row, fate="kept", reason="planned", spec=None, layout=None)
        if self.scheme != "keep":
            spec = spec_of_scheme(self.scheme).for_dtype(row.dtype)
            if isinstance(spec, CastSpec) and spec.dtype != row.dtype:
                kept = attrs.evolve(kept, fate="cast", spec=spec)
        return CODEC.sized(kept)


def parsed_candidates(rules: Iterable[CandidateRule] | None) -> tuple[Candidate, ...]:
    """Parse candidates; None gives the default ones.

    Raises:
        ArgumentError: for a malformed candidate, a candidate given twice, or a list without a scheme with codes.
    """
    if isinstance(rules, (str, Mapping)):
        raise ArgumentError(f"candidates must be a list, such as [{rules!r}, 'int8'], not {rules!r}")
    found = tuple(Candidate.of(rule) for rule in (DEFAULT_CANDIDATES if rules is None else rules))
    for number, candidate in enumerate(found):
        if candidate in found[:number]:
            raise ArgumentError(f"the candidate {candidate.label} is given twice")
    if not any(candidate.makes_codes for candidate in found):
        raise ArgumentError("give at least one candidate with codes, such as 'nf4' or 'int8'")
    return found


@attrs.frozen(eq=False, slots=False)
class Ledgers:
    """The ledger of a source with each candidate.

    Attributes:
        base: the settings that all candidates share.
        candidates: the candidates.
        of_codes: the ledgers of the candidates with codes, by the number of the candidate.
        fixed: names of tensors whose scheme a rule of the user fixes.
    """

    base: QuantizationConfig
    candidates: Sequence[Candidate]
    of_codes: Mapping[int, Ledger]
    fixed: frozenset[str]

    @classmethod
    def of(
        cls, source: object, entry: str | None, opened: Source, config: QuantizationConfig, found: Sequence[Candidate]
    ) -> Ledgers:
        """Plan a source with every candidate.

        Args:
            source: the source, as `fewbits.quantize` takes it.
            entry: its entry.
            opened: the same source, opened.
            config: the settings that all candidates share; embeddings get candidates too, unless it has a rule for
                them.
            found: the candidates.

        Raises:
            FewbitsError: as `Quantizer.prepare`.
        """
        found = [candidate.with_scales_of(config) for candidate in found]
        embeddings = [info for info in opened.infos if is_embedding(info) and info.obstacle is None]
        patterns = Patterns(Pattern(text) for text in config.overrides)
        fixed = {info.name for info in opened.infos if patterns.matching(info.name)}
        # A rule for embeddings would contradict that of an output layer with the same storage.
        elsewhere = {info.storage for info in opened.infos if info.name in fixed}
        if config.embeddings is not None:
            fixed.update(info.name for info in embeddings)
        elif embeddings and all(info.name in fixed or info.storage not in elsewhere for info in embeddings):
            config = config.replace(embeddings="quantize")
        coded = {number: candidate for number, candidate in enumerate(found) if candidate.makes_codes}
        plans = {number: planned(source, entry, one.config(config)) for number, one in coded.items()}
        return cls(config, found, plans, frozenset(fixed))

    @property
    def any(self) -> Ledger:
        """The ledger of the first candidate with codes."""
        return next(iter(self.of_codes.values()))

    def rows(self, name: str) -> list[LedgerRow]:
        """Return the row of a stored tensor with each candidate."""
        planned_rows = {number: ledger[name] for number, ledger in self.of_codes.items()}
        coded = next((row for row in planned_rows.values() if row.spec is not None), None)
        if coded is None or not self.fixed.isdisjoint(self._names[name]):
            return [self.any[name]] * len(self.candidates)
        return [
            planned_rows[number] if number in planned_rows else candidate.derived(coded)
            for number, candidate in enumerate(self.candidates)
        ]

    @cached_property
    def _names(self) -> Mapping[str, list[str]]:
        """All names of each stored tensor."""
        return self.any.names_by_holder()


def planned(source: object, entry: str | None, config: QuantizationConfig) -> Ledger:
    """Return the ledger of a source with a config; nothing is read but names, shapes and dtypes.

    Raises:
        FewbitsError: as `Quantizer.prepare`.
    """
    quantizer = config.quantizer()
    quantizer.prepare(source, entry=entry)
    ledger = quantizer.ledger
    quantizer.reset()
    return ledger
