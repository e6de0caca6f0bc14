"""`check_quantizer`: check a scheme against the promises of `Quantizer`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.checkpoint.codec import Value
from fewbits.errors import RangeError
from fewbits.formats.loading import load
from fewbits.numerics import layout
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import measure
from fewbits.numerics.spec import CastSpec, Spec, spec_from_dict
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.quantizers.base import Quantizer
from fewbits.selection.row import LedgerRow
from fewbits.testing.check import EXAMPLES, Check, checks_of, copy_of, expect, for_all
from fewbits.testing.environment import Snapshot, folder, snapshot
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.quantizer_lifecycle import QuantizerSetup, linear
from fewbits.testing.strategies import FLOATS, weights


def check_quantizer(quantizer: Quantizer, *, max_examples: int = EXAMPLES) -> list[Check]:
    """Make the checks of a scheme.

    Every check works on a copy of `quantizer` with its observers and its serializer. The selector comes from the kit,
    and takes tensors of any size. If the observer needs data, only Linear layers are quantized.

    Beyond the docstrings of `Quantizer`, the checks require:

    - The same source gives the same bits for any number of threads and any size of blocks.
    - Weights up to a sixteenth of the largest number of their dtype decode to finite numbers.
    - A weight is out of range only if it has a number larger than a sixteenth of the largest number in the dtype of the
      scales, or of a cast.
    - A file is read without the class that made it.

    Args:
        quantizer: A new quantizer.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `quantizer` is not an instance of `Quantizer`.
    """
    setup = QuantizerSetup(copy_of(quantizer, Quantizer, "check_quantizer"), max_examples)
    return checks_of(setup, "fewbits.testing.quantizer_lifecycle", __name__)


def name_and_specs_are_sane(setup: QuantizerSetup) -> None:
    """The scheme has a name, and specs that a file can describe."""
    quantizer = setup.make()
    expect(isinstance(quantizer.name, str) and quantizer.name != "", f"name is {quantizer.name!r}, not words")
    quantizer.prepare(SmallModel())
    for spec in {quantizer.spec, *(row.spec for row in quantizer.ledger if row.spec is not None)}:
        expect(isinstance(spec, Spec), f"{spec!r} is neither a QuantSpec nor a CastSpec")
        read = spec_from_dict(json.loads(json.dumps(spec.to_dict())))
        expect(read == spec, f"a file with {spec!r} is read as {read!r}")


def every_element_keeps_its_bound(setup: QuantizerSetup) -> None:
    """Weights of any dtype, shape, strides and content decode to finite numbers within their error bound.

    A `RangeError` is right only for numbers larger than a sixteenth of the largest number in the dtype of the scales,
    or of a cast.
    """
    # A scheme that needs inputs sees those of Linear layers, whose weights are matrices.
    most = 2 if setup.needs_forward else 4
    drawn = st.sampled_from(FLOATS).flatmap(
        lambda dtype: weights((dtype,), max_dims=most, limit=torch.finfo(dtype).max / 16)
    )
    for_all(setup.examples, lambda weight: _keep_their_bounds(setup, [weight]), drawn)


def awkward_groups_keep_their_bound(setup: QuantizerSetup) -> None:
    """The bound holds for zeros, constants, single elements, an outlier, and rows shorter or longer than groups."""
    awkward = []
    for dtype in FLOATS:
        outlier = torch.full((4, 200), 1e-3, dtype=dtype)
        outlier[2, 7] = 1000
        tiny = torch.full((2, 3), torch.finfo(dtype).tiny, dtype=dtype)
        constants = [torch.full(shape, 0.3, dtype=dtype) for shape in ((1, 1), (1, 129), (129, 1), (3, 200))]
        awkward += [torch.zeros(4, 200, dtype=dtype), outlier, tiny, -tiny, *constants, -constants[-1]]
    _keep_their_bounds(setup, awkward)


def results_are_reproducible(setup: QuantizerSetup) -> None:
    """The same source gives the same bits again, for any number of threads and any size of blocks."""

    def bits() -> Snapshot:
        # A matrix that is large enough for several threads and several small blocks.
        matrix = torch.randn(400, 200, generator=torch.Generator().manual_seed(2))
        return snapshot(setup.converted(linear(matrix))[1])

    expected, threads = bits(), torch.get_num_threads()
    expect(bits() == expected, "a second run gives other bits")
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            expect(bits() == expected, f"{count} threads give other bits")
    finally:
        torch.set_num_threads(threads)
    with mock.patch.object(layout, "BLOCK_ELEMENTS", 7 * 200):
        expect(bits() == expected, "smaller blocks give other bits")


def ties_survive(setup: QuantizerSetup) -> None:
    """Tied layers share one stored weight."""
    quantizer, result = setup.converted(SmallModel())
    stored = result.state_dict()
    for one, other in (("first", "second"), ("embed_tokens", "lm_head"), ("up", "again")):
        alias = quantizer.ledger[f"{other}.weight"].alias_of
        expect(alias == f"{one}.weight", f"the ledger ties {other}.weight to {alias}, not to {one}.weight")
        for part in (name for name in stored if name.startswith(f"{one}.weight") and not name.endswith("_shape")):
            copy = stored[part.replace(one, other, 1)]
            expect(copy.data_ptr() == stored[part].data_ptr(), f"{other} has a copy of {part}")


def files_give_back_every_bit(setup: QuantizerSetup) -> None:
    """A file gives back the bits of the result, also where the module of the scheme cannot be imported.

    It fills a model on the meta device, which then computes the same bits.
    """
    quantizer, result = setup.converted(SmallModel())
    with torch.device("meta"):
        empty = SmallModel()
    with folder() as there, _not_importable(type(quantizer).__module__):
        quantizer.save(there / "model.out")
        loaded = load(there / "model.out", serializer=quantizer.serializer)
        expect(snapshot(loaded) == snapshot(result), "a file gives back other bits than were written")
        model = load(there / "model.out", into=empty, serializer=quantizer.serializer)
        expect(snapshot(model) == snapshot(result), "the loaded model has other bits")
        with torch.no_grad():
            same = torch.equal(model.eval()(ids()), result.eval()(ids()))
        expect(same, "the loaded model computes other bits")


def _keep_their_bounds(setup: QuantizerSetup, weights: list[Tensor]) -> None:
    """Quantize weights: together in a mapping, or each in a Linear layer if the scheme must see inputs."""
    if setup.needs_forward:
        for weight in weights:
            _check_bounds(setup.prepared(linear(weight)), {"weight": weight})
        return
    # Casting a weight to its own dtype leaves nothing to do, which is an error. The last tensor prevents that.
    source = {f"{index}": weight for index, weight in enumerate([*weights, torch.ones(2, 32, dtype=torch.float64)])}
    quantizer = setup.make(for_model=False)
    quantizer.prepare(source)
    _check_bounds(quantizer, source)


def _check_bounds(quantizer: Quantizer, weights: Mapping[str, Tensor]) -> None:
    rows = [row for row in quantizer.ledger if row.spec is not None]
    try:
        result = quantizer.convert()
    except RangeError as error:
        magnitudes = {row.name: float(weights[row.name].abs().max()) for row in rows}
        too_large = any(magnitudes[row.name] > torch.finfo(_dtype_of_scales(row)).max / 16 for row in rows)
        expect(too_large, f"a weight of magnitude {max(magnitudes.values()):.4g} or less is refused: {error}")
        return
    for row in rows:
        value = result[row.name] if isinstance(result, dict) else result.weight_stored.value()
        _check_bound(row, weights[row.name], value)


def _dtype_of_scales(row: LedgerRow) -> torch.dtype:
    """Return the dtype of the scales of a weight, or the dtype that it is cast to."""
    return row.spec.dtype if isinstance(row.spec, CastSpec) else getattr(row.spec, "scale_dtype", None) or row.dtype


def _check_bound(row: LedgerRow, weight: Tensor, value: Value) -> None:
    decoded = value.dequantize() if isinstance(value, QuantizedTensor) else value
    what = f"{dtype_name(weight.dtype)} of shape {tuple(weight.shape)} in {row.scheme}"
    expect(decoded.shape == weight.shape, f"{what} decodes to shape {tuple(decoded.shape)}")
    expect(bool(decoded.isfinite().all()), f"{what} decodes to NaN or Inf")
    measured = measure(weight, value)
    expect(
        measured.broken_at is None,
        f"{what}: the element at row, column {measured.broken_at} is off by up to {measured.worst_bound_ratio:.4g} "
        f"times its bound, the largest error is {measured.max_abs_error:.4g}",
    )


@contextmanager
def _not_importable(name: str) -> Iterator[None]:
    """Make the import of a module fail; earlier imports keep working."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import system treats it as missing
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
