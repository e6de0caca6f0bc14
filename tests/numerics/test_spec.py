"""Specs are values: checked when made, and written to JSON and back."""

import json

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import CastSpec, QuantSpec
from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.spec import SPECS, spec_from_dict
from support.strategies import FLOATS, specs

AFFINE = {
    "kind": "affine",
    "bits": 4,
    "granularity": "group",
    "group_size": 32,
    "symmetric": True,
    "scale_dtype": "float16",
}


@given(specs() | st.sampled_from([CastSpec(dtype) for dtype in FLOATS]))
def test_a_spec_survives_json(spec):
    fields = json.loads(json.dumps(spec.to_dict()))
    kept = dict(fields)
    assert spec_from_dict(fields) == spec
    assert fields == kept


@given(specs())
def test_a_spec_is_a_value(spec):
    twin = attrs.evolve(spec)
    assert twin == spec
    assert hash(twin) == hash(spec)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        twin.bits = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": None}, "bits"),
        ({"granularity": "row"}, "granularity"),
        ({"granularity": None}, "granularity"),
        ({"granularity": ["group"]}, "granularity"),
        ({"granularity": "channel", "group_size": 32}, "group_size"),
        ({"granularity": "tensor", "group_size": 32}, "group_size"),
        ({"granularity": "channel", "group_size": 0}, "group_size"),
        ({"granularity": "group", "group_size": None}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -1}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": 32.0}, "group_size"),
        ({"symmetric": "no"}, "symmetric"),
        ({"symmetric": 0}, "symmetric"),
        ({"symmetric": None}, "symmetric"),
        ({"scale_dtype": torch.int8}, "scale_dtype"),
        ({"scale_dtype": torch.float8_e4m3fn}, "scale_dtype"),
        ({"scale_dtype": "float16"}, "scale_dtype"),
        ({"activations": "int8"}, "activations"),
        ({"activations": True}, "activations"),
        ({"activations": ["static"]}, "activations"),
        ({"activations": "dynamic"}, "int8 activations need integer codes and granularity 'channel' or 'tensor'"),
        ({"rounding": "up"}, "rounding"),
        ({"rounding": None}, "rounding"),
        ({"levels": [0.0]}, "levels of 4 bits must be 9 to 16"),
    ],
)
def test_a_spec_refuses_a_bad_field_and_names_it(fields, message):
    with pytest.raises(ArgumentError, match=message):
        QuantSpec(**({"bits": 4, "granularity": "group", "group_size": 32} | fields))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e5m2, None, "float16"])
def test_a_cast_goes_to_a_floating_dtype(dtype):
    with pytest.raises(ArgumentError, match="dtype must be float64, float32, float16 or bfloat16, not"):
        CastSpec(dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "affine"},
        {"kind": "cast"},
        {"kind": "cast", "dtype": None},
        {"kind": "cast", "dtype": "int8"},
        {"kind": "cast", "dtype": "float16", "bits": 4},
        AFFINE | {"kind": "lattice"},
        AFFINE | {"kind": None},
        AFFINE | {"kind": ["affine"]},
        AFFINE | {"levels": 4},
        AFFINE | {"levels": [0.0, 1.0]},
        AFFINE | {"activations": "static"},
        AFFINE | {"rounding": "down"},
        AFFINE | {"steps": 4},
        AFFINE | {"bits": True},
        AFFINE | {"bits": 9},
        AFFINE | {"group_size": 0},
        AFFINE | {"granularity": "channel"},
        AFFINE | {"symmetric": "yes"},
        AFFINE | {"scale_dtype": "float17"},
        AFFINE | {"scale_dtype": "int8"},
        AFFINE | {"scale_dtype": "nn"},
        AFFINE | {"scale_dtype": 16},
        {name: value for name, value in AFFINE.items() if name != "bits"},
    ],
    ids=str,
)
def test_a_description_that_is_not_a_spec_is_refused(fields):
    with pytest.raises(ArgumentError):
        spec_from_dict(fields)


def test_a_description_may_omit_fields_with_default_values():
    spec = QuantSpec(bits=4, granularity="group", group_size=32, scale_dtype=torch.float16)
    assert spec_from_dict(AFFINE) == spec
    assert {name for name, value in spec.to_dict().items() if name not in AFFINE and value} == {"rounding"}


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_activations_survive_json_and_leave_the_weight_alone(activations, granularity):
    spec = QuantSpec(bits=8, granularity=granularity, activations=activations)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.weight_only() == QuantSpec(bits=8, granularity=granularity)
    assert QuantSpec(bits=8, granularity=granularity).weight_only() == QuantSpec(bits=8, granularity=granularity)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_two_s_complement(bits):
    spec = QuantSpec(bits=bits, granularity="tensor")
    assert (spec.code_min, spec.code_max) == (-(2**bits) // 2, 2**bits // 2 - 1)


@given(specs(), st.integers(1, 20), st.integers(1, 200))
def test_groups_cover_a_row_without_empty_groups(spec, rows, columns):
    width, groups = spec.width(columns), spec.groups(columns)
    assert (groups - 1) * width < columns <= groups * width
    assert spec.scale_shape(rows, columns) == ((1,) if spec.granularity == "tensor" else (rows, groups))


def test_a_group_larger_than_a_row_is_the_row():
    assert QuantSpec(bits=4, granularity="group", group_size=128).scale_shape(3, 100) == (3, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_have_the_dtype_of_the_weight_by_default(dtype):
    spec = QuantSpec(bits=8, granularity="channel")
    assert spec.for_dtype(dtype).scale_dtype == dtype
    assert spec.for_dtype(torch.float16).for_dtype(dtype).scale_dtype == torch.float16


def test_a_cast_does_not_depend_on_the_source_s_dtype():
    assert CastSpec(torch.float16).for_dtype(torch.float32) == CastSpec(torch.float16)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(bits=8, granularity="tensor"), "int8 tensor"),
        (QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False), "int4 group 64 asymmetric"),
        (CastSpec(torch.bfloat16), "bfloat16"),
        (QuantSpec(bits=8, granularity="channel", activations="dynamic"), "int8 channel, dynamic int8 inputs"),
        (QuantSpec(bits=2, granularity="channel", levels=(-1, 0, 1, 2)), "4 levels channel"),
        (SPECS["nf4"], "nf4 group 64"),
        (SPECS["mxfp4"], "e2m1 group 32"),
        (SPECS["fp8"], "e4m3 channel"),
    ],
)
def test_a_spec_prints_as_readable_text(spec, text):
    assert str(spec) == text


@pytest.mark.skipif(POWERS_OF_TWO is None, reason="torch 2.6 has no such dtype")
def test_rows_with_scales_in_parts_have_no_powers_of_two():
    with pytest.raises(ArgumentError, match="scale_bits needs a scale_dtype that is not a power of two"):
        QuantSpec(bits=4, granularity="group", group_size=32, scale_bits=6, scale_dtype=POWERS_OF_TWO)
