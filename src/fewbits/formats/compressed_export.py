"""Which results the readers of compressed-tensors take, and the ``quantization_config`` that makes them do so.

A Linear weight of ours has the tensors of their ``pack-quantized`` format already, so a configuration is all that
transformers, and what is built on it, needs to open a result. The keys are those of compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import attrs

from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.info import EMBEDDING_NAMES
from fewbits.selection.ledger import Ledger, LedgerRow

#: Output layers. Checkpoints leave them out where they are tied to the embedding; readers would expect codes for them.
_HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "decoder", "vocab_projector")

_WEIGHT = ".weight"


def export_obstacle(ledger: Ledger, vocabularies: Collection[int]) -> str | None:
    """Why the readers of compressed-tensors would not take a result; None if they take it.

    Args:
        ledger: of the result.
        vocabularies: how many tokens the model knows: a weight with so many rows is an embedding or an output layer.

    They read Linear layers, and embeddings where there is one scheme. For a quantized weight of any other class they
    keep random numbers, without an error, so any weight that may have another class is an obstacle.
    """
    several = len({_Scheme.of(row) for row in _quantized(ledger)}) > 1
    biases = {row.name.removesuffix(".bias"): row.shape for row in ledger if row.name.endswith(".bias")}
    for row in _quantized(ledger):
        if reason := _obstacle(row, biases.get(row.name.removesuffix(_WEIGHT))):
            return f"{row.name} {reason}"
        if several and _may_be_embedding(row, vocabularies):
            return f"{row.name} is a quantized embedding beside weights of another scheme; exclude it"
    return None


def _quantized(ledger: Ledger) -> list[LedgerRow]:
    return [row for row in ledger if row.fate == "quantized"]


def _obstacle(row: LedgerRow, bias: tuple[int, ...] | None) -> str | None:
    spec, shape = row.spec, row.shape
    if not isinstance(spec, QuantSpec) or row.layout is None:
        return None
    if not row.name.endswith(_WEIGHT) or len(shape) != 2 or row.layout != Layout.of(shape):
        return f"of shape {shape} is not the weight of a Linear layer or an embedding; exclude it"
    if bias is not None and bias != shape[:1]:
        return f"of shape {shape} has {bias[0]} biases, so its rows are inputs, not outputs; exclude it"
    return _obstacle_of_spec(spec, shape[1])


def _may_be_embedding(row: LedgerRow, vocabularies: Collection[int]) -> bool:
    parts = row.name.split(".")
    if parts[-2] in _HEADS:
        return False
    return row.shape[0] in vocabularies or not EMBEDDING_NAMES.isdisjoint(parts) or any("emb" in part for part in parts)


def _obstacle_of_spec(spec: QuantSpec, columns: int) -> str | None:
    if spec.bits not in (4, 8):
        return f"has {spec.bits} bits; 4 or 8 are read"
    if not spec.symmetric:
        return "has zero points; symmetric schemes are read"
    if spec.levels is not None:
        return "has codes that stand for levels; whole numbers are read"
    if spec.activations is not None:
        return "rounds its inputs too, which is not read"
    if spec.group_size is not None and columns % spec.group_size:
        return f"has rows of {columns}, which groups of {spec.group_size} do not divide; choose smaller groups"
    return None


def quantization_config(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, Any]:
    """The configuration for a result without an obstacle; empty if nothing in it has codes.

    The most common scheme becomes that of all Linear layers, since readers may rename them; others go by name.

    Args:
        ledger: of the result.
        vocabularies: as for `export_obstacle`.
    """
    groups: dict[_Scheme, list[LedgerRow]] = {}
    for row in _quantized(ledger):
        if (scheme := _Scheme.of(row)) is not None:
            groups.setdefault(scheme, []).append(row)
    if not groups:
        return {}
    first = max(groups, key=lambda scheme: sum(row.bytes_before for row in groups[scheme]))
    classes = ["Linear"]
    if any(_may_be_embedding(row, vocabularies) for row in _quantized(ledger)):
        classes.append("Embedding")
    patterns = _patterns(ledger)
    order = [first, *(scheme for scheme in groups if scheme != first)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": classes if scheme == first else _targets(groups[scheme], patterns),
                "format": "pack-quantized",
                "weights": scheme.weights(),
                "input_activations": None,
                "output_activations": None,
            }
            for number, scheme in enumerate(order)
        },
        "ignore": _ignored(ledger, patterns),
        "kv_cache_scheme": None,
        # Transformers computes with dense weights either way. Told so, it goes by the names of the file, whatever it
        # renames them to, and serves callers that pass by its hooks, as sentence-transformers does. It knows one
        # scheme then: of several it would use the first for all.
        "dequantize": len(groups) == 1,
    }


@attrs.frozen
class _Scheme:
    """A spec as the configuration describes it."""

    num_bits: int
    strategy: str
    group_size: int | None

    @classmethod
    def of(cls, row: LedgerRow) -> _Scheme | None:
        """The scheme of a weight; None if the weight has no codes."""
        spec = row.spec
        return cls(spec.bits, spec.granularity, spec.group_size) if isinstance(spec, QuantSpec) else None

    def weights(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "type": "int", "symmetric": True, "dynamic": False}


def _targets(rows: Iterable[LedgerRow], patterns: Mapping[str, str]) -> list[str]:
    # Experts are named one by one in files, and fused in models: no name of a file matches.
    return list(dict.fromkeys(patterns[row.name] for row in rows if ".experts." not in row.name))


def _ignored(ledger: Ledger, patterns: Mapping[str, str]) -> list[str]:
    """Layers without codes: those kept in the file, and tied output layers, which are in no file."""
    kept = [patterns[row.name] for row in ledger if row.name in patterns and row.fate != "quantized"]
    coded = {row.name.removesuffix(_WEIGHT).rpartition(".")[2] for row in _quantized(ledger)}
    return list(dict.fromkeys([*kept, *(rf"re:(.*\.)?{head}$" for head in _HEADS if head not in coded)]))


def _patterns(ledger: Ledger) -> dict[str, str]:
    """A target for each weight that could be a Linear layer's: one for all that differ in numbers only.

    Where these have several schemes, each weight has a target of its own.
    """
    names = {row.name: _escaped(row.name) for row in ledger if row.name.endswith(_WEIGHT) and len(row.shape) == 2}
    schemes: dict[str, set[_Scheme | None]] = {}
    for name, escaped in names.items():
        schemes.setdefault(_numbered(escaped), set()).add(_Scheme.of(ledger[name]))
    alike = {name: _numbered(escaped) for name, escaped in names.items()}
    return {
        name: rf"re:(.*\.)?{alike[name] if len(schemes[alike[name]]) == 1 else escaped}$"
        for name, escaped in names.items()
    }


def _escaped(name: str) -> str:
    """The module of a weight for a pattern, less the first part of its name, which `AutoModel` may drop or add."""
    module = name.removesuffix(_WEIGHT)
    _, dot, rest = module.partition(".")
    return re.escape(rest if dot and not rest[0].isdigit() else module)


def _numbered(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", name)
