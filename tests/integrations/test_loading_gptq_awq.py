"""Checkpoints of GPTQ and AWQ are loaded into models of transformers, whose experts are fused, with their codes."""

import json

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.nn.base import QuantizedModule
from support.qweight import Recipe, awq, gptq, layer

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "dtype": "float32",
}  # fmt: skip
CLASSES = {"Llama": {}, "Qwen3": {"head_dim": 16}, "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1}}


def quantized_copy(folder, method):
    """Replace the Linear weights of a saved model by random layers: in GPTQ or AWQ, and as floats beside it."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    floats, recipe = dict(state), Recipe(version="gptq_v2")
    for index, name in enumerate(sorted(state)):
        prefix = name.removesuffix(".weight")
        if prefix.endswith(("_proj", ".w1", ".w2", ".w3")):
            made = layer(recipe, *state.pop(name).shape, seed=index)
            floats[name] = made.weight()
            state |= awq(prefix, made) if method == "awq" else gptq(prefix, made, recipe.version)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config["quantization_config"] = settings if method == "awq" else recipe.settings()
    target = folder.with_name(method)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, target / "model.safetensors")
    safetensors.torch.save_file(floats, folder / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_computes_with_the_codes_of_the_file(tmp_path, kind, method):
    config = getattr(transformers, f"{kind}Config")(**SIZES, **CLASSES[kind])
    make = getattr(transformers, f"{kind}ForCausalLM")
    make(config).save_pretrained(tmp_path / "floats")
    path = quantized_copy(tmp_path / "floats", method)
    expected = make.from_pretrained(tmp_path / "floats").eval()
    model = fewbits.load(path, into=make(config), compute="exact").eval()
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    assert any("mlp" in name for name in names)
    for name in names:
        for parameter, value in expected.get_submodule(name).named_parameters(recurse=False):
            assert torch.equal(getattr(model.get_submodule(name), parameter), value)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)
