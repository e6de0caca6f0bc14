"""`QuantizedTensor`: its parts must fit each other, and decode by the formula."""

import copy
import pickle

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import QuantizedTensor, QuantSpec
from fewbits.errors import FormatError, NumericsError
from fewbits.extend import Layout, QuantParams
from fewbits.numerics.parts import part_shapes
from fewbits.numerics.quantize import quantize
from support.strategies import FLOATS, per_element, problems

GROUPS = QuantSpec(bits=4, granularity="group", group_size=8, symmetric=False)
LAYOUT = Layout.of((4, 20))


def rebuilt(parts, q, **changes) -> QuantizedTensor:
    return QuantizedTensor.from_parts(parts, **({"spec": q.spec, "layout": q.layout, "dtype": q.dtype} | changes))


@pytest.fixture(scope="module")
def q() -> QuantizedTensor:
    return quantize(torch.linspace(-1, 2, 80).reshape(4, 20), GROUPS)


@given(problems())
def test_parts_make_the_same_tensor_again_without_a_copy(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    parts = q.parts()
    again = rebuilt(parts, q)
    assert again.equal(q)
    assert again.packed.data_ptr() == q.packed.data_ptr()


@given(problems())
def test_the_parts_have_the_predicted_shapes(problem):
    weight, spec, layout = problem
    parts = quantize(weight, spec, layout=layout).parts()
    assert {n: (tuple(t.shape), t.dtype) for n, t in parts.items()} == part_shapes(layout, spec, weight.dtype)
    assert ("zero_point" in parts) is not spec.symmetric
    assert parts["shape"].tolist() == list(weight.shape)


@given(problems())
def test_its_size_is_the_size_of_its_parts(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    assert q.nbytes == sum(part.numel() * part.element_size() for part in q.parts().values())


@given(problems())
def test_codes_and_parameters_make_the_same_tensor_again(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    parameters = {"spec": spec, "layout": layout, "dtype": weight.dtype}
    assert QuantizedTensor.from_codes(q.codes(), q.params(), **parameters).equal(q)
    assert QuantizedTensor.from_codes(q.codes().long(), q.params(), **parameters).equal(q)


@given(problems(relative_limit=0.25))
def test_decoding_is_the_formula_in_the_shape_and_dtype_of_the_source(problem):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    size = layout.matrix_shape
    steps = q.codes().double()
    if not spec.symmetric:
        steps -= per_element(q.zero_points(), spec, *size)
    real = torch.float64 if q.scale.dtype == torch.float64 else torch.float32
    expected = (steps.to(real) * per_element(q.params().scale, spec, *size).to(real)).to(weight.dtype)
    decoded = q.dequantize()
    assert (decoded.shape, decoded.dtype, q.shape) == (weight.shape, weight.dtype, tuple(weight.shape))
    assert torch.equal(decoded, layout.from_matrix(expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantizing_to_another_dtype(q, dtype):
    assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 33])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_are_packed_along_the_rows(bits, rows):
    spec = attrs.evolve(GROUPS, bits=bits)
    zeros = torch.arange(rows * 3).reshape(rows, 3) % (1 << bits) + spec.code_min
    codes = torch.zeros(rows, 20, dtype=torch.int8)
    q = QuantizedTensor.from_codes(
        codes, QuantParams(torch.ones(rows, 3), zeros), spec=spec, layout=Layout.of((rows, 20)), dtype=torch.float32
    )
    assert q.zero_point.shape == (-(-rows * bits // 32), 3)
    for group in range(3):
        stream = sum(word % 2**32 << (32 * i) for i, word in enumerate(q.zero_point[:, group].tolist()))
        assert stream == sum((zero - spec.code_min) << (bits * i) for i, zero in enumerate(zeros[:, group].tolist()))
    assert torch.equal(q.zero_points(), zeros.int())


def replaced(name, change):
    return lambda parts: {**parts, name: change(parts[name])}


HOSTILE = {
    "no codes": lambda parts: {name: part for name, part in parts.items() if name != "packed"},
    "no scales": lambda parts: {name: part for name, part in parts.items() if name != "scale"},
    "no zero points": lambda parts: {name: part for name, part in parts.items() if name != "zero_point"},
    "no shape": lambda parts: {name: part for name, part in parts.items() if name != "shape"},
    "one part more": lambda parts: {**parts, "bias": torch.zeros(4)},
    "nothing": lambda parts: {},
    "codes of 64 bits": replaced("packed", lambda t: t.long()),
    "codes as floats": replaced("packed", lambda t: t.view(torch.float32)),
    "codes a word short": replaced("packed", lambda t: t[:, :-1]),
    "codes a word long": replaced("packed", lambda t: torch.cat([t, t[:, :1]], 1)),
    "codes a row short": replaced("packed", lambda t: t[:-1]),
    "codes in one row": replaced("packed", torch.flatten),
    "codes transposed": replaced("packed", lambda t: t.T),
    "scales of another dtype": replaced("scale", lambda t: t.half()),
    "scales as integers": replaced("scale", lambda t: t.view(torch.int32)),
    "scales a group short": replaced("scale", lambda t: t[:, :-1]),
    "scales transposed": replaced("scale", lambda t: t.T),
    "a single scale": replaced("scale", lambda t: t[0, 0]),
    "zero points of 8 bits": replaced("zero_point", lambda t: t.to(torch.int8)),
    "zero points unpacked": replaced("zero_point", lambda t: t.expand(4, -1)),
    "None for zero points": replaced("zero_point", lambda t: None),
    "the shape of another tensor": replaced("shape", lambda t: t.flip(0)),
    "a shape of one number": replaced("shape", lambda t: t[0]),
    "a shape in two rows": replaced("shape", lambda t: t[None]),
    "a shape as floats": replaced("shape", lambda t: t.double()),
    "a shape with one axis more": replaced("shape", lambda t: torch.cat([t, torch.ones(1, dtype=torch.int64)])),
    "an empty shape": replaced("shape", lambda t: t[:0]),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_parts_that_do_not_fit_are_refused(q, damage):
    with pytest.raises(FormatError):
        rebuilt(damage(q.parts()), q)


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": attrs.evolve(GROUPS, bits=8)},
        {"spec": attrs.evolve(GROUPS, group_size=16)},
        {"spec": attrs.evolve(GROUPS, symmetric=True)},
        {"spec": attrs.evolve(GROUPS, scale_dtype=torch.bfloat16)},
        {"layout": Layout.of((20, 4))},
        {"layout": Layout.of((4, 20), inputs=(0,))},
        {"layout": Layout.of((4, 4, 5))},
        {"dtype": torch.int8},
        {"dtype": torch.complex64},
        {"spec": attrs.evolve(GROUPS, scale_dtype=None), "dtype": torch.float16},
    ],
    ids=str,
)
def test_parts_of_another_kind_of_tensor_are_refused(q, changes):
    with pytest.raises(FormatError):
        rebuilt(q.parts(), q, **changes)


def test_a_tensor_without_the_zero_points_it_needs_is_refused(q):
    with pytest.raises(FormatError, match="zero_point"):
        QuantizedTensor(q.packed, q.scale, None, q.spec, q.layout, q.dtype)


def test_a_symmetric_tensor_has_no_zero_points(q):
    with pytest.raises(FormatError, match="zero_point"):
        QuantizedTensor(q.packed, q.scale, q.zero_point, attrs.evolve(q.spec, symmetric=True), q.layout, q.dtype)


CODES, SCALE, ZEROS = torch.zeros(4, 20, dtype=torch.int8), torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point"),
    [
        (CODES + 8, SCALE, ZEROS),
        (CODES - 9, SCALE, ZEROS),
        (CODES.long() + 2**32, SCALE, ZEROS),
        (CODES.float() + 0.5, SCALE, ZEROS),
        (CODES[:2], SCALE, ZEROS),
        (CODES[:, :17], SCALE, ZEROS),
        (torch.ones(4, 24, dtype=torch.int8), SCALE, ZEROS),
        (CODES.flatten(), SCALE, ZEROS),
        (CODES, SCALE[:, :2], ZEROS),
        (CODES, SCALE * 0, ZEROS),
        (CODES, SCALE, ZEROS + 8),
        (CODES, SCALE, ZEROS.float()),
        (CODES, SCALE, None),
    ],
    ids=range(13),
)
def test_codes_that_do_not_fit_are_refused(codes, scale, zero_point):
    with pytest.raises((FormatError, NumericsError)):
        QuantizedTensor.from_codes(
            codes, QuantParams(scale, zero_point), spec=GROUPS, layout=LAYOUT, dtype=torch.float32
        )


def test_the_lowest_and_the_highest_code_may_be_used():
    spec = QuantSpec(bits=3, granularity="channel")
    codes = torch.tensor([[-4, 3, 0]])
    q = QuantizedTensor.from_codes(
        codes, QuantParams(torch.tensor([[0.5]])), spec=spec, layout=Layout.of((1, 3)), dtype=torch.float16
    )
    assert q.dequantize().tolist() == [[-2.0, 1.5, 0.0]]
    assert q.dequantize().dtype == torch.float16


@given(problems(), st.sampled_from([copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))]))
def test_copies_are_equal(problem, duplicate):
    weight, spec, layout = problem
    q = quantize(weight, spec, layout=layout)
    assert duplicate(q).equal(q)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: attrs.evolve(q, packed=q.packed ^ 1),
        lambda q: attrs.evolve(q, scale=q.scale * 2),
        lambda q: attrs.evolve(q, zero_point=q.zero_point ^ 1),
        lambda q: attrs.evolve(q, dtype=torch.float16),
        lambda q: quantize(q.dequantize(), attrs.evolve(GROUPS, symmetric=True)),
    ],
    ids=["codes", "scales", "zero points", "dtype", "spec"],
)
def test_any_difference_makes_tensors_unequal(q, change):
    assert q.equal(attrs.evolve(q))
    assert not q.equal(change(q))
    assert not change(q).equal(q)
