"""Whole models of transformers: which tensors get codes, the outputs, and saving and loading."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the architectures are those of transformers")

import fewbits
from architectures.models import ARCHITECTURES, MODELS_OF_EXPERTS, Architecture
from nn.any_cases import plain, same_outputs
from nn.cases import same_bits

pytestmark = pytest.mark.usefixtures("reference_only")

#: Groups that fit rows of 64; those of 128 would fall back to int8.
SCHEMES = {"int8": fewbits.Int8PerChannel, "int4": lambda: fewbits.Int4Grouped(32)}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
#: Every architecture with one scheme or the other; slow tests take both.
every_combination = pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        pytest.param(architecture, scheme, marks=[pytest.mark.slow] * ((i + j) % 2), id=f"{scheme}-{architecture}")
        for i, architecture in enumerate(ARCHITECTURES)
        for j, scheme in enumerate(SCHEMES)
    ],
)

_spec = importlib.util.spec_from_file_location("coverage", Path(__file__).parents[2] / "examples" / "coverage.py")
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)


def convert(architecture: Architecture, scheme: str) -> tuple[nn.Module, fewbits.Quantizer]:
    quantizer = SCHEMES[scheme]()
    quantizer.prepare(architecture.build())
    # Torch takes other paths, which round otherwise, where a bias requires gradients.
    return quantizer.convert().requires_grad_(False), quantizer


@every_combination
def test_a_model_computes_as_its_dequantized_form_and_comes_through_a_file(architecture, scheme, tmp_path):
    model, quantizer = convert(architecture, scheme)
    assert quantizer.validate().ok
    output = architecture.run(model)
    assert output
    assert all(part.isfinite().all() for part in output)
    assert same_outputs(output, architecture.run(plain(model)))
    assert same_outputs(architecture.run(copy.deepcopy(model)), output)
    quantizer.save(tmp_path / "model.safetensors")
    fresh = fewbits.load(tmp_path / "model.safetensors", into=architecture.build(seed=1))
    assert same_outputs(architecture.run(fresh), output)
    with torch.device("meta"):
        empty = architecture.build()
    filled = fewbits.load(tmp_path / "model.safetensors", into=empty)
    assert same_outputs(architecture.run(filled), output)


@every_combination
def test_a_large_tensor_is_kept_only_because_the_scheme_skips_its_class(architecture, scheme):
    source = architecture.build()
    quantizer = SCHEMES[scheme]()
    quantizer.prepare(source)
    buffers = {name for name, _ in source.named_buffers()}
    for row in coverage.large_and_kept(quantizer.ledger):
        skipped = scheme == "int4" and row.reason.endswith("kept by int4 unless asked for")
        assert row.name in buffers or skipped or row.reason == "a bias is never quantized", row


@every_architecture
def test_no_bias_has_codes(architecture):
    quantizer = SCHEMES["int8"]()
    quantizer.prepare(architecture.build())
    biases = [row for row in quantizer.ledger if row.name.endswith("bias") and row.fate != "alias"]
    assert all(row.fate == "kept" for row in biases)


# Layouts that a class declares.

LAYOUTS = {
    "GPT2": {"attn.c_attn.weight": (0,), "mlp.c_proj.weight": (0,)},
    "Mixtral": {"experts.gate_up_proj": (2,), "experts.down_proj": (2,)},
    "Qwen3Moe": {"experts.gate_up_proj": (2,), "experts.down_proj": (2,)},
    "DeepseekV3": {"experts.gate_up_proj": (2,), "experts.down_proj": (2,)},
    "GptOss": {"experts.gate_up_proj": (1,), "experts.down_proj": (1,)},
    "Llama4Text": {"experts.gate_up_proj": (1,), "experts.down_proj": (1,)},
    "ConvNext": {"patch_embeddings.weight": (1, 2, 3), "pwconv1.weight": (1,)},
    "Mamba": {"conv1d.weight": (1, 2)},
}


@pytest.mark.parametrize(("name", "axes"), LAYOUTS.items(), ids=LAYOUTS)
def test_weights_are_cut_along_the_axes_they_are_multiplied_with(name, axes):
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    _, quantizer = convert(architecture, "int4")
    for end, inputs in axes.items():
        rows = [row for row in quantizer.ledger if row.name.endswith(end)]
        assert rows
        for row in rows:
            assert row.layout == fewbits.extend.Layout.of(row.shape, inputs=inputs)
            assert "cut by its shape" not in row.reason


# Models of experts, of the size at which the default groups fit.


@pytest.mark.parametrize("architecture", MODELS_OF_EXPERTS, ids=str)
def test_nine_bytes_of_ten_of_a_model_of_experts_get_int4_codes(architecture):
    ledger = coverage.ledger_of(architecture.build())
    assert coverage.share(ledger, 4) >= 0.9
    assert all("Embedding" in row.reason for row in coverage.large_and_kept(ledger))
    for row in ledger:
        if ".experts." in row.name:
            assert row.layout == fewbits.extend.Layout.of(row.shape, inputs=(2,))
            assert row.scheme == "int4 group 128"


@pytest.mark.parametrize("architecture", MODELS_OF_EXPERTS, ids=str)
def test_a_model_of_experts_computes_as_its_dequantized_form(architecture):
    quantizer = fewbits.Int4Grouped()
    quantizer.prepare(architecture.build())
    model = quantizer.convert().requires_grad_(False)
    assert quantizer.validate().ok
    assert same_outputs(architecture.run(model), architecture.run(plain(model)))


# Operations of transformers on a model.


def test_generation_gives_the_tokens_of_the_dequantized_model():
    architecture = next(each for each in ARCHITECTURES if each.name == "Llama")
    model, _ = convert(architecture, "int4")
    ids = architecture.inputs()["input_ids"]
    floats = plain(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **options), floats.generate(ids, **options))


def test_tied_embeddings_stay_tied_and_are_found_again_by_transformers():
    architecture = next(each for each in ARCHITECTURES if each.name == "GPT2")
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(architecture.build())
    model = quantizer.convert().requires_grad_(False)
    assert quantizer.ledger["lm_head.weight"].alias_of == "transformer.wte.weight"
    assert model.lm_head.weight_stored is model.transformer.wte.weight_stored
    assert model.get_input_embeddings() is model.transformer.wte
    assert same_bits(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_every_way_to_run_experts_computes_as_the_dequantized_model(name, implementation):
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    model, _ = convert(architecture, "int4")
    model.set_experts_implementation(implementation)
    assert same_outputs(architecture.run(model), architecture.run(plain(model)))
