"""Export results to readers of compressed-tensors: what they can read, and the ``quantization_config`` they need.

The tensors of a Linear weight in a fewbits file already follow the ``pack-quantized`` format. Transformers, and
libraries built on it, therefore need only a configuration to open a result. Its keys follow compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.info import EMBEDDING_NAMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: Names of output layers. A checkpoint omits an output layer that is tied to the embedding. Readers would still expect
#: codes for it, so the config must list it under ``ignore``.
_HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "decoder", "vocab_projector")

_WEIGHT = ".weight"

#: The description of a group's weights in the configuration, as pairs of key and value.
_Scheme = tuple[tuple[str, Any], ...]


def export_obstacle(ledger: Ledger, vocabularies: Collection[int]) -> str | None:
    """Explain why readers of compressed-tensors cannot open a result; None if they can.

    They read Linear layers, and also embeddings if all weights have the same scheme. They leave quantized weights of
    other classes at random values, without an error. Any weight that may have such a class is therefore an obstacle.

    Args:
        ledger: the ledger of the result.
        vocabularies: vocabulary sizes of the model. A weight with as many rows is an embedding or an output layer.
    """
    coded = _coded(ledger)
    several = len({_scheme(spec) for _, spec in coded}) > 1
    biases = {row.name.removesuffix(".bias"): row.shape for row in ledger if row.name.endswith(".bias")}
    for row, spec in coded:
        if reason := _obstacle(row, biases.get(row.name.removesuffix(_WEIGHT))) or _obstacle_of_spec(
            spec, row.shape[1]
        ):
            return f"{row.name} {reason}"
        if several and _may_be_embedding(row, vocabularies):
            return f"{row.name} is a quantized embedding beside weights of another scheme; exclude it"
    return None


def _coded(ledger: Ledger) -> list[tuple[LedgerRow, QuantSpec]]:
    return [(row, row.spec) for row in ledger if isinstance(row.spec, QuantSpec)]


def _scheme(spec: QuantSpec) -> _Scheme:
    sizes = (("num_bits", spec.bits), ("strategy", spec.granularity), ("group_size", spec.group_size))
    return (*sizes, ("type", "int"), ("symmetric", True), ("dynamic", False))


def _obstacle(row: LedgerRow, bias: tuple[int, ...] | None) -> str | None:
    shape = row.shape
    if not row.name.endswith(_WEIGHT) or len(shape) != 2 or row.layout != Layout.of(shape):
        return f"of shape {shape} is not the weight of a Linear layer or an embedding; exclude it"
    if bias is not None and bias != shape[:1]:
        return f"of shape {shape} has a bias of {bias[0]} elements, so its rows are inputs, not outputs; exclude it"
    return None


def _may_be_embedding(row: LedgerRow, vocabularies: Collection[int]) -> bool:
    parts = row.name.split(".")
    if parts[-2] in _HEADS:
        return False
    return row.shape[0] in vocabularies or not EMBEDDING_NAMES.isdisjoint(parts) or any("emb" in part for part in parts)


def _obstacle_of_spec(spec: QuantSpec, columns: int) -> str | None:
    size = spec.group_size
    obstacles = {
        f"has {spec.bits}-bit codes; transformers reads 4 or 8 bits": spec.bits not in (4, 8),
        "has zero points; transformers reads symmetric schemes only": not spec.symmetric,
        "has a table of levels; transformers reads integer codes only": spec.levels is not None,
        "has two levels of scales (scale_bits); transformers reads one level only": spec.scale_bits is not None,
        "quantizes its inputs too, which transformers does not read": spec.activations is not None,
        f"has rows of {columns} elements, not a multiple of the group size {size}; choose smaller groups": bool(
            size and columns % size
        ),
    }
    return next((obstacle for obstacle, holds in obstacles.items() if holds), None)


def quantization_config(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, Any]:
    """Build the configuration for a result that has no `export_obstacle`; empty if no weight is stored as codes.

    The scheme that covers the most bytes applies to every Linear layer, so it still holds after a reader renames them.
    The other schemes list their weights by name.

    Args:
        ledger: the ledger of the result.
        vocabularies: vocabulary sizes of the model, as for `export_obstacle`.
    """
    groups: dict[_Scheme, list[LedgerRow]] = {}
    for row, spec in _coded(ledger):
        groups.setdefault(_scheme(spec), []).append(row)
    if not groups:
        return {}
    first = max(groups, key=lambda scheme: sum(row.bytes_before for row in groups[scheme]))
    embeddings = any(_may_be_embedding(row, vocabularies) for row, _ in _coded(ledger))
    classes = ["Linear", "Embedding"] if embeddings else ["Linear"]
    patterns = _patterns(ledger)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": classes if scheme == first else _targets(groups[scheme], patterns),
                "format": "pack-quantized",
                "weights": dict(scheme),
                "input_activations": None,
                "output_activations": None,
            }
            for number, scheme in enumerate(dict.fromkeys([first, *groups]))
        },
        "ignore": _ignored(ledger, patterns),
        "kv_cache_scheme": None,
        # Transformers computes with dense weights either way. With `dequantize` it matches the names in the file before
        # it renames them, and it also works for callers that bypass its hooks, such as sentence-transformers. However,
        # it then applies the first scheme to all weights, so it must not be set for several schemes.
        "dequantize": len(groups) == 1,
    }


def _targets(rows: Iterable[LedgerRow], patterns: Mapping[str, str]) -> list[str]:
    # Files name experts one by one, but models fuse them, so no expert's name in a file matches a module.
    return list(dict.fromkeys(patterns[row.name] for row in rows if ".experts." not in row.name))


def _ignored(ledger: Ledger, patterns: Mapping[str, str]) -> list[str]:
    """Patterns of the layers without codes: kept layers in the file, and tied output layers, which the file omits."""
    kept = [patterns[row.name] for row in ledger if row.name in patterns and row.fate != "quantized"]
    coded = {row.name.removesuffix(_WEIGHT).rpartition(".")[2] for row, _ in _coded(ledger)}
    return list(dict.fromkeys([*kept, *(rf"re:(.*\.)?{head}$" for head in _HEADS if head not in coded)]))


def _patterns(ledger: Ledger) -> dict[str, str]:
    """Map each weight of a possible Linear layer to its target pattern.

    Weights whose names differ only in numbers share a pattern if they have the same scheme. Otherwise each has its own.
    """
    names = {row.name: _escaped(row.name) for row in ledger if row.name.endswith(_WEIGHT) and len(row.shape) == 2}
    alike = {name: re.sub(r"\d+", r"\\d+", escaped) for name, escaped in names.items()}
    schemes: dict[str, set[object]] = {}
    for name, pattern in alike.items():
        spec = ledger[name].spec
        schemes.setdefault(pattern, set()).add(_scheme(spec) if isinstance(spec, QuantSpec) else None)
    return {
        name: rf"re:(.*\.)?{alike[name] if len(schemes[alike[name]]) == 1 else escaped}$"
        for name, escaped in names.items()
    }


def _escaped(name: str) -> str:
    """The escaped module name of a weight, without the first component, which `AutoModel` may drop or add."""
    module = name.removesuffix(_WEIGHT)
    _, dot, rest = module.partition(".")
    return re.escape(rest if dot and not rest[0].isdigit() else module)
