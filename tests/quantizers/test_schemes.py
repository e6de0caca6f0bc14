"""The built-in schemes: the specs that they choose, and the tensors that they keep."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import FP16Cast, Int4Grouped, Int8PerChannel, Int8PerTensor, QuantSpec
from fewbits.errors import ArgumentError, RangeError, SelectionError
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.levels import E4M3, NF4
from fewbits.numerics.quantize import quantize
from fewbits.numerics.spec import SPECS
from fewbits.schemes import SCHEMES, FP8PerChannel, IntNGrouped, MXFP4Grouped, NF4Grouped
from support.lifecycle_helpers import DTYPES, TiedLM, as_bytes, mlp, quantize_small, small
from support.strategies import contents

ALL = [Int8PerTensor, Int8PerChannel, Int4Grouped, NF4Grouped, FP8PerChannel, FP16Cast]

#: The schemes that this version of torch can store.
AVAILABLE = [name for name in SCHEMES if name != "mxfp4" or POWERS_OF_TWO]
needs_powers_of_two = pytest.mark.skipif(POWERS_OF_TWO is None, reason="torch 2.6 has no dtype for powers of two")


def arrays():
    """Matrices in float32 with rows shorter than a group."""
    return contents((4, 31), torch.float32, limit=2.0**100)


def ledger_of(quantizer, source):
    quantizer.prepare(source)
    return quantizer.ledger


def weight(rows, columns, dtype=torch.float32):
    return torch.linspace(-1, 1, rows * columns).reshape(rows, columns).to(dtype)


@given(st.integers(1, 40), st.integers(1, 24), st.booleans())
def test_int4_takes_groups_where_a_row_fills_one_and_int8_where_it_does_not(columns, group_size, symmetric):
    row = ledger_of(small(Int4Grouped, group_size, symmetric=symmetric), {"w": weight(3, columns)})["w"]
    if columns < group_size:
        assert (row.spec.bits, row.spec.granularity) == (8, "channel")
        assert row.reason == f"rows of {columns} are shorter than one group of {group_size}"
    else:
        assert (row.spec.bits, row.spec.group_size, row.spec.symmetric) == (4, group_size, symmetric)
        assert row.reason == "selected"


@given(st.integers(1, 40), st.integers(1, 24), st.booleans())
def test_a_ragged_last_group_is_a_shorter_group(columns, group_size, symmetric):
    value = quantize_small(
        {"w": weight(3, columns)}, "int4", group_size=group_size, symmetric=symmetric, fail_under=0
    ).model["w"]
    groups = -(-columns // group_size) if columns >= group_size else 1
    assert value.scale.shape == (3, groups)
    last = weight(3, columns)[:, group_size * (groups - 1) :]
    if symmetric and columns >= group_size:
        assert torch.allclose(value.scale[:, -1], (last.abs().amax(1) / 7).clamp(min=torch.finfo().tiny))


@pytest.mark.parametrize("junk", [0, -1, 1.5, "128", None, True])
def test_a_group_size_must_be_a_positive_integer(junk):
    with pytest.raises(ArgumentError, match="group_size must be a positive integer"):
        small(Int4Grouped, junk)


@pytest.mark.parametrize("junk", ["yes", 1, None])
def test_symmetric_is_a_bool(junk):
    with pytest.raises((ArgumentError, TypeError), match="symmetric"):
        small(Int4Grouped, symmetric=junk)


def test_an_asymmetric_scheme_has_zero_points_and_is_better_on_shifted_weights():
    shifted = {"w": torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 1}
    figures = {}
    for symmetric in (True, False):
        result = quantize_small(shifted, "int4", group_size=16, symmetric=symmetric)
        assert (result.model["w"].zero_point is None) is symmetric
        figures[symmetric] = result.report.sqnr_db
    assert figures[False] > figures[True]


SKIPPED_BY_INT4 = [
    (nn.Embedding(10, 32), "Embedding is kept by int4 unless asked for"),
    (nn.EmbeddingBag(10, 32), "EmbeddingBag is kept by int4 unless asked for"),
]


@pytest.mark.parametrize(("module", "reason"), SKIPPED_BY_INT4)
def test_int4_keeps_embeddings_by_class(module, reason):
    model = nn.ModuleDict({"e": module, "head": nn.Linear(32, 8)})
    row = ledger_of(small(Int4Grouped, 16), model)["e.weight"]
    assert (row.fate, row.reason) == ("kept", reason)


@pytest.mark.parametrize("name", ["wte", "model.embed_tokens", "embeddings.word_embeddings"])
def test_int4_keeps_embeddings_by_name_where_there_are_no_classes(name):
    tensors = {f"{name}.weight": weight(10, 32), "head.weight": weight(8, 32)}
    row = ledger_of(small(Int4Grouped, 16), tensors)[f"{name}.weight"]
    assert (row.fate, row.reason) == ("kept", "an embedding by name, kept by int4 unless asked for")


@pytest.mark.parametrize(
    "asking",
    [
        {"skip_types": ()},
        {"skip_types": [nn.LayerNorm]},
        {"include": ["wte", "head"]},
    ],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_int4_quantizes_an_embedding_if_asked(asking, as_module):
    model = nn.ModuleDict({"wte": nn.Embedding(10, 32), "head": nn.Linear(32, 8)})
    ledger = ledger_of(small(Int4Grouped, 16, **asking), model if as_module else model.state_dict())
    assert ledger["wte.weight"].fate == "quantized"


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("types", [["Embedding"], [nn.Embedding]])
@pytest.mark.parametrize("scheme", [Int8PerTensor, Int8PerChannel, FP16Cast])
def test_types_to_skip_work_for_every_scheme(scheme, types, as_module):
    if types == [nn.Embedding] and not as_module:
        types = ["Embedding"]
    model = nn.ModuleDict({"wte": nn.Embedding(10, 32), "head": nn.Linear(32, 8)})
    ledger = ledger_of(small(scheme, skip_types=types), model if as_module else model.state_dict())
    assert (ledger["wte.weight"].fate, ledger["head.weight"].fate != "kept") == ("kept", True)


def test_a_tied_embedding_is_kept_with_its_output_layer_unless_a_rule_names_one_of_them():
    assert ledger_of(small(Int4Grouped, 16), TiedLM())["embed_tokens.weight"].fate == "kept"
    asked = small(Int4Grouped, 16, include=["lm_head"])
    assert ledger_of(asked, TiedLM())["embed_tokens.weight"].fate == "quantized"
    assert ledger_of(small(), TiedLM())["embed_tokens.weight"].fate == "quantized"


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("bias", torch.ones(8), "a bias is never quantized"),
        ("a.bias", torch.ones(8, 256), "a bias is never quantized"),
        ("bias_k", torch.ones(1, 1, 256), "a bias is never quantized"),
        ("rnn.bias_ih_l0", torch.ones(8, 256), "a bias is never quantized"),
        ("ids", torch.ones(8, 256, dtype=torch.int64), "int64 is not a floating dtype"),
        ("mask", torch.ones(8, 256, dtype=torch.bool), "bool is not a floating dtype"),
        ("fp8", torch.ones(8, 256).to(torch.float8_e4m3fn), "float8_e4m3fn is a quantized dtype already"),
        ("empty", torch.ones(0, 256), "it has no elements"),
        ("wide_but_empty", torch.ones(8, 0), "it has no elements"),
        ("scalar", torch.tensor(1.0), "0 dimensions; two are needed"),
    ],
)
def test_tensors_that_cannot_be_quantized_are_kept_bit_for_bit_with_a_reason(scheme, name, tensor, reason):
    result = quantize_small({name: tensor, "other": weight(4, 256)}, small(scheme))
    assert (result.ledger[name].fate, result.ledger[name].reason) == ("kept", reason)
    assert result.model[name].dtype == tensor.dtype
    assert as_bytes(result.model[name]) == as_bytes(tensor)


@pytest.mark.parametrize("scheme", ALL)
def test_a_rule_that_names_a_bias_does_not_make_it_a_weight(scheme):
    ledger = ledger_of(small(scheme, include=["0"]), mlp())
    assert (ledger["0.weight"].fate != "kept", ledger["0.bias"].reason) == (True, "a bias is never quantized")
    with pytest.raises(SelectionError, match=r"'bias' names nothing that can be quantized: 0\.bias, a bias is never"):
        small(scheme, include=["0", "bias"]).prepare(mlp())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Int8PerTensor, Int8PerChannel, partial(Int4Grouped, 8)])
def test_scales_have_the_dtype_of_the_weight_unless_set(scheme, dtype):
    for asked in (None, *DTYPES):
        result = quantize_small({"w": weight(4, 32, dtype)}, small(scheme, scale_dtype=asked))
        assert result.model["w"].scale.dtype == (asked or dtype)
        assert result.model["w"].dequantize().dtype == dtype


@pytest.mark.parametrize("junk", [torch.int8, "float16", torch.float8_e4m3fn])
def test_a_scale_dtype_that_is_not_floating_is_refused(junk):
    with pytest.raises(ArgumentError, match="scale_dtype"):
        small(scale_dtype=junk).prepare(mlp())


def test_the_fallback_takes_the_scale_dtype_too():
    row = ledger_of(small(Int4Grouped, scale_dtype=torch.float16), {"w": weight(4, 8)})["w"]
    assert row.spec == QuantSpec(bits=8, granularity="channel", scale_dtype=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp16_casts_tensors_that_are_not_half(dtype):
    result = quantize_small({"w": weight(4, 8, dtype), "other": weight(4, 8)}, "fp16")
    assert result.ledger["w"].fate == ("kept" if dtype == torch.float16 else "cast")
    assert torch.equal(result.model["w"], weight(4, 8, dtype).half())


def test_fp16_refuses_a_model_in_half():
    with pytest.raises(SelectionError, match=r"nothing is left(?s:.*)it is float16 already"):
        small(FP16Cast).prepare(mlp().half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_half_raises_an_error_with_tensor_and_index(dtype, sign):
    tensors = {"fine": weight(4, 8, dtype), "big": weight(4, 8, dtype)}
    tensors["big"][2, 7] = sign * 1e6
    quantizer = small(FP16Cast)
    quantizer.prepare(tensors)
    with pytest.raises(RangeError, match=rf"big, shape \(4, 8\), {str(dtype)[6:]}.*index \(2, 7\)"):
        quantizer.convert()


@pytest.mark.parametrize("value", [65504.0, 65519.0, -65504.0])
def test_values_that_round_to_the_largest_half_are_cast(value):
    result = quantize_small({"w": torch.full((2, 2), value)}, "fp16")
    assert result.model["w"].abs().max() == 65504


@pytest.mark.parametrize("make", [Int8PerChannel, partial(Int4Grouped, 8)])
def test_a_scale_beyond_its_dtype_raises_an_error_with_the_tensor(make):
    quantizer = small(make, scale_dtype=torch.float16)
    quantizer.prepare({"huge": torch.full((2, 16), 1e30)})
    with pytest.raises(RangeError, match=r"huge, shape \(2, 16\).*scale"):
        quantizer.convert()


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.LayerNorm(8), nn.Sequential(), nn.PReLU(4), nn.BatchNorm1d(3)],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("scheme", ALL)
def test_nothing_to_quantize_is_an_error_with_the_summary(scheme, model):
    with pytest.raises(SelectionError, match=r"nothing is left to quantize:(?s:.*)\d tensors"):
        small(scheme).prepare(model)


def test_excluding_everything_is_an_error_that_names_the_rule():
    with pytest.raises(SelectionError, match=r"excluded by '\*'"):
        small(exclude=["*"]).prepare(mlp())


def test_all_zero_weights_are_exact():
    report = quantize_small({"w": torch.zeros(4, 256)}, "int4").report
    assert report.ok
    assert report.tensors[0].measurement.noise == 0


@pytest.mark.parametrize("scheme", ALL)
def test_a_subclass_of_a_known_layer_is_quantized_and_computes_in_its_own_way(scheme):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * x @ self.weight.T + self.bias

    model = nn.Sequential(Doubling(256, 4))
    result = quantize_small(model, small(scheme))
    assert result.ledger["0.weight"].reason == "selected"
    assert isinstance(result.model[0], Doubling)
    fewbits.set_compute(result.model, "exact")
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(result.model(x), fewbits.dequantize(result.model).requires_grad_(False)(x))


def test_every_scheme_has_a_spec_of_its_name_for_overrides():
    assert SPECS.keys() == SCHEMES.keys()


# Every scheme, through every front door.


@pytest.mark.parametrize("scheme", AVAILABLE)
def test_every_scheme_is_taken_by_name_in_every_place(scheme, tmp_path):
    weights = {"a.weight": weight(8, 256), "b.weight": weight(8, 256)}
    ledger = quantize_small(weights, scheme, on_failure="ignore").ledger
    assert SCHEMES[scheme]().name == scheme
    assert ledger["a.weight"].spec == SPECS[scheme].for_dtype(torch.float32)
    assert fewbits.plan(weights, scheme, min_elements=1).ledger.to_json() == ledger.to_json()
    other = quantize_small(weights, "int8-tensor", overrides={"b": scheme}, on_failure="ignore").ledger
    assert other["b.weight"].spec == ledger["b.weight"].spec
    (tmp_path / "c.toml").write_text(f'scheme = "{scheme}"\nmin_elements = 1\non_failure = "ignore"\n')
    config = fewbits.QuantizationConfig.from_file(tmp_path / "c.toml")
    assert fewbits.quantize(weights, config=config).ledger.to_json() == ledger.to_json()


#: Bits per weight of rows of 256 with scales of 16 and of 32 bits, without the 16 bytes of the shape.
STORED_BITS = {
    "int8": (8 + 16 / 256, 8 + 32 / 256),
    "int2": (2.25, 2.5),
    "int3": (3.25, 3.5),
    "int4": (4.125, 4.25),
    "int5": (5.25, 5.5),
    "int6": (6.25, 6.5),
    "int7": (7.25, 7.5),
    "nf4": (4.25, 4.5),
    "mxfp4": (4.25, 4.25),
    "fp8": (8 + 16 / 256, 8 + 32 / 256),
}


@pytest.mark.parametrize("scheme", [name for name in STORED_BITS if name in AVAILABLE])
def test_the_stored_bits_per_weight_are_those_of_the_docstring(scheme):
    for bits, dtype in zip(STORED_BITS[scheme], (torch.float16, torch.float32), strict=True):
        row = ledger_of(small(SCHEMES[scheme]), {"w": weight(8, 256, dtype)})["w"]
        assert (row.bytes_after - 16) * 8 / (8 * 256) == bits
    if scheme != "mxfp4":
        row = ledger_of(small(SCHEMES[scheme], scale_dtype=torch.float16), {"w": weight(8, 256)})["w"]
        assert (row.bytes_after - 16) * 8 / (8 * 256) == STORED_BITS[scheme][0]


@pytest.mark.parametrize("scheme", AVAILABLE)
def test_embeddings_are_kept_by_schemes_of_up_to_4_bits(scheme):
    model = nn.ModuleDict({"e": nn.Embedding(10, 64), "head": nn.Linear(64, 8)})
    row = ledger_of(small(SCHEMES[scheme]), model)["e.weight"]
    few = scheme in ("int2", "int3", "int4", "nf4", "mxfp4")
    assert row.fate == ("kept" if few else "cast" if scheme == "fp16" else "quantized")
    assert row.reason == (f"Embedding is kept by {scheme} unless asked for" if few else "selected")


@given(st.integers(2, 8), st.integers(1, 40), st.booleans())
def test_any_number_of_bits_takes_any_groups(bits, group_size, symmetric):
    quantizer = small(IntNGrouped, bits, group_size, symmetric=symmetric, ragged="shorter")
    row = ledger_of(quantizer, {"w": weight(3, 40)})["w"]
    assert row.spec == QuantSpec(bits, "group", group_size, symmetric, scale_dtype=torch.float32)
    assert quantizer.name == f"int{bits}"


@pytest.mark.parametrize("junk", [1, 9, 4.0, "4", None, True])
def test_bits_must_be_an_integer_from_2_to_8(junk):
    with pytest.raises(ArgumentError, match="bits must be an integer from 2 to 8"):
        small(IntNGrouped, junk)


@given(arrays())
def test_the_errors_of_float_schemes_are_relative_to_the_weight(tensor):
    spec, steps = QuantSpec(8, "channel", levels=E4M3, scale_dtype=torch.float64), tensor.double()
    q = quantize(steps, spec)
    bound = torch.maximum(steps.abs() / 16, q.scale / 1024) + steps.abs() * 2.0**-23
    assert ((q.dequantize() - steps).abs() <= bound).all()


@given(arrays())
def test_the_error_of_nf4_is_at_most_0_152_scales(tensor):
    q = quantize(tensor, QuantSpec(4, "group", group_size=64, levels=NF4, scale_dtype=torch.float32))
    assert ((q.dequantize() - tensor).abs() <= 0.152 * q.scale + tensor.abs() * 2.0**-23).all()


@needs_powers_of_two
@given(arrays())
def test_the_scales_of_mxfp4_are_the_least_powers_of_two_with_at_most_7_steps(tensor):
    q = quantize_small({"w": tensor}, "mxfp4", ragged="shorter", fail_under=-1000).model["w"]
    largest, scale = tensor.double().abs().amax(1), q.scale.double()[:, 0]
    exponents = torch.ceil(torch.log2(largest / 7)).clamp(min=-127)
    assert torch.equal(scale, torch.where(largest > 0, 2.0**exponents, 2.0**-127))
    assert ((q.dequantize() - tensor).abs() <= scale[:, None] + tensor.abs() * 2.0**-23).all()


@needs_powers_of_two
def test_rows_shorter_than_a_group_of_mxfp4_get_int8_with_scales_of_the_weight():
    row = ledger_of(small(MXFP4Grouped), {"w": weight(4, 8), "v": weight(4, 32)})["w"]
    assert row.spec == QuantSpec(bits=8, granularity="channel", scale_dtype=torch.float32)


@pytest.mark.parametrize("use", [lambda: MXFP4Grouped(), lambda: small(overrides={"w": "mxfp4"})])
def test_mxfp4_is_refused_where_torch_has_no_dtype_for_its_scales(use, monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    with pytest.raises((ArgumentError, SelectionError), match="has no dtype float8_e8m0fnu; install torch 2"):
        use()


@needs_powers_of_two
@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
def test_a_model_with_scales_that_are_powers_of_two_is_pickled_and_copied(again):
    model = quantize_small(nn.Sequential(nn.Linear(64, 8)), "mxfp4").model
    copied, x = again(model), torch.ones(2, 64)
    assert copied[0].weight_stored.value().scale.dtype == POWERS_OF_TWO
    assert torch.equal(copied(x), model(x))


@needs_powers_of_two
@pytest.mark.parametrize("rounding", ["scale-search", "gptq"])
def test_powers_of_two_are_searched_and_refitted(rounding):
    model, x = nn.Sequential(nn.Linear(64, 16)), torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    data = [x] if rounding == "gptq" else None
    result = quantize_small(model, "mxfp4", rounding=rounding, data=data)
    assert result.report.ok
    assert result.model[0].weight_stored.value().scale.dtype == POWERS_OF_TWO
