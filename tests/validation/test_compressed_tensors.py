"""Verify checkpoints in the formats of compressed-tensors: genuine results pass, and all damage is found."""

import contextlib
import json
import math
import re

import attrs
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.sources.open import open_source
from fewbits.validation.verify import verify
from support.compressed import Recipe, config, pack, quantized, recipes, rounded, stored, words, write

WEIGHTS = ("layers.0.weight", "layers.1.weight")
SHAPES = st.tuples(st.integers(2, 70), st.sampled_from([48, 96]))
FINE = Recipe(bits=8, group_size=None)


def source(shape=(33, 48), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        WEIGHTS[0]: normal(*shape),
        WEIGHTS[1]: normal(*shape) * 0.02,
        "layers.0.bias": normal(shape[0]),
        "lm_head.weight": normal(5, shape[1]),
        "steps": torch.tensor(7),
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed") / "model"


def failing(report):
    return {tensor.name for tensor in report.tensors if tensor.failures}


def failures_of(report, name=WEIGHTS[0]):
    return "; ".join(next(tensor for tensor in report.tensors if tensor.name == name).failures)


def decoded(weight, recipe):
    """The dequantized weight, in float64."""
    codes, scale, zero = rounded(weight, recipe)
    width = weight.numel() if recipe.group_size == 0 else recipe.group_size or weight.shape[1]
    groups = codes.double().reshape(-1, width) - zero.double().reshape(-1, 1)
    return (groups * scale.double().reshape(-1, 1)).reshape(weight.shape)


def test_codes_are_packed_as_the_format_says():
    assert words([1, 2, 3], 4) == [0x321]
    assert words([7] * 11, 3) == [-1, 1]


@given(recipes(), SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_a_genuine_result_passes_and_its_sqnr_is_right(scratch, recipe, shape, dtype, configured):
    original = source(shape, dtype)
    tensors = quantized(original, recipe, WEIGHTS)
    write(scratch, tensors, config(recipe) if configured else None)
    report = fewbits.verify(scratch, original, fail_under=-math.inf)
    assert report.ok, report.failures
    assert [tensor.name for tensor in report.tensors] == sorted(original)
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    for tensor in report.tensors:
        if tensor.name in WEIGHTS:
            weight = original[tensor.name].double()
            noise = (weight - decoded(original[tensor.name], recipe)).square().sum()
            expected = 10 * math.log10(weight.square().sum() / noise)
            assert tensor.measurement.sqnr_db == pytest.approx(expected, abs=1e-6)
            assert tensor.measurement.elements == weight.numel()


@given(recipes(), st.sampled_from([1, 100, 3000]))
def test_the_chunk_size_does_not_change_the_report(scratch, recipe, elements):
    original = source((70, 48))
    write(scratch, quantized(original, recipe, WEIGHTS), config(recipe))
    whole = verify(scratch, open_source(original), fail_under=-math.inf)
    pieces = verify(scratch, open_source(original), chunk_elements=elements, fail_under=-math.inf)
    assert pieces == whole


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda t: t[f"{WEIGHTS[0]}_scale"].zero_(), "scale is zero", id="scales zero"),
        pytest.param(lambda t: t[f"{WEIGHTS[0]}_scale"].view(-1)[-1:].fill_(math.nan), "NaN", id="a scale is NaN"),
        pytest.param(lambda t: t[f"{WEIGHTS[0]}_scale"].mul_(4), "SQNR", id="scales too large"),
        pytest.param(lambda t: t.pop(f"{WEIGHTS[0]}_scale"), "not in the result|int8 of shape", id="scales dropped"),
        pytest.param(lambda t: t["layers.0.bias"].add_(1e-6), "not equal", id="a kept tensor changed"),
        pytest.param(lambda t: t.pop("layers.0.bias"), "not in the result", id="a kept tensor dropped"),
        pytest.param(lambda t: t.update(extra=torch.ones(3)), "not in the source", id="one tensor more"),
        pytest.param(lambda t: t.update({"layers.0.bias": torch.ones(3)}), r"of shape \(3,\)", id="another shape"),
        pytest.param(lambda t: t.update(steps=t["steps"].int()), "int32 of shape", id="another integer dtype"),
    ],
)
@given(recipe=recipes(bits=8))
def test_damage_to_any_result_is_found(scratch, recipe, damage, said):
    original = source()
    tensors = {name: tensor.clone() for name, tensor in quantized(original, recipe, WEIGHTS).items()}
    damage(tensors)
    write(scratch, tensors, config(recipe))
    report = fewbits.verify(scratch, original)
    assert not report.ok
    assert re.search(said, "; ".join(report.failures))


