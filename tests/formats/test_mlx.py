"""Directories for MLX that `fewbits.convert` writes, checked against the format's definition and by MLX itself."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import fewbits
from fewbits.errors import ArgumentError, FormatError
from fewbits.formats.mlx import MLXCheckpoint, MLXFormat
from fewbits.numerics.tensor import QuantizedTensor, same_bits


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed.weight": (112, 64),
        "model.q.weight": (48, 192),
        "model.q.bias": (48,),
        "head.weight": (8, 64),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def small(folder: Path, tensors: dict[str, Tensor], **settings) -> Path:
    (folder / "float").mkdir()
    safetensors.torch.save_file(tensors, folder / "float" / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": 112}
    (folder / "float" / "config.json").write_text(json.dumps(config))
    settings = {"min_elements": 0, "skip_types": (), "on_failure": "ignore"} | settings
    fewbits.quantize(folder / "float", output=folder / "small", **settings)
    return folder / "small"


def converted(path: Path, **options) -> Path:
    fewbits.convert(path, path.with_name("out"), MLXFormat(**options))
    return path.with_name("out")


def decoded(weight: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """The definition: a code is a number of `bits` bits, the lowest first; it stands for ``scale * code + bias``."""
    words = weight.view(torch.int32).long() & 0xFFFFFFFF
    codes = torch.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1).flatten(1)
    size = codes.shape[1] // scales.shape[1]
    return codes * scales.double().repeat_interleave(size, 1) + biases.double().repeat_interleave(size, 1)


SCHEMES = {
    "int4, groups of 32": ({"scheme": "int4", "group_size": 32}, 32),
    "int4, groups of 64": ({"scheme": "int4", "group_size": 64}, 64),
    "int4, a ragged group": ({"scheme": "int4", "group_size": 128, "ragged": "shorter"}, 64),
    "int8": ({"scheme": "int8"}, 64),
    "int8-tensor": ({"scheme": "int8-tensor"}, 64),
    "float16 scales": ({"scheme": "int8", "scale_dtype": torch.float16}, 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("settings", "group_size"), SCHEMES.values(), ids=SCHEMES)
def test_the_tensors_decode_by_the_definition_of_the_format(tmp_path, settings, group_size, dtype):
    source = small(tmp_path, weights(dtype), **settings)
    tensors = safetensors.torch.load_file(converted(source) / "model.safetensors")
    bits = 4 if settings["scheme"] == "int4" else 8
    for name, value in fewbits.load(source).items():
        module = name.removesuffix(".weight")
        if not isinstance(value, QuantizedTensor):
            assert same_bits(tensors[name], value)
            continue
        columns = value.layout.columns
        assert tensors[name].dtype == torch.uint32
        assert tensors[f"{module}.scales"].shape == (value.shape[0], columns // group_size)
        found = decoded(tensors[name], tensors[f"{module}.scales"], tensors[f"{module}.biases"], bits)
        assert torch.equal(found.to(dtype), value.dequantize())


def test_mlx_dequantizes_the_same_numbers(tmp_path):
    mx = pytest.importorskip("mlx.core")
    source = small(tmp_path, weights(), scheme="int8", overrides={"head": {"scheme": "int4", "group_size": 32}})
    tensors, settings = mx.load(str(converted(source) / "model.safetensors")), config(tmp_path / "out")["quantization"]
    for name, value in fewbits.load(source).items():
        module = name.removesuffix(".weight")
        if isinstance(value, QuantizedTensor):
            own = {"group_size": settings["group_size"], "bits": settings["bits"], **settings.get(module, {})}
            parts = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
            found = torch.tensor(mx.dequantize(*parts, **own).tolist())
            assert torch.allclose(found, value.dequantize(), rtol=1e-5, atol=1e-6)


def config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_the_configuration_names_every_layer_with_another_scheme(tmp_path):
    source = small(tmp_path, weights(), scheme="int8", overrides={"head": {"scheme": "int4", "group_size": 32}})
    expected = {"group_size": 64, "bits": 8, "head": {"group_size": 32, "bits": 4}}
    found = config(converted(source))
    assert found["quantization"] == found["quantization_config"] == expected
    assert found["model_type"] == "llama"


def test_transformers_refuses_a_directory_for_mlx(tmp_path):
    transformers = pytest.importorskip("transformers")
    out = converted(small(tmp_path, weights(), scheme="int8"))
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


REFUSED = {
    "has zero points": {"scheme": "int4", "group_size": 32, "symmetric": False},
    "is int3 group 64; MLX takes integers of 4 or 8 bits": {"scheme": "int3"},
    "is nf4 group 64; MLX takes integers of 4 or 8 bits": {"scheme": "nf4"},
    "has two levels of scales": {"scheme": "int4", "group_size": 32, "scale_bits": 6},
    "quantizes its inputs too": {"scheme": "int8", "activations": "dynamic"},
    "has rows of 64 and groups of 16, which groups of 32 do not divide": {"scheme": "int4", "group_size": 16},
}


@pytest.mark.parametrize(("reason", "settings"), REFUSED.items(), ids=REFUSED)
def test_weights_that_mlx_cannot_hold_are_refused_or_stored_as_floats(tmp_path, reason, settings):
    source = small(tmp_path, weights(), **settings)
    with pytest.raises(ArgumentError) as caught:
        fewbits.convert(source, tmp_path / "out", "mlx")
    assert reason in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "small"]
    found = MLXCheckpoint(converted(source, allow=True))
    for name, value in fewbits.load(source, dequantize=True).items():
        if f"{name} {reason}" in str(caught.value):
            assert same_bits(found.value(name), value)


def test_convolutions_and_checkpoints_without_a_model_are_refused(tmp_path):
    tensors = {"conv.weight": torch.randn(64, 32, 3, 3)}
    fewbits.quantize(tensors, "int8").save(tmp_path / "small.safetensors")
    with pytest.raises(
        ArgumentError, match=r"config\.json of a transformers model.*conv\.weight of shape \(64, 32, 3, 3\)"
    ):
        fewbits.convert(tmp_path / "small.safetensors", tmp_path / "out", "mlx")


def test_experts_of_a_layer_must_share_one_scheme(tmp_path):
    experts = {f"model.mlp.experts.{e}.up_proj.weight": torch.randn(32, 64) for e in range(3)}
    source = small(tmp_path, experts, scheme="int8", exclude=["*.experts.1"])
    with pytest.raises(ArgumentError, match="all experts of a layer need one scheme"):
        fewbits.convert(source, tmp_path / "out", "mlx")


def test_biases_of_other_codes_are_refused_when_read_back(tmp_path):
    out = converted(small(tmp_path, weights(), scheme="int8"))
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    tensors["head.biases"] += 1e-3
    safetensors.torch.save_file(tensors, out / "model.safetensors")
    with pytest.raises(FormatError, match=r"head\.biases are not those of symmetric codes"):
        MLXCheckpoint(out).value("head.weight")
    text = config(out) | {"quantization": {"bits": 5, "group_size": 64}}
    (out / "config.json").write_text(json.dumps(text))
    with pytest.raises(FormatError, match=r"quantization in config\.json does not describe"):
        MLXCheckpoint(out)
