"""`check_observer`: whether an observer keeps what `Observer` promises."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import CalibrationError, NumericsError, RangeError
from fewbits.numerics.affine import check_params
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.metrics import measure
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.observers.min_max import MinMaxObserver
from fewbits.quantizers.schemes import Int8PerChannel
from fewbits.selection.selector import LayerSelector
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect, fail, for_all
from fewbits.testing.environment import snapshot
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.observer_setup import (
    COLUMNS,
    ObserverSetup,
    answers,
    asked,
    bits,
    cases,
    input_spec,
    inputs,
    normal_weight,
    picks_for_inputs,
    resolved,
    size,
    words,
)
from fewbits.testing.strategies import seeds, weights
from fewbits.testing.strategies import specs as any_spec
from fewbits.validation.report import CRITICAL_DB

_SCALES = Contract("fewbits.extend.Observer.observe_weight", "finite and not zero")
_READ_ONLY = Contract("fewbits.extend.Observer.observe_weight", "finite, not to be written to")
_RANGE = Contract("fewbits.testing.check_observer", "A scale is out of range only for numbers larger than")
_ALONE = Contract("fewbits.testing.check_observer", "The scales of a row depend on that row and the inputs alone.")
_FRESH = Contract("fewbits.extend.Observer.fresh", "A copy of this recipe that has seen nothing.")
_NEEDS = Contract(
    "fewbits.extend.Observer", "whether `observe_input` must have seen a layer's inputs before its weight is"
)
_INPUTS = Contract(
    "fewbits.extend.Observer.input_params", "positive; and zero point, int32, (1,), or None if the spec is"
)
_NOTHING = Contract(
    "fewbits.extend.Observer.input_params", "if nothing was seen, or this observer does not look at inputs"
)
_MERGED = Contract("fewbits.extend.Observer.merge", "as if this one had seen it too")
_SMALL = Contract("fewbits.testing.check_observer", "What it keeps of the inputs does not grow with their number.")
_USEFUL = Contract("fewbits.testing.check_observer", "at most 10 dB below that of `MinMaxObserver`")

#: Batches of which the state may be kept, and batches after which it must not have grown.
_FEW, _MANY = 5, 200


def check_observer(
    observer: Observer, *, specs: st.SearchStrategy[QuantSpec] | None = None, max_examples: int = EXAMPLES
) -> list[Check]:
    """The checks of an observer.

    It is shown the inputs of Linear layers: floating, (samples, columns).

    What is asked beyond the docstrings of `Observer`:

    - The scales of a row depend on that row and the inputs alone. A weight comes in blocks of any number of rows.
    - A scale is out of range only for numbers larger than a sixteenth of what its dtype can hold.
    - What it keeps of the inputs does not grow with their number.
    - On weights from a normal distribution, the SQNR is at most 10 dB below that of `MinMaxObserver`, or above the
      10 dB below which a tensor fails.
    - If two copies can be merged, scales agree with those of one that has seen all to five digits.

    Args:
        observer: newly made.
        specs: a Hypothesis strategy for the specs that it is made for; None stands for all,
            ``fewbits.testing.specs()``.
        max_examples: how many examples a check that draws them looks at.

    Raises:
        ArgumentError: if it is no instance of `Observer`.
    """
    recipe = copy_of(observer, Observer, "check_observer")
    setup = ObserverSetup(recipe, any_spec() if specs is None else specs, max_examples)
    return checks(observer, _CHECKS, setup)


def scales_fit_the_spec(setup: ObserverSetup) -> None:
    """Scales and zero points have the shape, dtype and range that the spec asks for, whatever the weight."""

    def fit(case: tuple[Tensor, QuantSpec]) -> None:
        rows, spec = case
        try:
            scale, zero_point = setup.ready(rows.shape[1]).observe_weight(rows, spec)
        except RangeError as error:
            largest, limit = float(rows.abs().max()), torch.finfo(spec.scale_dtype or rows.dtype).max / 16
            expect(largest > limit, f"{words(case)} of magnitude {largest:.4g} is refused: {error}", _RANGE)
            return
        try:
            check_params(scale, zero_point, spec, (rows.shape[0], rows.shape[1]))
        except NumericsError as error:
            fail(f"{words(case)}: {error}", _SCALES)

    for_all(setup.examples, fit, cases(setup.specs))


def rows_stand_alone(setup: ObserverSetup) -> None:
    """A row gets the same scales in a block of its own, and when it is asked about again."""

    def alone(case: tuple[Tensor, QuantSpec]) -> None:
        rows, spec = case
        observer = setup.ready(rows.shape[1])
        whole = observer.observe_weight(rows, spec)
        again = observer.observe_weight(rows, spec)
        expect(bits(again) == bits(whole), f"{words(case)}: asked again, it gives other scales", _ALONE)
        if spec.granularity != "tensor":
            each = [observer.observe_weight(row.unsqueeze(0), spec) for row in rows.unbind()]
            scale, zero_points = torch.cat([one[0] for one in each]), [one[1] for one in each if one[1] is not None]
            joined = scale, torch.cat(zero_points) if zero_points else None
            expect(bits(joined) == bits(whole), f"{words(case)}: row by row it gives other scales", _ALONE)

    for_all(setup.examples, alone, cases(setup.specs, 1 / 16))


def nothing_is_written_to(setup: ObserverSetup) -> None:
    """Neither a weight nor an input is changed."""

    def unchanged(case: tuple[Tensor, QuantSpec], seed: int) -> None:
        # Rows of their own memory: torch itself refuses to write to some views, and says nothing of who may not.
        rows, spec = case[0].clone(memory_format=torch.contiguous_format), case[1]
        x = inputs(rows.shape[1], seed)
        before = snapshot({"weight": rows, "input": x})
        setup.shown([x]).observe_weight(rows, spec)
        expect(snapshot({"weight": rows, "input": x}) == before, f"{words(case)} is written to", _READ_ONLY)

    for_all(setup.examples, unchanged, cases(setup.specs, 1 / 16), seeds)


def fresh_forgets(setup: ObserverSetup) -> None:
    """`fresh` gives a copy that has seen nothing, and leaves the one it is called on as it is."""

    def forgets(spec: QuantSpec, ones: list[Tensor], others: list[Tensor]) -> None:
        used = setup.shown(ones)
        before = asked(used, spec)
        copy = used.fresh()
        expect(copy is not used, "fresh() returns the observer itself, not a copy", _FRESH)
        for batch in others:
            copy.observe_input(batch)
        expect(asked(copy, spec) == asked(setup.shown(others), spec), "a fresh copy remembers inputs", _FRESH)
        expect(asked(used, spec) == before, "what a fresh copy has seen changes the one it was made from", _FRESH)

    small, large = [inputs(COLUMNS, 1)], [inputs(COLUMNS, 2) * 3]
    # What is forgotten hardly depends on the spec.
    for ones, others in ((small, large), (large, small)):
        for_all(1 + setup.examples // 10, forgets, setup.specs, st.just(ones), st.just(others))


def needs_data_is_true(setup: ObserverSetup) -> None:
    """With `needs_data` the inputs make a difference to the scales of weights; without it they make none."""
    # Inputs that differ in everything: size, balance of the columns, number.
    shown = [inputs(COLUMNS, 1)], [inputs(COLUMNS, seed) * torch.logspace(-2, 2, COLUMNS) for seed in range(3)]
    differences = 0

    def count(spec: QuantSpec) -> None:
        nonlocal differences
        one, other = (bits(setup.shown(batches).observe_weight(normal_weight(), resolved(spec))) for batches in shown)
        differences += one != other

    for_all(setup.examples, count, setup.specs)
    if setup.recipe.needs_data:
        expect(differences > 0, "it says that it needs data, and inputs make no difference to any scale", _NEEDS)
    else:
        expect(differences == 0, "inputs change its scales of weights; set needs_data = True", _NEEDS)


def inputs_get_one_positive_scale(setup: ObserverSetup) -> None:
    """`input_params` gives a positive scale for any inputs, or `CalibrationError` for all."""
    if not picks_for_inputs(setup):
        return
    for spec in (input_spec(symmetric=True), input_spec(symmetric=False)):
        try:
            setup.recipe.fresh().input_params(spec)
        except CalibrationError:
            continue
        fail("it picks a scale for inputs before it has seen any", _NOTHING)

    def positive(x: Tensor, symmetric: bool) -> None:
        spec = input_spec(symmetric)
        scale, zero_point = setup.shown([x]).input_params(spec)
        try:
            check_params(scale, zero_point, spec.for_dtype(torch.float32), (1, 1))
        except NumericsError as error:
            fail(f"inputs of shape {tuple(x.shape)} in {dtype_name(x.dtype)}: {error}", _INPUTS)
        expect(bool(scale > 0), f"the scale of inputs is {float(scale)}", _INPUTS)

    limit = torch.finfo(torch.float32).max / 16
    for_all(setup.examples, positive, weights(min_dims=1, max_dims=4, limit=limit), st.booleans())


def merging_equals_seeing_all(setup: ObserverSetup) -> None:
    """A copy that takes in what another has seen ends up as if it had seen it; or merging is refused."""
    small, large = [inputs(COLUMNS, 1), inputs(COLUMNS, 2)], [inputs(COLUMNS, 3) * 2, inputs(COLUMNS, 4)]
    for first, second in ((small, large), (large, small)):
        _check_merged(setup, first, second)


def it_keeps_little(setup: ObserverSetup) -> None:
    """What it holds after many inputs is no larger than after a few."""
    few, many = (size(setup.shown([inputs(COLUMNS, seed) for seed in range(count)])) for count in (_FEW, _MANY))
    limit = few * 1.5 + 1024
    expect(many <= limit, f"it holds {few:,} bytes after {_FEW} inputs, {many:,} bytes after {_MANY}", _SMALL)


def it_is_of_use(setup: ObserverSetup) -> None:
    """Normally distributed weights keep about the SQNR that they have with `MinMaxObserver`."""

    def useful(spec: QuantSpec) -> None:
        spec, weight = resolved(spec), normal_weight()
        found = measure(weight, quantize(weight, spec, setup.ready(COLUMNS).observe_weight)).sqnr_db
        plain = measure(weight, quantize(weight, spec, MinMaxObserver().observe_weight)).sqnr_db
        limit = min(plain - 10, CRITICAL_DB)
        expect(found >= limit, f"normal weights in {spec} have {found:.1f} dB, below {limit:.1f} dB", _USEFUL)

    for_all(setup.examples, useful, setup.specs)


def a_model_can_be_quantized_with_it(setup: ObserverSetup) -> None:
    """It serves a quantizer from prepare to a report without failures."""
    types = ["Linear"] if setup.recipe.needs_data else []
    quantizer = Int8PerChannel(observer=setup.recipe, selector=LayerSelector(include_types=types, min_elements=1))
    quantizer.prepare(SmallModel())
    quantizer.observe([ids(seed) for seed in range(2)])
    quantizer.convert()
    report = quantizer.validate(on_failure="ignore", fail_under=-math.inf)
    expect(report.ok, f"validate found: {'; '.join(report.failures)}", _SCALES)


def _check_merged(setup: ObserverSetup, first: list[Tensor], second: list[Tensor]) -> None:
    merged, other, both = setup.shown(first), setup.shown(second), setup.shown(first + second)
    spec = QuantSpec(bits=8, granularity="channel")
    before = asked(other, spec)
    try:
        merged.merge(other)
    except CalibrationError:
        return
    expect(asked(other, spec) == before, "merge() changes what it takes in", _MERGED)
    for found, expected in zip(answers(merged, spec), answers(both, spec), strict=True):
        near = torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=0)
        expect(near, f"merged it gives scales up to {float(found.max()):.6g}, not {float(expected.max()):.6g}", _MERGED)


_CHECKS = (
    scales_fit_the_spec,
    rows_stand_alone,
    nothing_is_written_to,
    fresh_forgets,
    needs_data_is_true,
    inputs_get_one_positive_scale,
    merging_equals_seeing_all,
    it_keeps_little,
    it_is_of_use,
    a_model_can_be_quantized_with_it,
)
