"""`check_quantizer`: check a scheme against the promises of `Quantizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.errors import RangeError
from fewbits.formats.loading import load
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import measure
from fewbits.numerics.spec import QuantSpec, Spec, spec_from_dict
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.quantizers.base import Quantizer
from fewbits.selection.ledger import LedgerRow
from fewbits.testing.check import EXAMPLES, Check, Contract, check_functions, checks, copy_of, expect, for_all
from fewbits.testing.environment import (
    Snapshot,
    blocks_of,
    check_damage,
    folder,
    not_importable,
    snapshot,
    threads,
)
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.quantizer_lifecycle import QuantizerSetup, linear
from fewbits.testing.strategies import FLOATS, weights

_NAME = Contract("fewbits.quantizers.scheme.Scheme", "name: the scheme's name in tables and messages")
_SPEC = Contract("fewbits.QuantSpec.to_dict", "A JSON-able description; `spec_from_dict` reads it.")
_BOUND = Contract("fewbits.numerics.affine.error_bound", "its largest allowed distance from its decoded code")
_DECODED = Contract("fewbits.QuantizedTensor.dequantize", "Decode the tensor into its original shape")
_RANGE = Contract(
    "fewbits.testing.check_quantizer", "A weight is out of range only if it has a number larger than a sixteenth"
)
_SAME = Contract("fewbits.testing.check_quantizer", "for any number of threads and any size of blocks")
_TIED = Contract("fewbits.nn.stored.StoredWeight", "Layers with tied weights hold the same instance")
_BITS = Contract(
    "fewbits.Quantizer.save", "Write the result atomically to a file, or to a directory of several, and read it back."
)
_BYTES = Contract("fewbits.Ledger.bytes_after", "the bytes of the file without its header")
_INTO = Contract("fewbits.load", "a float model of the same architecture, which may be on the meta device")
_UNPICKLED = Contract("fewbits.testing.check_quantizer", "A file is read without the class that made it.")


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
        quantizer: a new quantizer.
        max_examples: number of examples that a check draws.

    Raises:
        ArgumentError: if `quantizer` is not an instance of `Quantizer`.
    """
    setup = QuantizerSetup(copy_of(quantizer, Quantizer, "check_quantizer"), max_examples)
    return checks(quantizer, check_functions("fewbits.testing.quantizer_lifecycle", __name__), setup)


def name_and_specs_are_sane(setup: QuantizerSetup) -> None:
    """The scheme has a name, and specs that a file can describe."""
    quantizer = setup.make()
    expect(isinstance(quantizer.name, str) and quantizer.name != "", f"name is {quantizer.name!r}, not words", _NAME)
    quantizer.prepare(SmallModel())
    for spec in {quantizer.spec, *(row.spec for row in quantizer.ledger if row.spec is not None)}:
        expect(isinstance(spec, Spec), f"{spec!r} is neither a QuantSpec nor a CastSpec", _NAME)
        read = spec_from_dict(json.loads(json.dumps(spec.to_dict())))
        expect(read == spec, f"a file with {spec!r} is read as {read!r}", _SPEC)


def every_element_keeps_its_bound(setup: QuantizerSetup) -> None:
    """Weights of any dtype, shape, strides and content decode to within their finite bound."""
    # A scheme that needs inputs sees those of Linear layers, whose weights are matrices.
    most = 2 if setup.needs_forward else 4
    drawn = st.sampled_from(FLOATS).flatmap(
        lambda dtype: weights((dtype,), max_dims=most, limit=torch.finfo(dtype).max / 16)
    )
    for_all(setup.examples, lambda weight: _keeps_bound(setup, weight), drawn)


def awkward_groups_keep_their_bound(setup: QuantizerSetup) -> None:
    """The bound holds for zeros, constants, single elements, an outlier, and rows shorter or longer than groups."""
    for dtype in FLOATS:
        outlier = torch.full((4, 200), 1e-3, dtype=dtype)
        outlier[2, 7] = 1000
        tiny = torch.full((2, 3), torch.finfo(dtype).tiny, dtype=dtype)
        constants = [torch.full(shape, 0.3, dtype=dtype) for shape in ((1, 1), (1, 129), (129, 1), (3, 200))]
        for weight in (torch.zeros(4, 200, dtype=dtype), outlier, tiny, -tiny, *constants, -constants[-1]):
            _keeps_bound(setup, weight)


