"""Checks of quantizers: what becomes of the numbers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.checkpoint.codec import Value
from fewbits.errors import RangeError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import measure
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.quantizers.base import Quantizer
from fewbits.selection.ledger import LedgerRow
from fewbits.testing.check import Contract, expect, for_all
from fewbits.testing.environment import Snapshot, blocks_of, snapshot, threads
from fewbits.testing.models import SmallModel
from fewbits.testing.quantizer_setup import QuantizerSetup, linear
from fewbits.testing.strategies import FLOATS, weights

_BOUND = Contract("fewbits.numerics.affine.error_bound", "How far each element may lie from what its code stands for")
_DECODED = Contract("fewbits.QuantizedTensor.dequantize", "The tensor that the codes stand for, in its own shape")
_RANGE = Contract("fewbits.testing.check_quantizer", "A number is refused as out of range only if it is larger")
_SAME = Contract("fewbits.testing.check_quantizer", "whatever the number of threads and the size of the blocks")
_TIED = Contract("fewbits.nn.stored.StoredWeight", "Layers with tied weights hold the same instance")


def every_element_keeps_its_bound(setup: QuantizerSetup) -> None:
    """Weights of any dtype, shape, strides and content decode to within their bound, which is finite."""
    # What has to see inputs is shown those of Linear layers, whose weights are matrices.
    most = 2 if setup.needs_forward else 4
    drawn = st.sampled_from(FLOATS).flatmap(
        lambda dtype: weights((dtype,), max_dims=most, limit=torch.finfo(dtype).max / 16)
    )
    for_all(setup.examples, lambda weight: _keeps_bound(setup, weight), drawn)


def awkward_groups_keep_their_bound(setup: QuantizerSetup) -> None:
    """Zeros, constants, single elements, one outlier, rows that are shorter or longer than groups."""
    for dtype in FLOATS:
        outlier = torch.full((4, 200), 1e-3, dtype=dtype)
        outlier[2, 7] = 1000
        tiny = torch.full((2, 3), torch.finfo(dtype).tiny, dtype=dtype)
        constants = [torch.full(shape, 0.3, dtype=dtype) for shape in ((1, 1), (1, 129), (129, 1), (3, 200))]
        for weight in (torch.zeros(4, 200, dtype=dtype), outlier, tiny, -tiny, *constants, -constants[-1]):
            _keeps_bound(setup, weight)


def results_are_reproducible(setup: QuantizerSetup) -> None:
    """Two runs, one thread and two, large blocks and small ones: the same bits."""
    expected = _bits(setup)
    expect(_bits(setup) == expected, "a second run gives other bits", _SAME)
    for count in (1, 2):
        with threads(count):
            expect(_bits(setup) == expected, f"with {count} threads it gives other bits", _SAME)
    with blocks_of(7 * 200):
        expect(_bits(setup) == expected, "in smaller blocks it gives other bits", _SAME)


def ties_survive(setup: QuantizerSetup) -> None:
    """Layers with one weight have one stored weight."""
    quantizer, result = setup.converted(SmallModel())
    stored = result.state_dict()
    for one, other in (("first", "second"), ("embed_tokens", "lm_head"), ("up", "again")):
        alias = quantizer.ledger[f"{other}.weight"].alias_of
        expect(alias == f"{one}.weight", f"{other}.weight was tied to {one}.weight, in the ledger to {alias}", _TIED)
        for part in (name for name in stored if name.startswith(f"{one}.weight") and not name.endswith("_shape")):
            copy = stored[part.replace(one, other, 1)]
            expect(copy.data_ptr() == stored[part].data_ptr(), f"{other} has a copy of {part}, not the same", _TIED)


def _keeps_bound(setup: QuantizerSetup, weight: Tensor) -> None:
    quantizer = setup.of_weight(weight)
    row = quantizer.ledger["weight"]
    value = _converted(quantizer, weight, row)
    if value is None:
        return
    decoded = value.dequantize() if isinstance(value, QuantizedTensor) else value
    what = f"{dtype_name(weight.dtype)} of shape {tuple(weight.shape)} in {row.scheme}"
    expect(decoded.shape == weight.shape, f"{what} decodes to shape {tuple(decoded.shape)}", _DECODED)
    expect(bool(decoded.isfinite().all()), f"{what} decodes to NaN or Inf", _DECODED)
    measured = measure(weight, value)
    expect(
        measured.broken_at is None,
        f"{what}: the element at row, column {measured.broken_at} is off by up to {measured.worst_bound_ratio:.4g} "
        f"times its bound, the largest error is {measured.max_abs_error:.4g}",
        _BOUND,
    )


def _converted(quantizer: Quantizer, weight: Tensor, row: LedgerRow) -> Value | None:
    """What becomes of the weight; None where it is kept, or rightly refused as too large."""
    if row.spec is None:
        return None
    try:
        result = quantizer.convert()
    except RangeError as error:
        dtype = (row.spec.scale_dtype or row.dtype) if isinstance(row.spec, QuantSpec) else row.spec.dtype
        largest, limit = float(weight.abs().max()), torch.finfo(dtype).max / 16
        expect(largest > limit, f"a weight of magnitude {largest:.4g} in {row.scheme} is refused: {error}", _RANGE)
        return None
    value: Value = result["weight"] if isinstance(result, dict) else result.weight_stored.value()
    return value


def _bits(setup: QuantizerSetup) -> Snapshot:
    """The quantized bits of a matrix that is large enough for several threads and several small blocks."""
    generator = torch.Generator().manual_seed(2)
    return snapshot(setup.converted(linear(torch.randn(400, 200, generator=generator)))[1])


NUMBER_CHECKS = (
    every_element_keeps_its_bound,
    awkward_groups_keep_their_bound,
    results_are_reproducible,
    ties_survive,
)