def others(codes, damage):
    """Damaged codes, and the expected failure."""
    if damage == "columns moved":
        return codes.roll(1, 1), "SQNR"
    if damage == "rows moved":
        return codes.roll(1, 0), "SQNR"
    if damage == "one code":
        return torch.full_like(codes, int(codes.min())), "all of its codes are"
    if damage == "one row":
        return codes[:1].expand_as(codes), "SQNR"
    codes[5 : 5 + damage] = 1
    return codes, f"one code throughout in {damage} of its rows"


@given(recipes(), st.sampled_from(["columns moved", "rows moved", "one code", "one row", 1, 2]), st.booleans())
def test_damaged_codes_are_found(scratch, recipe, damage, configured):
    recipe = attrs.evolve(recipe, bits=max(4, recipe.bits))
    original = source((40, 48))
    tensors = quantized(original, recipe, WEIGHTS)
    codes, said = others(rounded(original[WEIGHTS[0]], recipe)[0], damage)
    name = f"{WEIGHTS[0]}_packed" if recipe.packed else WEIGHTS[0]
    tensors[name] = pack(codes, recipe.bits) if recipe.packed else codes.contiguous()
    write(scratch, tensors, config(recipe) if configured else None)
    report = fewbits.verify(scratch, original)
    assert failing(report) == {WEIGHTS[0]}
    assert said in failures_of(report)


def test_a_weight_without_codes_is_reported_with_its_remaining_tensors(scratch):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS)
    del tensors[f"{WEIGHTS[0]}_packed"]
    report = fewbits.verify(write(scratch, tensors, config(FINE)), original)
    assert f"{WEIGHTS[0]} is in the source, not in the result" in report.failures
    assert any(failure.startswith(f"{WEIGHTS[0]}_scale is in the result, but") for failure in report.failures)
    alone = fewbits.verify(scratch)
    assert any(failure.startswith(f"{WEIGHTS[0]}_scale is in the result") for failure in alone.failures)


def test_a_weight_of_another_shape_is_found(scratch):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS)
    report = fewbits.verify(write(scratch, tensors), {**original, WEIGHTS[0]: torch.randn(48, 33)})
    assert "has shape (33, 48); in the source it is float32 of shape (48, 33)" in failures_of(report)


def test_a_weight_that_the_source_lacks_is_found(scratch):
    original = source()
    write(scratch, quantized(original, FINE, WEIGHTS))
    del original[WEIGHTS[1]]
    assert "is in the result but not in the source" in failures_of(fewbits.verify(scratch, original), WEIGHTS[1])


def test_kept_tensors_may_be_cast_which_the_report_notes(scratch):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS)
    tensors["layers.0.bias"] = tensors["layers.0.bias"].bfloat16()
    report = fewbits.verify(write(scratch, tensors, config(FINE)), original)
    assert report.ok
    assert any("compared after a cast to bfloat16 (layers.0.bias)" in note for note in report.notes)
    tensors["layers.0.bias"].view(torch.int16)[3] ^= 1
    assert failing(fewbits.verify(write(scratch, tensors, config(FINE)), original)) == {"layers.0.bias"}


def test_a_cast_that_overflows_is_found(scratch):
    original = source() | {"big": torch.tensor([1.0, 1e6])}
    tensors = quantized(original, FINE, WEIGHTS) | {"big": original["big"].half()}
    report = fewbits.verify(write(scratch, tensors, config(FINE)), original)
    assert failures_of(report, "big") == "some of its numbers are beyond float16"


def test_errors_beyond_half_a_step_are_a_note(scratch):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS)
    codes = rounded(original[WEIGHTS[0]], FINE)[0]
    codes[3, 4] = codes[3, 4] - 3 if codes[3, 4] > 0 else codes[3, 4] + 3
    report = fewbits.verify(write(scratch, tensors | {f"{WEIGHTS[0]}_packed": pack(codes, 8)}, config(FINE)), original)
    assert report.ok
    assert any("beyond half a step" in note and WEIGHTS[0] in note for note in report.notes)
    assert "beyond half a step" in report.summary()
    worst = next(tensor for tensor in report.tensors if tensor.name == WEIGHTS[0]).measurement
    assert worst.broken_at == (3, 4)
    assert worst.worst_bound_ratio > 1


