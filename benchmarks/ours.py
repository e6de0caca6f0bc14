"""fewbits as a contender, and the kernels that it chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import fewbits
from benchmarks.contender import Contender, Layer, short
from benchmarks.timing import Call, reason
from fewbits.numerics.spec import SPECS
from fewbits.quantizers.schemes import SCHEMES as LIBRARY


@attrs.frozen
class Scheme:
    quantizer: Callable[[int], fewbits.Quantizer]
    bits: int
    compute: str | None = None


def _int8(group_size: int) -> fewbits.Quantizer:
    return fewbits.Int8PerChannel()


def _int8_dynamic(group_size: int) -> fewbits.Quantizer:
    return fewbits.Int8PerChannel(activations="dynamic")


def _int4(group_size: int) -> fewbits.Quantizer:
    return fewbits.Int4Grouped(group_size=group_size)


def _by_name(name: str, group_size: int) -> fewbits.Quantizer:
    return LIBRARY[name]()


_WITH_OPTIONS: Mapping[str, Scheme] = {
    "int8": Scheme(_int8, 8),
    "int4": Scheme(_int4, 4),
    "int8-dynamic": Scheme(_int8_dynamic, 8),
    "int4-compute-int8": Scheme(_int4, 4, compute="int8"),
    "int8-compute-int8": Scheme(_int8, 8, compute="int8"),
    "int8-exact": Scheme(_int8, 8, compute="exact"),
    "int4-exact": Scheme(_int4, 4, compute="exact"),
}
#: Schemes of the library with codes, in their own groups.
_OTHERS: Mapping[str, Scheme] = {
    name: Scheme(partial(_by_name, name), spec.bits)
    for name, spec in SPECS.items()
    if isinstance(spec, fewbits.QuantSpec) and name not in _WITH_OPTIONS
}
#: Values of ``--scheme``.
SCHEMES: Mapping[str, Scheme] = {**_WITH_OPTIONS, **_OTHERS}
#: Every scheme of the library with codes.
ALL = ("int8", "int4", *_OTHERS)
#: Default of ``--scheme``.
USUAL = ("int8", "int4", "int8-dynamic", "int4-compute-int8")


def contenders(schemes: Sequence[str], dtypes: Sequence[torch.dtype], group_size: int) -> list[Contender]:
    return [_contender(name, SCHEMES[name], dtype, group_size) for name in schemes for dtype in dtypes]


def label(scheme: str, dtype: torch.dtype) -> str:
    suffix = "" if dtype == torch.float32 else f", {short(dtype)}"
    return f"fewbits {scheme}{suffix}"


def _contender(name: str, scheme: Scheme, dtype: torch.dtype, group_size: int) -> Contender:
    start = partial(_start, scheme, group_size)
    return Contender(
        label(name, dtype), "fewbits", dtype, scheme.bits, build=lambda layer: _built(start(layer)), start=start
    )


def _start(scheme: Scheme, group_size: int, layer: nn.Linear) -> Call:
    quantizer = scheme.quantizer(group_size)
    quantizer.prepare(layer)
    options: dict[str, Any] = {} if scheme.compute is None else {"compute": scheme.compute}
    return partial(quantizer.convert, **options)


def _built(convert: Callable[[], Any]) -> Layer:
    layer: Layer = convert().eval()
    return layer


def explained(layer: Layer, x: Tensor) -> dict[str, Any]:
    explain = getattr(fewbits, "explain", None)
    if explain is None or not isinstance(layer, nn.Module):
        return {}
    try:
        row = explain(layer, x).rows[0]
        return {"kernel": row.kernel, "refused": dict(row.refused)}
    except Exception as error:  # the table shows the error as the kernel
        return {"kernel": f"explain failed: {reason(error)}"}
