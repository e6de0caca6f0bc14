"""Checkpoints of GPTQ and AWQ are read with their codes unchanged: as a mapping, into a model, and by `convert`."""

import json
import re
import weakref
from pathlib import Path

import attrs
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.cli.commands import cli
from fewbits.errors import FormatError, MismatchError, SourceError
from fewbits.formats.gptq import GPTQ
from fewbits.nn.base import QuantizedModule
from support.qweight import AWQ_ORDER, Layer, Recipe, awq, gptq, layer, recipes, write

#: Layers that GPTQModel packed, and their weights.
PACKED = Path(__file__).parents[1] / "data" / "gptqmodel"

AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("qweight") / "model"


def as_awq(**changes):
    """A layer that AWQ can hold, and its settings."""
    recipe = attrs.evolve(Recipe(version="gptq_v2"), **changes)
    return recipe, AWQ_SETTINGS | {"group_size": recipe.group_size}


def same(value, expected: Layer):
    """Whether a loaded weight has the codes and the numbers of a layer."""
    decoded = value.dequantize(torch.float32)
    return torch.equal(value.codes(), expected.signed()) and torch.equal(decoded, expected.weight())


def test_codes_are_packed_as_the_formats_say():
    made = layer(Recipe(version="gptq_v2"), outputs=8, inputs=8)
    words = gptq("l", made, "gptq_v2")["l.qweight"]
    assert [int(words[0, 3]) >> 4 * i & 15 for i in range(8)] == made.codes[3].tolist()
    words = awq("l", made)["l.qweight"]
    assert [int(words[5, 0]) >> 4 * i & 15 for i in range(8)] == made.codes[list(AWQ_ORDER), 5].tolist()


@given(recipe=recipes(), outputs=st.sampled_from([32, 64]), inputs=st.sampled_from([32, 96, 160]))
def test_load_gives_the_codes_of_every_gptq_scheme(scratch, recipe, outputs, inputs):
    made = layer(recipe, outputs, inputs)
    tensors = gptq("layers.0", made, recipe.version) | {"layers.0.bias": torch.ones(outputs).half()}
    loaded = fewbits.load(write(scratch, tensors, recipe.settings()))
    assert sorted(loaded) == ["layers.0.bias", "layers.0.weight"]
    weight = loaded["layers.0.weight"]
    assert same(weight, made)
    assert weight.spec.symmetric == recipe.symmetric
    assert weight.spec.rounding == "free"
    assert torch.equal(loaded["layers.0.bias"], tensors["layers.0.bias"])


@given(size=st.sampled_from([-1, 16, 32, 128]), outputs=st.sampled_from([8, 40]), inputs=st.sampled_from([32, 100]))
def test_load_gives_the_codes_of_awq(scratch, size, outputs, inputs):
    recipe, settings = as_awq(group_size=size)
    made = layer(recipe, outputs, inputs)
    loaded = fewbits.load(write(scratch, awq("l", made), settings))
    assert same(loaded["l.weight"], made)


@given(seed=st.integers(0, 100))
def test_awq_is_read_as_compressed_tensors_converts_it(scratch, seed):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    made = layer(Recipe(version="gptq_v2"), seed=seed)
    converted = converters.AutoAWQConverter(group_size=32).process({k: v.clone() for k, v in awq("l", made).items()})
    ours = fewbits.load(write(scratch, awq("l", made), AWQ_SETTINGS))["l.weight"]
    assert torch.equal(ours.packed, converted["l.weight_packed"])
    assert torch.equal(ours.scale, converted["l.weight_scale"])
    assert torch.equal(ours.zero_point, converted["l.weight_zero_point"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq-v1", Recipe().settings()),
        ("gptq-v2", Recipe(bits=3, version="gptq_v2").settings()),
        ("gptq-order", Recipe(bits=8, version="gptq_v2", act_order=True).settings()),
        ("awq", AWQ_SETTINGS),
    ],
)
def test_weights_that_gptqmodel_packed_are_read_exactly(tmp_path, name, settings):
    tensors, expected = (safetensors.torch.load_file(PACKED / f"{name}{end}.safetensors") for end in ("", "-expected"))
    path = write(tmp_path / "model", tensors, settings, dtype="float32")
    assert torch.equal(fewbits.load(path, dequantize=True)["l.weight"], expected["l.weight"])


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=3, symmetric=True), Recipe(bits=8, group_size=-1)], ids=str)
def test_settings_may_be_in_quantize_config_json_or_missing(tmp_path, recipe):
    made = layer(recipe)
    path = write(tmp_path / "model", gptq("l", made), None)
    assert same(fewbits.load(path)["l.weight"], made)
    assert not fewbits.load(path)["l.weight"].spec.symmetric
    settings = {"bits": recipe.bits, "group_size": recipe.group_size, "sym": recipe.symmetric}
    (path / "quantize_config.json").write_text(json.dumps(settings))
    assert same(fewbits.load(path)["l.weight"], made)
    assert fewbits.load(path)["l.weight"].spec.symmetric == recipe.symmetric