def test_columns_in_another_order_with_g_idx_are_read(scratch):
    original, recipe = source(), Recipe(group_size=8)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    groups = torch.empty(48, dtype=torch.int32)
    groups[order] = (torch.arange(48) // 8).int()
    codes, scale, _ = rounded(original[WEIGHTS[0]][:, order], recipe)
    tensors = quantized(original, recipe, WEIGHTS)
    tensors |= {
        f"{WEIGHTS[0]}_packed": pack(codes[:, order.argsort()], 4),
        f"{WEIGHTS[0]}_scale": scale,
        f"{WEIGHTS[0]}_g_idx": groups,
    }
    write(scratch, tensors, config(recipe))
    pieces = verify(scratch, open_source(original), chunk_elements=500)
    assert pieces.ok, pieces.failures
    assert all(tensor.measurement.worst_bound_ratio <= 1.001 for tensor in pieces.tensors if tensor.measurement)
    tensors[f"{WEIGHTS[0]}_g_idx"] = groups.clamp(min=1)
    assert "g_idx" in failures_of(fewbits.verify(write(scratch, tensors, config(recipe)), original))


def scaled_to_float8(weight, dtype, rows, columns):
    """A weight in float8 and its scales, one for each block of rows and columns."""
    height, width = weight.shape
    blocks = weight.reshape(height // rows, rows, width // columns, columns)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(dtype).max
    return (blocks / scale[:, None, :, None]).reshape(weight.shape).to(dtype), scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(32, 48), (1, 48), (1, 8), (16, 8)], ids=str)
def test_float8_is_read(scratch, dtype, block):
    original = source((32, 48))
    tensors = {name: tensor for name, tensor in original.items() if name != WEIGHTS[0]}
    values, scale = scaled_to_float8(original[WEIGHTS[0]], dtype, *block)
    strategy = {(32, 48): "tensor", (1, 48): "channel", (1, 8): "group", (16, 8): "block"}[block]
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    scheme |= {"group_size": 8} if strategy == "group" else {"block_structure": [16, 8]} if strategy == "block" else {}
    settings = config(FINE, config_groups={"g": {"weights": scheme}}, format="float-quantized")
    write(scratch, tensors | {WEIGHTS[0]: values, f"{WEIGHTS[0]}_scale": scale}, settings)
    report = verify(scratch, open_source(original), chunk_elements=300)
    assert report.ok, report.failures
    found = next(tensor for tensor in report.tensors if tensor.name == WEIGHTS[0])
    expected = values.double() * scale.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    error = (original[WEIGHTS[0]].double() - expected).square().sum()
    power = original[WEIGHTS[0]].double().square().sum()
    assert found.measurement.sqnr_db == pytest.approx(10 * math.log10(power / error), abs=1e-6)
    assert found.scheme.startswith(f"{str(dtype).removeprefix('torch.')} ")
    values.view(torch.uint8)[0, 0] = 0x7F
    write(scratch, tensors | {WEIGHTS[0]: values, f"{WEIGHTS[0]}_scale": scale}, settings)
    assert "holds NaN or Inf" in failures_of(fewbits.verify(scratch, original))


def test_stacks_of_matrices_are_read(scratch):
    experts = torch.randn(3, 10, 48)
    flat = stored("experts.weight", experts.reshape(30, 48), Recipe())
    flat["experts.weight_packed"] = flat["experts.weight_packed"].reshape(3, 10, -1)
    flat["experts.weight_scale"] = flat["experts.weight_scale"].reshape(3, 10, -1)
    flat["experts.weight_shape"] = torch.tensor([3, 10, 48])
    assert fewbits.verify(write(scratch, flat, config(Recipe())), {"experts.weight": experts}).ok


def test_convolution_kernels_with_a_scale_per_row_are_read(scratch):
    kernel = torch.randn(6, 4, 3, 3)
    codes, scale, _ = rounded(kernel.reshape(6, 36), Recipe(8, None))
    tensors = {"conv.weight": codes.reshape(kernel.shape), "conv.weight_scale": scale.reshape(6, 1, 1, 1)}
    assert fewbits.verify(write(scratch, tensors), {"conv.weight": kernel}).ok


