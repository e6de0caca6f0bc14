"""Which weights readers of compressed-tensors take, and why they do not take the others.

Transformers reads Linear layers, and also embeddings if all weights have the same scheme. It leaves quantized weights
of other classes at random values, without an error. Any weight that may have such a class is therefore an obstacle.
Servers (vLLM, SGLang) also join some layers, whose weights must then have the same scheme.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch

from fewbits.formats.compressed_scheme import Scheme, coded, rows_by_scheme, scheme_of
from fewbits.numerics.dtypes import FLOAT_DTYPES, POWERS_OF_TWO, dtype_name
from fewbits.numerics.float8 import float8_dtype
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.info import EMBEDDING_NAMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

WEIGHT = ".weight"

#: Names of output layers. A checkpoint omits an output layer that is tied to the embedding.
HEADS = ("lm_head", "embed_out", "output_projection", "proj_out", "decoder", "vocab_projector")

#: Layers that servers join into one.
_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)

#: The name of an expert's tensor: the module that holds the experts, and the number of the expert.
_EXPERT = re.compile(r"(.*?\.|)experts\.(\d+)\.")

#: Group sizes for which servers have kernels.
_GROUP_SIZES = (32, 64, 128)

#: Scale dtypes that each weight dtype holds exactly, besides itself.
_NARROWER = {
    torch.bfloat16: (POWERS_OF_TWO,),
    torch.float32: (torch.float16, torch.bfloat16, POWERS_OF_TWO),
    torch.float64: (torch.float32, torch.float16, torch.bfloat16, POWERS_OF_TWO),
}


def transformers_obstacles(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, str]:
    """Explain, by the name of each weight, why transformers cannot read a fewbits file; empty if it can.

    The tensors of a Linear weight in a fewbits file already follow the ``pack-quantized`` format.

    Args:
        ledger: the ledger of the file.
        vocabularies: vocabulary sizes of the model. A weight with as many rows is an embedding or an output layer.
    """
    found = unholdable(ledger)
    for row, spec in coded(ledger):
        if spec.levels is not None:
            found[row.name] = "has a table of levels; transformers reads integer codes only"
        elif spec.activations is not None:
            found[row.name] = "quantizes its inputs too, which transformers does not read"
        elif spec.for_dtype(row.dtype).scale_dtype not in FLOAT_DTYPES:
            found[row.name] = "has scales that are powers of two in one byte, which transformers does not read"
    return _in_order(ledger, found, unread(ledger), mixtures(ledger, vocabularies))


def server_obstacles(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, str]:
    """Explain, by the name of each weight, why not all readers take an exported checkpoint; empty if they do.

    Args:
        ledger: the ledger of the exported checkpoint; see `transformers_obstacles`.
        vocabularies: vocabulary sizes of the model.
    """
    found: dict[str, str] = {}
    for row, spec in coded(ledger):
        if may_be_embedding(row, vocabularies):
            found[row.name] = "is a quantized embedding, which only some readers take; exclude it"
        elif spec.group_size not in (None, *_GROUP_SIZES):
            sizes = ", ".join(map(str, _GROUP_SIZES))
            found[row.name] = f"has groups of {spec.group_size}; vLLM and SGLang have kernels for {sizes}"
    routers = dict.fromkeys(_routers(ledger), "is the router of experts, which vLLM reads as floats; exclude it")
    joined = dict(_joined_obstacles(ledger))
    return _in_order(ledger, unread(ledger), mixtures(ledger, vocabularies), found, routers, joined)


def _in_order(ledger: Ledger, *obstacles: dict[str, str]) -> dict[str, str]:
    """Return the first obstacle of each weight, in the order of the ledger."""
    first: dict[str, str] = {}
    for found in reversed(obstacles):
        first |= found
    return {row.name: first[row.name] for row in ledger if row.name in first}


def unholdable(ledger: Ledger) -> dict[str, str]:
    """Explain which weights no file of compressed-tensors can hold as codes."""
    codes = ((row.name, _codes_obstacle(row, spec)) for row, spec in coded(ledger))
    return {name: reason for name, reason in codes if reason is not None} | class_obstacles(ledger)


def class_obstacles(ledger: Ledger) -> dict[str, str]:
    """Explain which weights cannot be those of a Linear layer or an embedding."""
    biases = {row.name.removesuffix(".bias"): row.shape for row in ledger if row.name.endswith(".bias")}
    found = ((row.name, _class_obstacle(row, biases.get(row.name.removesuffix(WEIGHT)))) for row, _ in coded(ledger))
    return {name: reason for name, reason in found if reason is not None}


def _class_obstacle(row: LedgerRow, bias: tuple[int, ...] | None) -> str | None:
    shape = row.shape
    if not row.name.endswith(WEIGHT) or len(shape) != 2 or row.layout != Layout.of(shape):
        return f"of shape {shape} is not the weight of a Linear layer or an embedding; exclude it"
    if bias is not None and bias != shape[:1]:
        return f"of shape {shape} has a bias of {bias[0]} elements, so its rows are inputs, not outputs; exclude it"
    return None


def _codes_obstacle(row: LedgerRow, spec: QuantSpec) -> str | None:
    size, columns = spec.group_size, row.shape[-1]
    if spec.levels is not None and (float8_dtype(spec) != torch.float8_e4m3fn or size is not None):
        return "has a table of levels; fewbits writes integers, and FP8 with one scale for each row"
    if spec.scale_bits is not None:
        return "has two levels of scales (scale_bits); compressed-tensors has one level only"
    if size and columns % size:
        return f"has rows of {columns} elements, not a multiple of the group size {size}; choose smaller groups"
    if spec.activations is not None and not spec.symmetric:
        return "has zero points and int8 inputs; compressed-tensors has no format for both"
    if spec.for_dtype(row.dtype).scale_dtype not in FLOAT_DTYPES and not holds_scales(row.dtype, spec):
        return f"has scales that are powers of two, which {dtype_name(row.dtype)} does not hold"
    return None


def unread(ledger: Ledger) -> dict[str, str]:
    """Explain which weights a file of compressed-tensors can hold, but transformers does not read."""
    found = ((row.name, _reading_obstacle(row, spec)) for row, spec in coded(ledger))
    return {name: reason for name, reason in found if reason is not None}


def _reading_obstacle(row: LedgerRow, spec: QuantSpec) -> str | None:
    if spec.bits not in (4, 8):
        return f"has {spec.bits}-bit codes; transformers reads 4 or 8 bits"
    if not spec.symmetric:
        return "has zero points; transformers reads symmetric schemes only"
    if spec.activations is not None and spec.bits != 8:
        return f"has {spec.bits}-bit codes and int8 inputs; readers take int8 inputs with 8-bit codes only"
    if spec.activations == "static":
        return "has a fixed scale for its int8 inputs; with --allow every row of inputs gets a scale of its own"
    if not holds_scales(row.dtype, spec):
        scale = dtype_name(spec.for_dtype(row.dtype).scale_dtype or row.dtype)
        return f"has scales in {scale}, which readers round to the {dtype_name(row.dtype)} of the weight"
    return None


def holds_scales(dtype: torch.dtype, spec: QuantSpec) -> bool:
    """Tell whether the scales of a weight of this dtype stay the same when they are cast to the dtype."""
    return spec.for_dtype(dtype).scale_dtype in (dtype, *_NARROWER.get(dtype, ()))


def mixtures(ledger: Ledger, vocabularies: Collection[int]) -> dict[str, str]:
    """Explain which weights transformers cannot read because other weights have another scheme."""
    found: dict[str, str] = {}
    schemes, routers = [*rows_by_scheme(ledger)], _routers(ledger)
    for row, spec in coded(ledger) if len(schemes) > 1 else ():
        if may_be_embedding(row, vocabularies):
            found[row.name] = "is a quantized embedding beside weights of another scheme; exclude it"
        elif row.name in routers:
            found[row.name] = "is a quantized router of experts beside weights of another scheme; exclude it"
        elif _home_of_expert(row.name) is not None and Scheme.of(spec) != schemes[0]:
            found[row.name] = f"is of an expert and has {spec}, but most other weights do not; use one scheme for both"
    return found | unequal_experts(ledger)


def may_be_embedding(row: LedgerRow, vocabularies: Collection[int]) -> bool:
    """Tell whether a weight may be an embedding, by its name and its number of rows."""
    parts = row.name.split(".")
    if parts[-2:-1] and parts[-2] in HEADS:
        return False
    return row.shape[0] in vocabularies or not EMBEDDING_NAMES.isdisjoint(parts) or any("emb" in part for part in parts)


def _home_of_expert(name: str) -> str | None:
    """Return the prefix of the module that holds an expert; None if the name is not that of an expert's tensor."""
    found = _EXPERT.match(name)
    return None if found is None else found[1]