def test_layers_may_have_bits_and_groups_of_their_own(tmp_path):
    fine, coarse = layer(Recipe(bits=8, group_size=16)), layer(Recipe(bits=4))
    settings = Recipe().settings(dynamic={"+:fine": {"bits": 8, "group_size": 16}})
    loaded = fewbits.load(write(tmp_path / "model", gptq("fine", fine) | gptq("coarse", coarse), settings))
    assert same(loaded["fine.weight"], fine)
    assert same(loaded["coarse.weight"], coarse)


@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), uneven=st.booleans())
def test_columns_in_another_order_are_dequantized_in_the_original_order(scratch, bits, symmetric, uneven):
    made = layer(Recipe(bits=bits, symmetric=symmetric, act_order=True), seed=bits)
    if uneven:
        made = attrs.evolve(made, groups=made.groups.clamp(min=1))
    settings = Recipe(bits=bits, symmetric=symmetric).settings()
    path = write(scratch, gptq("l", made), settings, torch_dtype="float32")
    assert torch.equal(fewbits.load(path)["l.weight"], made.weight())
    row = GPTQ(path).ledger["l.weight"]
    assert (row.fate, "another order (g_idx)" in row.reason) == ("kept", True)


def test_a_zero_point_of_0_that_gptqmodel_stored_in_version_1_is_read(scratch):
    made = layer(Recipe(version="gptq_v2"))
    tensors = gptq("l", made, "gptq_v2")
    # GPTQModel turns version 2 into version 1 by a subtraction from whole words, which borrows from other fields.
    tensors["l.qzeros"] -= 0x11111111
    assert bool((made.zeros == 0).any())
    assert same(fewbits.load(write(scratch, tensors, Recipe().settings()))["l.weight"], made)