def results_are_reproducible(setup: QuantizerSetup) -> None:
    """Two runs, one and two threads, and large and small blocks give the same bits."""
    expected = _bits(setup)
    expect(_bits(setup) == expected, "a second run gives other bits", _SAME)
    for count in (1, 2):
        with threads(count):
            expect(_bits(setup) == expected, f"{count} threads give other bits", _SAME)
    with blocks_of(7 * 200):
        expect(_bits(setup) == expected, "smaller blocks give other bits", _SAME)


def ties_survive(setup: QuantizerSetup) -> None:
    """Tied layers share one stored weight."""
    quantizer, result = setup.converted(SmallModel())
    stored = result.state_dict()
    for one, other in (("first", "second"), ("embed_tokens", "lm_head"), ("up", "again")):
        alias = quantizer.ledger[f"{other}.weight"].alias_of
        expect(
            alias == f"{one}.weight",
            f"{other}.weight was tied to {one}.weight, but the ledger ties it to {alias}",
            _TIED,
        )
        for part in (name for name in stored if name.startswith(f"{one}.weight") and not name.endswith("_shape")):
            copy = stored[part.replace(one, other, 1)]
            expect(copy.data_ptr() == stored[part].data_ptr(), f"{other} has a copy of {part}", _TIED)


def files_give_back_every_bit(setup: QuantizerSetup) -> None:
    """A file gives back the bits of the result."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there:
        loaded = _saved_and_loaded(quantizer, there / "model.out")
        expect(snapshot(loaded) == snapshot(result), "a file gives back other bits than were written", _BITS)


def written_bytes_are_predicted(setup: QuantizerSetup) -> None:
    """The ledger predicts the bytes in the file."""
    quantizer = setup.prepared(SmallModel())
    predicted = {row.name: row.bytes_after for row in quantizer.ledger}
    quantizer.convert()
    with folder() as there:
        quantizer.save(there / "model.out")
        entries = quantizer.serializer.reader(there / "model.out").entries
    for row in quantizer.ledger:
        written = sum(entries[name].nbytes for name in CODEC.entries(row))
        expect(written == predicted[row.name], f"{row.name} has {written} bytes, not {predicted[row.name]}", _BYTES)
    total = sum(entry.nbytes for entry in entries.values())
    expect(total == quantizer.ledger.bytes_after, f"{total} bytes, not {quantizer.ledger.bytes_after}", _BYTES)


def damage_is_found(setup: QuantizerSetup) -> None:
    """`verify` finds a flipped bit anywhere in a file, or the bit does not matter."""
    quantizer, _ = setup.converted(SmallModel())
    with folder() as there:
        quantizer.save(there / "model.out")
        check_damage(there / "model.out", quantizer.serializer)


def files_load_into_models_on_meta(setup: QuantizerSetup) -> None:
    """A file fills a model on the meta device, which then computes the same bits."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there:
        loaded = _saved_and_loaded(quantizer, there / "model.out", _on_meta())
        with torch.no_grad():
            same = torch.equal(loaded.eval()(ids()), result.eval()(ids()))
        expect(same, "the loaded model computes other bits", _INTO)
        expect(snapshot(loaded) == snapshot(result), "the loaded model has other bits", _INTO)


def files_need_no_class(setup: QuantizerSetup) -> None:
    """A file can be read where the scheme's module cannot be imported."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there, not_importable(type(quantizer).__module__):
        loaded = _saved_and_loaded(quantizer, there / "model.out")
        expect(
            snapshot(loaded) == snapshot(result),
            "a file gives other bits if the module of its scheme is missing",
            _UNPICKLED,
        )


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
    """Convert the weight; None if the scheme keeps it, or rightly refuses it as too large."""
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
    """Quantize a matrix that is large enough for several threads and several small blocks."""
    generator = torch.Generator().manual_seed(2)
    return snapshot(setup.converted(linear(torch.randn(400, 200, generator=generator)))[1])


def _saved_and_loaded(quantizer: Quantizer, path: Path, into: nn.Module | None = None) -> Any:
    quantizer.save(path)
    if into is not None:
        return load(path, into=into, serializer=quantizer.serializer)
    values: dict[str, Value] = load(path, serializer=quantizer.serializer)
    return values


def _on_meta() -> SmallModel:
    with torch.device("meta"):
        return SmallModel()
