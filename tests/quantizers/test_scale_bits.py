"""Two levels of scales at every front door: live, file to file, modules, settings, and the command line."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

import fewbits
from fewbits.cli.commands import cli
from fewbits.errors import ArgumentError, FormatError
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.rounding import ROUNDINGS
from fewbits.testing import check_rounding, specs

SETTINGS = {"scheme": "int4", "group_size": 32, "scale_bits": 6, "min_elements": 1}


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


@pytest.fixture
def result():
    return fewbits.quantize(model(), **SETTINGS)


@torch.no_grad()
@pytest.mark.parametrize("compute", ["exact", "auto", "int8"])
def test_a_quantized_module_computes_with_them(result, compute):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    fewbits.set_compute(result.model, compute)
    expected = nn.functional.linear(x, result.model[0].weight, result.model[0].bias)
    error = (result.model[0](x) - expected).norm() / expected.norm()
    assert float(error) < (1e-6 if compute == "exact" else 0.02)


def test_copies_pickles_and_state_dicts_keep_them(result):
    for again in (copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        assert again[0].weight.equal(result.model[0].weight)
    state = result.model.state_dict()
    assert {"0.weight_scale", "0.weight_scale_codes"} <= state.keys()
    other = fewbits.quantize(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40)), **SETTINGS).model
    other.load_state_dict(state, strict=True)
    assert other[0].weight.equal(result.model[0].weight)
    assert result.model.half().state_dict()["0.weight_scale"].dtype == torch.float32


def test_resident_memory_is_the_stored_bytes(result):
    fewbits.set_compute(result.model, "exact")
    held = sum(buffer.nbytes for name, buffer in result.model.named_buffers() if "weight" in name)
    row = {row.name: row for row in result.ledger}
    shapes = 2 * 2 * 8
    assert held == row["0.weight"].bytes_after + row["2.weight"].bytes_after - shapes


def test_a_file_loads_into_a_model_and_dequantizes(result, tmp_path):
    result.save(tmp_path / "small.safetensors")
    loaded = fewbits.load(tmp_path / "small.safetensors", into=model())
    x = torch.randn(3, 96)
    assert loaded(x).equal(result.model(x))
    assert fewbits.dequantize(loaded)[0].weight.equal(result.model[0].weight)
    assert fewbits.verify(tmp_path / "small.safetensors").ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_file_whose_row_has_a_scale_that_is_not_finite_is_refused(result, tmp_path, value):
    result.model[0].weight_stored.scale[3] = value
    assert not result.quantizer.validate(on_failure="ignore").ok
    result.save(tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=r"a scale is zero, NaN or Inf, of 0\.weight"):
        fewbits.load(tmp_path / "bad.safetensors")


def test_settings_of_every_kind_reach_them(tmp_path):
    expected = fewbits.QuantSpec(4, "group", group_size=32, scale_bits=6)
    assert fewbits.Int4Grouped(32, scale_bits=6).spec == expected
    (tmp_path / "c.toml").write_text('scheme = "int4"\ngroup_size = 32\n[overrides]\n"2" = {scale_bits = 3}\n')
    config = fewbits.QuantizationConfig.from_file(tmp_path / "c.toml").replace(scale_bits=6)
    ledger = fewbits.quantize(model(), config=config, min_elements=1).ledger
    assert [ledger[name].spec.scale_bits for name in ("0.weight", "2.weight")] == [6, 3]
    with pytest.raises(ArgumentError, match="'int8' does not take scale_bits"):
        fewbits.QuantizationConfig(scheme="int8", scale_bits=6)
    with pytest.raises(ArgumentError, match="scale_bits must be"):
        fewbits.QuantizationConfig(scheme="int4", scale_bits=9)


def test_the_command_line_writes_the_bytes_of_the_library(tmp_path):
    safetensors.torch.save_file({"a.weight": model()[0].weight.data}, tmp_path / "in.safetensors")
    options = ["--scheme", "int4", "--group-size", "32", "--scale-bits", "6", "--quiet"]
    done = CliRunner().invoke(
        cli, ["quantize", str(tmp_path / "in.safetensors"), "-o", str(tmp_path / "out.safetensors"), *options]
    )
    assert done.exit_code == 0, done.output
    settings = {"scheme": "int4", "group_size": 32, "scale_bits": 6}
    fewbits.quantize(tmp_path / "in.safetensors", output=tmp_path / "by library.safetensors", **settings)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "by library.safetensors").read_bytes()
    assert fewbits.verify(tmp_path / "out.safetensors", tmp_path / "in.safetensors").ok


def test_tiles_and_words_hold_the_same_scales(result):
    words = result.model[0].weight_stored.weight_layout()
    if Int4Tiles.refuses(words) is None:
        tiles = Int4Tiles.of(words)
        assert tiles.decoded(slice(None)).equal(words.decoded(slice(None)))
        assert tiles.value(torch.float32).equal(words.value(torch.float32))


def test_a_compiled_model_computes_the_same(result):
    fewbits.set_compute(result.model, "exact")
    x = torch.randn(3, 96)
    compiled = torch.compile(result.model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), result.model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ROUNDINGS))
def test_no_rounding_strategy_is_worse_than_plain_rounding_with_them(name):
    drawn = specs(granularity="group", scale_bits=4)
    checks = check_rounding(ROUNDINGS[name](), specs=drawn, max_examples=5)
    next(check for check in checks if "no_row_is_worse" in str(check))()


def test_readers_of_compressed_tensors_get_no_configuration(tmp_path):
    from fewbits.formats.compressed_rules import transformers_obstacles

    ledger = fewbits.quantize(model(), **SETTINGS).ledger
    assert "two levels of scales" in transformers_obstacles(ledger, ())["0.weight"]