def test_a_default_device_does_not_change_what_is_read(scratch):
    for method, changes in (("gptq", {}), ("gptq", {"act_order": True}), ("awq", {})):
        path, _ = checkpoint(scratch, method, **changes)
        expected = fewbits.load(path, dequantize=True)
        with torch.device("meta"):
            found = fewbits.load(path, dequantize=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_have_the_dtype_that_the_config_states(scratch):
    path = write(scratch, gptq("l", layer(Recipe())), Recipe().settings(), torch_dtype="bfloat16")
    weight = fewbits.load(path)["l.weight"]
    assert (weight.dtype, weight.scale.dtype) == (torch.bfloat16, torch.float16)
    assert fewbits.load(path, dequantize=True)["l.weight"].dtype == torch.bfloat16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def checkpoint(path, method, **changes):
    """A checkpoint for `Model`, and the numbers of its weights."""
    recipe, settings = as_awq(**changes) if method == "awq" else (attrs.evolve(Recipe(), **changes), None)
    layers = {"up": layer(recipe, 64, 96), "down": layer(recipe, 32, 64, seed=1)}
    tensors = Model().state_dict()
    for name, made in layers.items():
        del tensors[f"{name}.weight"]
        tensors |= awq(name, made) if method == "awq" else gptq(name, made, recipe.version)
    write(path, tensors, settings or recipe.settings(), torch_dtype="float32")
    return path, layers


@pytest.mark.parametrize(
    ("method", "changes"),
    [("gptq", {}), ("gptq", {"bits": 8, "symmetric": True}), ("gptq", {"bits": 3, "group_size": -1}), ("awq", {})],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpoint_is_loaded_into_a_model_without_requantizing(scratch, method, changes, device):
    path, layers = checkpoint(scratch, method, **changes)
    with torch.device(device):
        empty = Model()
    model = fewbits.load(path, into=empty, device="cpu", compute="exact")
    floats = Model()
    floats.load_state_dict(fewbits.load(path, dequantize=True))
    x = torch.randn(3, 96)
    assert isinstance(model.up, QuantizedModule)
    assert torch.allclose(model(x), floats(x), rtol=1e-4, atol=1e-4)
    for name, made in layers.items():
        assert torch.equal(getattr(model, name).weight, made.weight())


def test_a_weight_in_another_order_is_loaded_into_a_model_as_floats(scratch):
    path, layers = checkpoint(scratch, "gptq", act_order=True)
    model = fewbits.load(path, into=Model())
    assert type(model.up) is nn.Linear
    assert torch.equal(model.up.weight, layers["up"].weight())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_convert_keeps_the_codes(tmp_path, method):
    path, layers = checkpoint(tmp_path / "in", method)
    (path / "tokenizer.json").write_text("{}")
    (path / "quantize_config.json").write_text("{}")
    done = CliRunner().invoke(
        cli, ["convert", str(path), "-o", str(tmp_path / "out"), "--format", "fewbits"], standalone_mode=False
    )
    assert done.return_value == 0, done.exception
    loaded, found = fewbits.load(tmp_path / "out"), fewbits.load(path)
    for name, made in layers.items():
        assert same(loaded[f"{name}.weight"], made)
    assert all(fewbits.QuantizedTensor.equal(value, found[name]) if isinstance(value, fewbits.QuantizedTensor)
               else torch.equal(value, found[name]) for name, value in loaded.items())  # fmt: skip
    assert fewbits.verify(tmp_path / "out", fewbits.load(path, dequantize=True)).ok
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert "gptq" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_the_way_through_fewbits_and_compressed_tensors(tmp_path, bits):
    path, layers = checkpoint(tmp_path / "gptq", "gptq", bits=bits, symmetric=True)
    ways = {"direct": ["compressed-tensors"], "around": ["fewbits", "compressed-tensors", "fewbits"]}
    for way, formats in ways.items():
        found = path
        for index, format in enumerate(formats):
            fewbits.convert(found, tmp_path / f"{way}{index}", format)
            found = tmp_path / f"{way}{index}"
        loaded = fewbits.load(found)
        assert all(same(loaded[f"{name}.weight"], made) for name, made in layers.items())


def test_convert_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    tensors = {}
    for index in range(6):
        tensors |= gptq(f"layers.{index}", layer(Recipe(), seed=index))
    path = write(tmp_path / "in", tensors, Recipe().settings())
    alive = []
    read = GPTQ.value

    def value(self, name):
        assert sum(reference() is not None for reference in alive) <= 1
        found = read(self, name)
        alive.append(weakref.ref(found.packed))
        return found

    monkeypatch.setattr(GPTQ, "value", value)
    fewbits.convert(path, tmp_path / "out")
    assert len(alive) == 12  # once to write, once to compare


def test_verify_compares_with_the_source(scratch):
    path, _ = checkpoint(scratch, "gptq")
    source = fewbits.load(path, dequantize=True)
    report = fewbits.verify(path, source)
    assert report.ok, report.failures
    assert "read as GPTQ: 2 weights" in report.notes
    assert fewbits.verify(path).ok
    report = fewbits.verify(path, source | {"up.weight": -source["up.weight"], "more": torch.ones(2)})
    assert {t.name for t in report.tensors if t.failures} == {"up.weight"}
    assert "more is in the source, not in the result" in report.failures


def test_verify_measures_columns_in_another_order(scratch):
    path, layers = checkpoint(scratch, "gptq", act_order=True)
    source = fewbits.load(path) | {"up.weight": layers["up"].weight() * 1.001}
    report = fewbits.verify(path, source)
    assert report.ok, report.failures
    found = next(tensor for tensor in report.tensors if tensor.name == "up.weight")
    assert found.measurement.sqnr_db == pytest.approx(60, abs=0.1)
    assert not fewbits.verify(path, source | {"up.weight": -source["up.weight"]}).ok


def test_inspect_shows_the_tensors_of_another_tool(scratch):
    path, _ = checkpoint(scratch, "awq")
    shown = CliRunner().invoke(cli, ["inspect", str(path), "--tensors"], standalone_mode=False)
    assert "read as AWQ: 2 weights" in shown.output
    assert "int4 group 32 asymmetric" in shown.output
    as_json = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"], standalone_mode=False).output)
    assert as_json["format"] == "AWQ"
    assert as_json["ledger"]["rows"][0]["name"] == "down.bias"


def test_a_checkpoint_of_gptq_or_awq_is_not_quantized_again(scratch):
    for method in ("gptq", "awq"):
        path, _ = checkpoint(scratch, method)
        with pytest.raises(SourceError, match=re.escape("fewbits.load(path, dequantize=True)")):
            fewbits.plan(path, "int8")
        assert fewbits.plan(fewbits.load(path, dequantize=True), "int8", min_elements=0).ledger.count("quantized") == 2


def test_a_square_weight_of_a_layer_with_inputs_as_rows_is_refused(scratch):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    path = write(scratch, gptq("c", layer(Recipe(), 32, 32)) | {"c.bias": torch.ones(32)}, Recipe().settings())
    model = nn.ModuleDict({"c": Conv1D(32, 32)})
    with pytest.raises(MismatchError, match=r"c\.weight has one row per output in the file, but Conv1D"):
        fewbits.load(path, into=model)
    assert isinstance(model["c"].weight, nn.Parameter)


def test_a_scale_of_zero_is_read_if_all_its_codes_are_zero(scratch):
    made = layer(Recipe(symmetric=True))
    made.scales[3, 1] = 0
    with pytest.raises(FormatError, match=r"l\.weight: a scale is 0, but its codes are not"):
        fewbits.load(write(scratch, gptq("l", made), Recipe(symmetric=True).settings()))
    made.codes[3, 32:64] = 8
    path = write(scratch, gptq("l", made), Recipe(symmetric=True).settings())
    assert same(fewbits.load(path)["l.weight"], made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, s: t.update({"l.qweight": t["l.qweight"][:-1]}), r"l\.qweight \(int32, shape \(11, 32\)\) does not"),
        (lambda t, s: t.update({"l.qweight": t["l.qweight"][:, :-8]}), r"l\.qweight .*shape \(12, 24\)\) does not"),
        (lambda t, s: t.update({"l.qzeros": t["l.qzeros"][:-1]}), r"l\.qzeros .*needs shape \(3, 4\) with 4 bits"),
        (lambda t, s: t.update({"l.scales": t["l.scales"][:-1]}), r"l\.qzeros .*needs shape \(2, 4\)"),
        (lambda t, s: t.update({"l.scales": t["l.scales"].int()}), r"l\.scales \(int32.*must be a matrix of float"),
        (lambda t, s: t.update({"l.qweight": t["l.qweight"].long()}), r"l\.qweight \(int64.*must be a matrix of int32"),
        (lambda t, s: t.update({"l.scales": t["l.scales"][0]}), r"l\.scales .*must be a matrix"),
        (lambda t, s: t["l.scales"].fill_(torch.nan), r"l\.weight: a scale is NaN or Inf"),
        (lambda t, s: t.pop("l.scales"), r"l\.qweight has no l\.scales beside it"),
        (lambda t, s: t.pop("l.qzeros"), r"l\.qweight has no l\.qzeros beside it"),
        (lambda t, s: t.update({"m.qzeros": torch.ones(1)}), r"m\.qzeros is a part of a weight whose codes"),
        (lambda t, s: t.update({"l.weight": torch.ones(1)}), r"l\.weight is stored twice"),
        (lambda t, s: t["l.g_idx"].fill_(3), r"l\.g_idx .*names groups from 3 to 3; there are 3 groups"),
        (lambda t, s: t["l.g_idx"].fill_(-1), r"l\.g_idx .*names groups from -1"),
        (lambda t, s: t.update({"l.g_idx": t["l.g_idx"][:50]}), r"l\.qweight .*needs shape \(7, 32\) for 50 inputs"),
        (lambda t, s: t.update({"l.g_idx": t["l.g_idx"].float()}), r"l\.g_idx \(float32.*one integer per input \(96\)"),
        (lambda t, s: s.update(bits=8), r"l\.qzeros .*needs shape \(3, 8\) with 8 bits"),
        (lambda t, s: s.update(bits=5), "codes of 5 bits; fewbits reads GPTQ with 2, 3, 4 or 8 bits"),
        (lambda t, s: s.update(bits="4"), "bits must be of type int, not '4'"),
        (lambda t, s: s.update(group_size=64), r"groups of 64 \(group_size of the settings\) for its 96 inputs"),
        (lambda t, s: s.update(group_size=0), "groups of 0"),
        (lambda t, s: s.update(group_size=-7), "groups of -7"),
        (lambda t, s: s.update(sym=True), r"l\.qzeros has zero points from 1 to 15, but the settings say sym: true"),
        (lambda t, s: s.update(sym="no"), "sym must be of type bool"),
        (lambda t, s: s.update(checkpoint_format="marlin"), "version is 'marlin'; fewbits reads gptq, gptq_v2"),
        (lambda t, s: s.update(is_marlin_format=True), "version is 'marlin'"),
        (lambda t, s: s.update(quant_method="awq", checkpoint_format="gemm"), r"l\.qweight .*AWQ needs 12 rows of one"),
        (lambda t, s: s.update(quant_method=3), "quant_method must be of type str"),
    ],
)  # fmt: skip
def test_damage_is_refused_with_the_tensor_and_what_was_expected(scratch, change, said):
    tensors, settings = gptq("l", layer(Recipe())), Recipe().settings()
    change(tensors, settings)
    path = write(scratch, tensors, settings)
    with pytest.raises(FormatError, match=said):
        fewbits.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, s: t.update({"l.qweight": t["l.qweight"][:, :-1]}), r"l\.qweight .*96 rows of one word for each 8"),
        (lambda t, s: t.update({"l.qzeros": t["l.qzeros"][:-1]}), r"l\.qzeros .*AWQ needs 3 rows of one word"),
        (lambda t, s: t.update({"l.scales": t["l.scales"][:, :-1]}), r"l\.qweight .*for each 8 of 31 outputs"),
        (lambda t, s: s.update(bits=8), "codes of 8 bits; fewbits reads AWQ with 4 bits"),
        (lambda t, s: s.update(version="gemv"), "version is 'gemv'; fewbits reads gemm"),
        (lambda t, s: s.update(group_size=128), r"groups of 128 \(group_size of the settings\) for its 96 inputs"),
    ],
)  # fmt: skip
def test_damaged_awq_is_refused(scratch, change, said):
    tensors, settings = awq("l", layer(Recipe(version="gptq_v2"))), dict(AWQ_SETTINGS)
    change(tensors, settings)
    with pytest.raises(FormatError, match=said):
        fewbits.load(write(scratch, tensors, settings))


def test_a_damaged_tensor_leaves_the_model_unchanged(scratch):
    path, layers = checkpoint(scratch, "gptq")
    made = attrs.evolve(layers["up"], scales=torch.full_like(layers["up"].scales, torch.nan))
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    write(path, tensors | gptq("up", made), Recipe().settings())
    model = Model()
    before = model.down.weight.clone()
    with pytest.raises(FormatError, match=r"up\.weight: a scale is NaN"):
        fewbits.load(path, into=model)
    assert type(model.down) is nn.Linear
    assert torch.equal(model.down.weight, before)