def _routers(ledger: Ledger) -> set[str]:
    """Weights beside experts that have one row for each expert, or one row for a shared expert."""
    experts: dict[str, set[str]] = {}
    for row in ledger:
        if found := _EXPERT.match(row.name):
            experts.setdefault(found[1], set()).add(found[2])
    homes = {row.name: row.name.removesuffix(WEIGHT).rpartition(".")[0] for row, _ in coded(ledger)}
    counts = {home.removesuffix("."): len(found) for home, found in experts.items()}
    return {name for name, home in homes.items() if home in counts and ledger[name].shape[0] in (1, counts[home])}


def unequal_experts(ledger: Ledger) -> dict[str, str]:
    """Explain which experts differ from others. Readers fuse the experts of a layer, so all need the same scheme."""
    layers: dict[str, list[LedgerRow]] = {}
    for row in ledger:
        home = _home_of_expert(row.name)
        if home is not None and row.name.endswith(WEIGHT):
            layers.setdefault(home, []).append(row)
    return {name: why for rows in layers.values() for name, why in _differing(rows, "all experts of a layer")}


def _joined_obstacles(ledger: Ledger) -> Iterator[tuple[str, str]]:
    rows = {row.name: row for row in ledger}
    for name in rows:
        home, _, last = name.removesuffix(WEIGHT).rpartition(".")
        for parts in _JOINED:
            if last == parts[0] and name.endswith(WEIGHT):
                names = [f"{home}.{part}{WEIGHT}".removeprefix(".") for part in parts]
                together = [rows[other] for other in names if other in rows]
                yield from _differing(together, ", ".join(parts))


def _differing(rows: list[LedgerRow], what: str) -> Iterator[tuple[str, str]]:
    """Name the first weight that has another scheme than the first quantized one."""
    quantized = next((row for row in rows if row.fate == "quantized"), None)
    if quantized is None:
        return
    for row in rows:
        if scheme_of(row) != scheme_of(quantized):
            is_what = f"is {row.scheme}" if row.fate == "quantized" else "is not quantized"
            yield quantized.name, f"is {quantized.scheme}, but {row.name} {is_what}; {what} need one scheme"
            return
