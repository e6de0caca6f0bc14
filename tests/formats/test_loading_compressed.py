"""`load` reads a checkpoint of compressed-tensors, and its weights can be quantized again once they are floats."""

import re

import pytest
import torch
from hypothesis import given
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, FormatError, MismatchError, SourceError
from fewbits.formats.registry import open_quantized
from fewbits.nn.base import QuantizedModule
from support.compressed import Recipe, config, pack, quantized, recipes, rounded, write

NAME = "layers.0.weight"


def source():
    generator = torch.Generator().manual_seed(0)
    return {NAME: torch.randn(33, 48, generator=generator), "norm.weight": torch.ones(48)}


def decoded(weight, recipe):
    """The decoded weight."""
    codes, scale, zero = rounded(weight, recipe)
    width = weight.numel() if recipe.group_size == 0 else recipe.group_size or weight.shape[1]
    groups = codes.double().reshape(-1, width) - zero.double().reshape(-1, 1)
    return (groups * scale.double().reshape(-1, 1)).reshape(weight.shape).float()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed") / "model"


@given(recipe=recipes())
def test_load_gives_the_codes_of_every_scheme(scratch, recipe):
    path = write(scratch, quantized(source(), recipe, (NAME,)), config(recipe))
    loaded = fewbits.load(path)
    assert set(loaded) == set(source())
    assert torch.equal(loaded[NAME].codes(), rounded(source()[NAME], recipe)[0])
    assert torch.allclose(loaded[NAME].dequantize(), decoded(source()[NAME], recipe), rtol=1e-6, atol=0)
    assert torch.equal(loaded["norm.weight"], source()["norm.weight"])


def test_a_checkpoint_is_quantized_again_after_it_is_dequantized_on_request(scratch, tmp_path):
    recipe = Recipe(bits=8, group_size=None)
    path = write(scratch, quantized(source(), recipe, (NAME,)), config(recipe))
    floats = fewbits.load(path, dequantize=True)
    assert torch.allclose(floats[NAME], decoded(source()[NAME], recipe), rtol=1e-6, atol=0)
    assert fewbits.plan(floats, "int4", group_size=8, min_elements=0).ledger[NAME].spec.bits == 4
    result = fewbits.quantize(floats, "int4", group_size=8, min_elements=0)
    result.save(tmp_path / "out.safetensors")
    assert fewbits.verify(tmp_path / "out.safetensors", floats).ok
    assert fewbits.load(tmp_path / "out.safetensors")[NAME].spec.bits == 4


@pytest.mark.parametrize("packed", [True, False])
def test_codes_are_not_quantized_again_without_dequantizing_first(scratch, packed):
    recipe = Recipe(bits=8, packed=packed)
    path = write(scratch, quantized(source(), recipe, (NAME,)), config(recipe))
    with pytest.raises(SourceError, match=re.escape("fewbits.load(path, dequantize=True)")):
        fewbits.plan(path, "int4")


def another_order():
    return torch.randperm(48, generator=torch.Generator().manual_seed(1))


def reordered():
    """Tensors of a weight whose columns are not in the order of the groups."""
    recipe, weight, order = Recipe(bits=4, group_size=8), source()[NAME], another_order()
    # The file holds codes in the order of the columns, and a scale for each group of them.
    codes, _, _ = rounded(weight[:, order], recipe)
    groups = torch.empty(48, dtype=torch.int32)
    groups[order] = torch.arange(48, dtype=torch.int32) // 8
    tensors = quantized({NAME: weight[:, order]}, recipe, (NAME,))
    return tensors | {f"{NAME}_packed": pack(codes[:, torch.argsort(order)], 4), f"{NAME}_g_idx": groups}


def test_columns_in_another_order_are_loaded_in_the_original_order(scratch):
    recipe, order = Recipe(bits=4, group_size=8), another_order()
    loaded = fewbits.load(write(scratch, reordered(), config(recipe)))
    expected = decoded(source()[NAME][:, order], recipe)[:, torch.argsort(order)]
    assert torch.allclose(loaded[NAME], expected, rtol=1e-6, atol=0)


