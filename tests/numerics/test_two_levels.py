"""Two levels of scales: a scale for each row, and a code for the scale of each group."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits import MinMaxObserver, QuantizedTensor, QuantSpec
from fewbits import testing as kit
from fewbits.errors import ArgumentError, FormatError, NumericsError
from fewbits.extend import Observer, QuantParams
from fewbits.numerics.affine import bound_and_clipped
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.packing import unpack
from fewbits.numerics.params import check_params
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import spec_from_dict

SPEC = QuantSpec(bits=4, granularity="group", group_size=4, scale_bits=3, scale_dtype=torch.float16)
ASYMMETRIC = attrs.evolve(SPEC, symmetric=False)

#: Weights and specs with many and with few codes for scales.
problems = st.one_of(
    *(kit.problems(granularity="group", scale_bits=bits, relative_limit=0.25, max_elements=60) for bits in (2, 5))
)


def weight(rows: int = 6, columns: int = 24) -> torch.Tensor:
    """Rows and groups of different size."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.rand(rows, columns // 4, 1, generator=generator).expand(-1, -1, 4).reshape(rows, columns)
    return torch.randn(rows, columns, generator=generator) * sizes


@pytest.mark.parametrize(
    ("bits", "scale_bits", "symmetric", "expected"),
    [(4, 6, True, 4 + 6 / 32 + 16 / 576), (3, 4, True, 3 + 4 / 32 + 16 / 576), (4, 8, False, 4 + 12 / 32 + 16 / 576)],
)
def test_the_stored_bits_per_weight_are_exact(bits, scale_bits, symmetric, expected):
    spec = QuantSpec(
        bits, "group", group_size=32, symmetric=symmetric, scale_bits=scale_bits, scale_dtype=torch.float16
    )
    stored = quantize(torch.ones(64, 576), spec)
    shape = stored.parts()["shape"].nbytes
    assert (stored.nbytes - shape) * 8 / (64 * 576) == pytest.approx(expected, rel=1e-12)
    assert expected <= bits + 0.25 or not symmetric


def by_hand(q: QuantizedTensor) -> list[list[float]]:
    """The scales of the groups by docs/format.md, in Python's numbers."""
    bits, columns = q.spec.scale_bits, q.scale_codes.T.contiguous()
    codes = unpack(columns, bits, len(q.scale)).T.tolist()
    count = 2 ** (bits - 1) if q.spec.symmetric else 2**bits
    least = -count if q.spec.symmetric else 0
    parts = [[c + least if c + least < 0 else c + least + 1 for c in row] for row in codes]
    return [[k / count * float(row_scale) for k in row] for row, row_scale in zip(parts, q.scale, strict=True)]