def test_a_checkpoint_with_several_schemes_is_read(scratch):
    original, other = source(), Recipe(8, 0, packed=False)
    tensors = quantized(original, Recipe(), WEIGHTS[:1])
    tensors = {name: t for name, t in tensors.items() if name != WEIGHTS[1]} | stored(
        WEIGHTS[1], original[WEIGHTS[1]], other
    )
    report = fewbits.verify(write(scratch, tensors, config(Recipe(), other)), original)
    assert report.ok, report.failures
    assert {t.scheme for t in report.tensors if t.scheme} == {"int4 group 8", "int8 tensor"}


def test_a_model_with_tied_weights_is_compared_with_its_result(scratch):
    model = nn.Sequential(nn.Embedding(12, 48), nn.Linear(48, 48), nn.Linear(48, 12, bias=False))
    model[2].weight = model[0].weight
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "2.weight"}
    write(scratch, quantized(state, FINE, ("1.weight",)), config(FINE))
    assert fewbits.verify(scratch, model).ok


def test_the_report_lists_missing_checks_and_inferred_schemes(scratch):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS) | {"layers.0.input_scale": torch.tensor([0.5])}
    report = fewbits.verify(write(scratch, tensors), original)
    assert report.ok
    assert [reason.partition(":")[0] for reason in report.unchecked] == [
        "digests",
        "1 scales and zero points of activations",
    ]
    assert "digests" not in report.checks
    assert any("inferred from shapes: int8 channel" in note for note in report.notes)
    alone = fewbits.verify(scratch)
    assert alone.ok
    assert "no source to compare with" in alone.unchecked[1]
    assert "SQNR" not in alone.checks
    tensors["layers.0.input_scale"].zero_()
    assert fewbits.verify(write(scratch, tensors), original).failures == ["layers.0.input_scale is zero, NaN or Inf"]


def test_constant_codes_are_a_note_without_a_source(scratch):
    tensors = quantized(source(), FINE, WEIGHTS)
    tensors[f"{WEIGHTS[0]}_packed"].zero_()
    report = fewbits.verify(write(scratch, tensors))
    assert report.ok
    assert any("all of its codes are -128" in note for note in report.notes)


def test_notes_are_in_the_json(scratch):
    report = fewbits.verify(write(scratch, quantized(source(), FINE, WEIGHTS)), source())
    assert json.loads(report.to_json())["notes"] == report.notes != []


def split(path, tensors, moved):
    """Split a file into two with an index."""
    first = {name: tensor for name, tensor in tensors.items() if name not in moved}
    parts = {
        "model-00001-of-00002.safetensors": first,
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in moved},
    }
    (path / "model.safetensors").unlink()
    for file, part in parts.items():
        safetensors.torch.save_file(part, path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("kind", ["directory", "index"])
def test_parts_of_a_weight_may_be_in_several_files(tmp_path, kind):
    original = source()
    tensors = quantized(original, FINE, WEIGHTS)
    path = write(tmp_path / "model", tensors, config(FINE))
    split(path, tensors, [f"{WEIGHTS[0]}_scale", "steps"])
    report = fewbits.verify(path if kind == "directory" else path / "model.safetensors.index.json", original)
    assert report.ok, report.failures


def test_an_index_that_contradicts_its_files_is_refused(tmp_path):
    tensors = quantized(source(), FINE, WEIGHTS)
    path = write(tmp_path / "model", tensors, config(FINE))
    weight_map = split(path, tensors, ["steps"])
    weight_map["more"] = weight_map["steps"]
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(fewbits.errors.FormatError, match="names more, which none of its files holds"):
        fewbits.verify(path)


SCHEME = FINE.weights()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "must be an object"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"config_groups": [1]}, "config_groups must be of type dict"),
        ({"config_groups": {"g": 3}}, "config_groups.g must be an object"),
        ({"config_groups": {"g": {"weights": "int4"}}}, "weights must be of type dict"),
        ({"config_groups": {"g": {"weights": SCHEME | {"num_bits": "4"}}}}, "num_bits must be of type int"),
        ({"config_groups": {"g": {"weights": SCHEME | {"num_bits": True}}}}, "num_bits must be of type int"),
        ({"config_groups": {"g": {"weights": SCHEME | {"symmetric": 1}}}}, "symmetric must be of type bool"),
        ({"config_groups": {"g": {"weights": SCHEME | {"strategy": "group"}}}}, "group_size must be positive"),
        ({"config_groups": {"g": {"weights": SCHEME | {"strategy": "block"}}}}, "block_structure must be given"),
        ({"config_groups": {"g": {"weights": SCHEME | {"block_structure": [1, -2]}}}}, "two positive integers"),
        ({"config_groups": {"g": {"weights": SCHEME | {"block_structure": "1xx2y"}}}}, "two positive integers"),
        ({"ignore": "lm_head"}, "ignore must be of type list"),
        ({"format": 3}, "format must be of type str"),
    ],
)
def test_a_config_with_a_value_of_the_wrong_type_is_refused(scratch, settings, said):
    settings = [1] if settings == [] else config(FINE) | settings
    write(scratch, quantized(source(), FINE, WEIGHTS), settings)
    with pytest.raises(fewbits.errors.FormatError, match=said):
        fewbits.verify(scratch, source())


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff{}", b'{"a":' + b"[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(scratch, text):
    write(scratch, quantized(source(), FINE, WEIGHTS))
    (scratch / "config.json").write_bytes(text)
    with pytest.raises(fewbits.errors.FormatError, match=r"config\.json"):
        fewbits.verify(scratch, source())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*SCHEME, "block_structure"]), JSON, st.sampled_from(["weights", "group", "config"]))