def test_a_tied_weight_stays_tied_when_it_is_dequantized(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    fewbits.quantize(model, "int8", min_elements=0).save(tmp_path / "tied.safetensors")
    loaded = fewbits.load(tmp_path / "tied.safetensors", dequantize=True)
    assert loaded["0.weight"] is loaded["1.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{NAME}_shape"), f"{NAME}: .*no {NAME}_shape"),
        (lambda t: t.pop(f"{NAME}_packed"), f"{NAME}_scale is a part of a weight whose codes are missing"),
    ],
)
def test_a_tensor_that_cannot_be_read_is_named(scratch, change, said):
    tensors = quantized(source(), Recipe(), (NAME,))
    change(tensors)
    with pytest.raises(FormatError, match=said):
        fewbits.load(write(scratch, tensors, config(Recipe())))


def test_weights_of_a_transformed_model_are_refused(scratch):
    settings = config(Recipe(), transform_config={"config_groups": {"R1": {}}})
    with pytest.raises(FormatError, match="names transforms"):
        fewbits.load(write(scratch, quantized(source(), Recipe(), (NAME,)), settings))


def test_scales_of_activations_are_left_out_and_named(scratch, caplog):
    tensors = quantized(source(), Recipe(), (NAME,)) | {"layers.0.input_scale": torch.ones(1)}
    with caplog.at_level("WARNING"):
        loaded = fewbits.load(write(scratch, tensors, config(Recipe())))
    assert set(loaded) == set(source())
    assert "layers.0.input_scale" in caplog.text


@given(recipe=recipes(bits=4))
def test_a_checkpoint_is_loaded_into_a_model_without_requantizing(scratch, recipe):
    tensors = quantized(source(), recipe, (NAME,)) | {"layers.0.bias": torch.zeros(33)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(48, 33)]), "norm": nn.LayerNorm(48, bias=False)})
    loaded = fewbits.load(write(scratch, tensors, config(recipe)), into=model)
    assert loaded is model
    assert isinstance(model["layers"][0], QuantizedModule)
    assert torch.allclose(model["layers"][0].weight, decoded(source()[NAME], recipe), rtol=1e-6, atol=0)


@given(recipe=recipes())
def test_convert_keeps_the_codes(scratch, recipe):
    path = write(scratch, quantized(source(), recipe, (NAME,)), config(recipe))
    target = scratch.with_name("converted")
    fewbits.convert(path, target, "fewbits", replace=True)
    found, converted = fewbits.load(path), fewbits.load(target)
    assert found.keys() == converted.keys()
    assert found[NAME].equal(converted[NAME])


def test_convert_refuses_a_checkpoint_with_a_tensor_that_cannot_be_read(scratch, tmp_path):
    tensors = quantized(source(), Recipe(), (NAME,))
    del tensors[f"{NAME}_shape"]
    with pytest.raises(FormatError, match=f"no {NAME}_shape"):
        fewbits.convert(write(scratch, tensors, config(Recipe())), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_writes_columns_in_another_order_as_floats(scratch, tmp_path):
    path = write(scratch, reordered(), config(Recipe(bits=4, group_size=8)))
    fewbits.convert(path, tmp_path / "out")
    assert torch.equal(fewbits.load(tmp_path / "out")[NAME], fewbits.load(path)[NAME])
    row = open_quantized(tmp_path / "out").ledger[NAME]
    assert (row.fate, "another order (g_idx)" in row.reason) == ("kept", True)


def test_a_model_is_loaded_as_a_whole_or_not_at_all(scratch):
    with pytest.raises(ArgumentError, match="give it without into="):
        fewbits.load(scratch, into=nn.Linear(48, 33), dequantize=True)
    path = write(scratch, quantized(source(), Recipe(), (NAME,)), config(Recipe()))
    with pytest.raises(ArgumentError, match="check must be"):
        fewbits.load(path, check="none")
    with pytest.raises(MismatchError, match=r"layers\.0\.weight is in the file, not in the model"):
        fewbits.load(path, into=nn.Linear(48, 33))