@given(problems)
def test_the_scale_of_a_group_is_a_part_of_the_scale_of_its_row(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    scale = q.params().scale
    assert scale.dtype == compute_dtype(q.scale.dtype)
    expected = torch.tensor(by_hand(q), dtype=torch.float64).to(scale.dtype)
    assert torch.equal(scale, expected)
    assert bool((scale > 0).all())


@given(problems)
def test_parts_make_the_same_tensor_again(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    again = QuantizedTensor.from_parts(q.parts(), spec=q.spec, layout=q.layout, dtype=q.dtype)
    made = QuantizedTensor.from_codes(q.codes(), q.params(), spec=q.spec, layout=q.layout, dtype=q.dtype)
    assert again.equal(q)
    assert made.equal(q)


@given(problems)
def test_two_levels_never_clip_what_one_level_does_not(problem):
    weight, spec, _ = problem
    x = weight.reshape(-1, weight.shape[-1]).to(compute_dtype(weight.dtype))
    spec = spec.for_dtype(weight.dtype)
    params = MinMaxObserver().observe_weight(x, spec)
    assert not bound_and_clipped(x.double(), params, spec)[1].any()


def test_the_largest_scale_of_a_row_is_that_of_one_level():
    for spec in (SPEC, ASYMMETRIC):
        one, two = (quantize(weight(), s) for s in (spec.one_level(), spec))
        assert torch.equal(one.scale.amax(1, keepdim=True), two.scale)


def test_a_row_near_the_end_of_the_dtype_decodes_to_finite_numbers():
    for spec in (attrs.evolve(SPEC, scale_dtype=torch.float32), attrs.evolve(ASYMMETRIC, scale_dtype=torch.float32)):
        for bits in range(2, 9):
            x = torch.linspace(-1, 1, 240).reshape(10, 24) * torch.finfo(torch.float32).max
            assert quantize(x, attrs.evolve(spec, bits=bits)).dequantize().isfinite().all()


def test_the_tiniest_rows_have_no_subnormal_scales():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale = quantize(torch.zeros(2, 24), attrs.evolve(SPEC, scale_bits=8, scale_dtype=dtype)).params().scale
        assert float(scale.min()) >= torch.finfo(torch.float32).tiny


class Halves(Observer):
    """An observer that knows one level of scales."""

    def observe_weight(self, weight, spec):
        params = MinMaxObserver().observe_weight(weight, spec.one_level())
        return QuantParams(params.scale / 2, params.zero_point)


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_the_scales_of_an_observer_that_knows_one_level_are_rounded_up(spec):
    x = weight()
    asked = Halves().observe_weight(x, spec).scale
    got = quantize(x, spec, Halves().observe_weight).params()
    step = got.row_scale.float() / spec.scale_parts
    assert bool((got.scale >= asked).all())
    assert bool((got.scale - asked <= step).all())


def test_an_asymmetric_spec_refuses_negative_scales_of_an_observer():
    def negative(rows, spec):
        params = MinMaxObserver().observe_weight(rows, spec.one_level())
        return QuantParams(-params.scale, params.zero_point)

    assert quantize(weight(), SPEC, lambda rows, spec: QuantParams(negative(rows, spec).scale)).params().scale.max() < 0
    with pytest.raises(NumericsError, match="a scale is negative"):
        quantize(weight(), ASYMMETRIC, negative)


@pytest.mark.parametrize("value", [0, 1, 9, 6.0, True, "6"])
def test_scale_bits_of_another_kind_are_refused(value):
    with pytest.raises(ArgumentError, match="scale_bits must be an integer from 2 to 8"):
        QuantSpec(4, "group", group_size=32, scale_bits=value)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_scale_bits_without_groups_are_refused(granularity):
    with pytest.raises(ArgumentError, match="scale_bits needs granularity 'group'"):
        QuantSpec(4, granularity, scale_bits=6)


def test_a_spec_from_before_two_levels_has_one():
    fields = attrs.evolve(SPEC, scale_bits=None).to_dict()
    del fields["scale_bits"]
    assert spec_from_dict(fields) == attrs.evolve(SPEC, scale_bits=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_scale": None}, "need a row_scale"),
        ({"row_scale": torch.ones(6, dtype=torch.float16)}, r"must be a tensor of \(6, 1\)"),
        ({"row_scale": torch.ones(6, 1)}, r"in torch.float16"),
        ({"row_scale": torch.full((6, 1), math.inf, dtype=torch.float16)}, "not positive and finite"),
        ({"row_scale": torch.zeros(6, 1, dtype=torch.float16)}, "not positive and finite"),
        ({"row_scale": -torch.ones(6, 1, dtype=torch.float16)}, "not positive and finite"),
        ({"scale": torch.full((6, 6), 0.3)}, "not a whole number of 4ths"),
        ({"scale": torch.full((6, 6), 1.25)}, "not a whole number of 4ths"),
        ({"scale": torch.full((6, 6), 0.0)}, "zero, NaN or Inf"),
        ({"scale": torch.full((6, 6), 0.25, dtype=torch.float16)}, "float16"),
    ],
    ids=str,
)
def test_scales_that_two_levels_cannot_store_are_refused(change, message):
    row_scale = torch.ones(6, 1, dtype=torch.float16)
    good = QuantParams(torch.full((6, 6), 0.25), row_scale=row_scale)
    assert check_params(good, SPEC, (6, 24)) is good
    with pytest.raises(NumericsError, match=message):
        check_params(attrs.evolve(good, **change), SPEC, (6, 24))


def test_a_spec_with_one_level_has_no_scales_of_rows():
    params = MinMaxObserver().observe_weight(weight(), SPEC)
    with pytest.raises(NumericsError, match="other specs must have none"):
        check_params(params, SPEC.one_level(), (6, 24))


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: {name: part for name, part in parts.items() if name != "scale_codes"},
        lambda parts: parts | {"scale": parts["scale"].expand(-1, 6)},
        lambda parts: parts | {"scale_codes": parts["scale_codes"][:, :-1]},
        lambda parts: parts | {"scale_codes": parts["scale_codes"].float()},
        lambda parts: parts | {"scale_codes": parts["scale_codes"].T},
    ],
)
def test_parts_of_other_shapes_are_refused(damage):
    q = quantize(weight(), SPEC)
    with pytest.raises(FormatError):
        QuantizedTensor.from_parts(damage(q.parts()), spec=q.spec, layout=q.layout, dtype=q.dtype)


def test_scales_of_rows_follow_their_rows():
    q = quantize(weight(64), ASYMMETRIC)
    assert q.rows(32, 64).dequantize().equal(q.dequantize()[32:])
    params = q.params()
    parts = [params.rows(slice(0, 3)), params.rows(torch.arange(3, 64))]
    assert torch.equal(QuantParams.joined(parts).row_scale, params.row_scale)
    swapped = params.where(torch.zeros(64, 1, dtype=torch.bool), params.rows(torch.arange(63, -1, -1)))
    assert torch.equal(swapped.row_scale, params.row_scale.flip(0))


def test_the_percentile_observer_and_the_search_for_scales_keep_two_levels():
    observers = fewbits.PercentileObserver(90.0), fewbits.MSEObserver(steps=5)
    for observer in observers:
        for spec in (SPEC, ASYMMETRIC):
            check_params(observer.observe_weight(weight(), spec), spec, (6, 24))


def test_a_search_uses_negative_scales_of_symmetric_specs():
    assert fewbits.MSEObserver().observe_weight(weight(), SPEC).scale.min() < 0 < SPEC.scale_parts