def test_any_config_is_verified_or_refused_with_a_format_error(scratch, key, value, where):
    settings = config(FINE)
    group = settings["config_groups"]["group_0"]
    {"weights": group["weights"], "group": group, "config": settings}[where][key] = value
    write(scratch, quantized(source(), FINE, WEIGHTS), settings)
    with contextlib.suppress(fewbits.errors.FormatError):
        assert fewbits.verify(scratch, source()).tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"_packed": torch.zeros(33, 12)}, "packed codes must be int32", id="codes in float"),
        pytest.param({"_packed": torch.zeros(33, 12, dtype=torch.uint8)}, "uint8", id="codes in bytes"),
        pytest.param({"_packed": torch.zeros(5, dtype=torch.int32)}, "rows and columns", id="one axis"),
        pytest.param({"_packed": torch.zeros(33, 11, dtype=torch.int32)}, "11 words for 48 columns", id="a word less"),
        pytest.param({"_packed": torch.zeros(32, 12, dtype=torch.int32)}, "shape says", id="a row less"),
        pytest.param({"_shape": torch.tensor([33, 1 << 60])}, "shape says", id="columns beyond all bounds"),
        pytest.param({"_shape": torch.tensor([33, -48])}, "shape says", id="fewer than no columns"),
        pytest.param({"_shape": torch.tensor(33)}, "two integers or more", id="a scalar for a shape"),
        pytest.param({"_shape": torch.tensor([33.0, 48.0])}, "two integers or more", id="a shape in float"),
        pytest.param({"_shape": None}, "no layers.0.weight_shape", id="no shape"),
        pytest.param({"_scale": torch.ones(33, 2)}, "scales have shape", id="more scales"),
        pytest.param({"_scale": torch.ones(1, 33)}, "scales have shape", id="scales transposed"),
        pytest.param({"_scale": torch.ones(33, 1, dtype=torch.int32)}, "int32; fewbits", id="scales in integers"),
        pytest.param({"_scale": torch.ones(0)}, "scales have shape", id="no scales"),
        pytest.param({"_g_idx": torch.zeros(48, dtype=torch.int32)}, "g_idx", id="an order without groups"),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_with_contradictory_parts_is_a_failure_with_its_reason(scratch, change, said, symmetric):
    original, recipe = source(), Recipe(8, None, symmetric)
    tensors = quantized(original, recipe, WEIGHTS) | {f"{WEIGHTS[0]}{part}": t for part, t in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    report = fewbits.verify(write(scratch, tensors, config(recipe)), original)
    assert failing(report) == {WEIGHTS[0]}
    assert said in failures_of(report)
    assert "1 tensors that cannot be read" in report.unchecked[-1]


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
          torch.float8_e4m3fn, torch.complex64]  # fmt: skip
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 33, 48]), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(-9, 127),
)


@given(
    recipes(),
    st.dictionaries(st.sampled_from(["", "_packed", "_shape", "_scale", "_zero_point", "_g_idx"]), TENSORS, min_size=1),
    st.booleans(),
    st.booleans(),
)
def test_any_parts_of_a_weight_are_verified_or_reported_as_failures(scratch, recipe, parts, configured, compared):
    original = source()
    tensors = quantized(original, recipe, WEIGHTS) | {f"{WEIGHTS[0]}{part}": tensor for part, tensor in parts.items()}
    write(scratch, tensors, config(recipe) if configured else None)
    assert fewbits.verify(scratch, original if compared else None).tensors


