"""Build the ``quantization_config`` for readers of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fewbits.formats.compressed_config import QUANT_METHOD
from fewbits.formats.compressed_rules import HEADS, WEIGHT, may_be_embedding
from fewbits.formats.compressed_scheme import Scheme, coded, rows_by_scheme, scheme_of
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


def quantization_config(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, Any]:
    """Build the configuration for weights that readers take; empty if no weight is stored as codes.

    The scheme that covers the most bytes applies to every Linear layer, so it still holds after a reader renames them.
    The other schemes list their weights by name.

    Args:
        ledger: the ledger of the result.
        vocabularies: vocabulary sizes of the model, as for `transformers_obstacles`.
    """
    groups = rows_by_scheme(ledger)
    if not groups:
        return {}
    patterns = _patterns(ledger)
    targets = {scheme: _targets(rows, patterns) for scheme, rows in groups.items()}
    first = next(iter(groups))
    targets[first] = [*_classes(ledger, vocabularies), *_targets(_heads(groups[first]), patterns)]
    formats = list(dict.fromkeys(scheme.format for scheme in groups))
    return {
        "quant_method": QUANT_METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": scheme.group(targets[scheme]) for number, scheme in enumerate(groups)},
        "ignore": _ignored(ledger, patterns),
        "kv_cache_scheme": None,
        # Transformers computes with dense weights either way. With `dequantize` it matches the names in the file before
        # it renames them, and it also works for callers that bypass its hooks, such as sentence-transformers. However,
        # it then applies the first scheme to all weights, so it must not be set for several schemes; and it does not
        # round inputs.
        "dequantize": len(groups) == 1 and first.activations is None,
    }


def _classes(ledger: Ledger, vocabularies: Collection[int]) -> list[str]:
    embeddings = any(may_be_embedding(row, vocabularies) for row, _ in coded(ledger))
    return ["Linear", "Embedding"] if embeddings else ["Linear"]


def _heads(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """The output layers among weights. In vLLM they are not Linear layers, so a name must match them."""
    return [row for row in rows if row.name.removesuffix(WEIGHT).rpartition(".")[2] in HEADS]


def _targets(rows: Iterable[LedgerRow], patterns: Mapping[str, str]) -> list[str]:
    # Files name experts one by one, but models fuse them, so no expert's name in a file matches a module.
    return list(dict.fromkeys(patterns[row.name] for row in rows if ".experts." not in row.name))


def _ignored(ledger: Ledger, patterns: Mapping[str, str]) -> list[str]:
    """Patterns of the layers without codes: kept layers in the file, and tied output layers, which the file omits."""
    kept = [patterns[row.name] for row in ledger if row.name in patterns and row.fate != "quantized"]
    names = {row.name.removesuffix(WEIGHT).rpartition(".")[2] for row, _ in coded(ledger)}
    return list(dict.fromkeys([*kept, *(rf"re:(.*\.)?{head}$" for head in HEADS if head not in names)]))


def _patterns(ledger: Ledger) -> dict[str, str]:
    """Map each weight of a possible Linear layer to its target pattern.

    Weights whose names differ only in numbers share a pattern if they have the same scheme. Otherwise each has its own.
    """
    names = {row.name: _escaped(row.name) for row in ledger if row.name.endswith(WEIGHT) and len(row.shape) == 2}
    alike = {name: re.sub(r"\d+", r"\\d+", escaped) for name, escaped in names.items()}
    schemes: dict[str, set[Scheme | None]] = {}
    for name, pattern in alike.items():
        schemes.setdefault(pattern, set()).add(scheme_of(ledger[name]))
    return {
        name: rf"re:(.*\.)?{alike[name] if len(schemes[alike[name]]) == 1 else escaped}$"
        for name, escaped in names.items()
    }


def _escaped(name: str) -> str:
    """The escaped module name of a weight, without the first component, which `AutoModel` may drop or add."""
    module = name.removesuffix(WEIGHT)
    _, dot, rest = module.partition(".")
    return re.escape(rest if dot and not rest[0].isdigit() else module)