@pytest.mark.parametrize("zero", [torch.zeros(33, 1), torch.zeros(3, 1, dtype=torch.int32), torch.zeros(0)])
def test_zero_points_of_the_wrong_dtype_or_shape_are_a_failure_with_its_reason(scratch, zero):
    original, recipe = source(), Recipe(8, None, symmetric=False)
    tensors = quantized(original, recipe, WEIGHTS) | {f"{WEIGHTS[0]}_zero_point": zero}
    assert "zero_point" in failures_of(fewbits.verify(write(scratch, tensors, config(recipe)), original))


def test_missing_zero_points_are_a_failure(scratch):
    original, recipe = source(), Recipe(8, None, symmetric=False)
    tensors = quantized(original, recipe, WEIGHTS)
    del tensors[f"{WEIGHTS[0]}_zero_point"]
    assert "no zero points" in failures_of(fewbits.verify(write(scratch, tensors, config(recipe)), original))


@pytest.mark.parametrize("part", ["", "_zero_point"])
def test_a_one_byte_code_outside_the_range_of_its_bits_is_a_failure(scratch, part):
    original, recipe = source(), Recipe(4, 8, symmetric=False, packed=False)
    tensors = quantized(original, recipe, WEIGHTS)
    tensors[f"{WEIGHTS[0]}{part}"][0, 0] = 8
    report = fewbits.verify(write(scratch, tensors, config(recipe)), original)
    assert failing(report) == {WEIGHTS[0]}
    assert "beyond int4 group 8 asymmetric" in failures_of(report)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "marlin-24"}, "marlin-24, which fewbits does not read"),
        ({"ignore": ["layers.0"]}, "config.json says that its module is not"),
        ({"config_groups": {"g": {"weights": Recipe(4, None).weights()}}}, "does not match config.json"),
        ({"config_groups": {"g": {"weights": SCHEME | {"strategy": "token"}}}}, "fewbits does not read that strategy"),
        ({"config_groups": {"g": {"weights": SCHEME | {"num_bits": 16}}}}, "integers of 2 to 8 bits"),
        ({"config_groups": {"g": {"weights": SCHEME | {"type": "float"}}}}, "integers of 2 to 8 bits"),
    ],
)
def test_tensors_that_contradict_the_config_are_a_failure(scratch, changes, said):
    write(scratch, quantized(source(), FINE, WEIGHTS), config(FINE, **changes))
    report = fewbits.verify(scratch, source())
    assert WEIGHTS[0] in failing(report)
    assert said in failures_of(report)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"quantization_status": "frozen"}, "quantization_status"), ({"transform_config": {"a": {}}}, "transforms")],
)
def test_a_config_that_explains_a_bad_result_is_noted(scratch, changes, said):
    report = fewbits.verify(write(scratch, quantized(source(), FINE, WEIGHTS), config(FINE, **changes)), source())
    assert any(said in note for note in report.notes)


def test_too_few_columns_to_infer_the_bits_need_a_config(scratch):
    weights, recipe = {"w": torch.randn(9, 4)}, Recipe(4, None)
    tensors = stored("w", weights["w"], recipe)
    assert "may be codes of" in failures_of(fewbits.verify(write(scratch, tensors), weights), "w")
    assert fewbits.verify(write(scratch, tensors, config(recipe)), weights).ok


def test_a_config_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    path = write(tmp_path / "model", quantized(source(), FINE, WEIGHTS))
    (tmp_path / "other.json").write_text("{}")
    (path / "config.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(fewbits.errors.FormatError, match="outside of its directory"):
        fewbits.verify(path)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fewbits_tensors_without_their_metadata_measure_the_same(tmp_path, symmetric):
    original = source()
    scheme = fewbits.Int4Grouped(16, symmetric=symmetric, selector=fewbits.LayerSelector(min_elements=1))
    result = fewbits.quantize(original, scheme)
    result.save(tmp_path / "file")
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "file"), tmp_path / "bare")
    report = fewbits.verify(tmp_path / "bare", original)
    assert report.ok, report.failures
    measured = {tensor.name: tensor.measurement for tensor in report.tensors}
    assert measured == {tensor.name: tensor.measurement for tensor in result.report.tensors}


def test_a_fewbits_file_is_verified_as_such_beside_any_config(tmp_path):
    original = source()
    result = fewbits.quantize(original, "int8", min_elements=1)
    (tmp_path / "out").mkdir()
    result.save(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    report = fewbits.verify(tmp_path / "out", original)
    assert report.ok
    assert "digests" in report.checks
