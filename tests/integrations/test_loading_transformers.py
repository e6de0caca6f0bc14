"""Load results into transformers models built on the meta device, with torch or with accelerate."""

import copy

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import MismatchError
from nn.cases import same_bits, same_state, seeded, tensors_in

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}
GEMMA = {**LLAMA, "head_dim": 16, "pad_token_id": 0}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 64}

#: Model class, its configuration, and whether it ties weights.
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA, False),
    "Llama, tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, True),
    "Gemma 3": ("Gemma3ForCausalLM", GEMMA, True),
    "BERT": ("BertForMaskedLM", {**SIZES, "max_position_embeddings": 32}, True),
    "T5": ("T5ForConditionalGeneration", T5, True),
    "GPT-2": ("GPT2LMHeadModel", GPT2, True),
    "Swin": ("SwinModel", SWIN, False),
}


KINDS = ["model", "state dict", "disk"]
CASES = [(name, kind, means) for name in MODELS for kind in KINDS for means in ("torch", "accelerate")]
CASES += [("Llama, tied", kind, "accelerate, buffers too") for kind in KINDS]


def make(name: str) -> nn.Module:
    cls, sizes, _ = MODELS[name]
    cls = getattr(transformers, cls)
    return cls(cls.config_class(**sizes)).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 13).view(1, 10)
    inputs = {"pixel_values": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
    if model.main_input_name == "input_ids":
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model(**inputs)[0]


def quantized(source, path, kind):
    """The path of a result made from a model, from its state dict, or from its checkpoint on disk."""
    if kind == "disk":
        source.save_pretrained(path / "source")
        fewbits.quantize(path / "source", "int8", output=path / "result", validate=False)
        return path / "result"
    result = fewbits.quantize(source if kind == "model" else dict(source.state_dict()), "int8", validate=False)
    result.save(path / "result.safetensors")
    return path / "result.safetensors"


def on_meta(name: str, means: str) -> nn.Module:
    if means == "torch":
        with torch.device("meta"):
            return make(name)
    with accelerate.init_empty_weights(include_buffers=means == "accelerate, buffers too"):
        return make(name)


@pytest.mark.parametrize(("name", "kind", "means"), CASES)
def test_a_result_loads_into_a_model_on_the_meta_device(name, kind, means, tmp_path):
    source = seeded(lambda: make(name))
    path = quantized(source, tmp_path, kind)
    into = on_meta(name, means)
    if MODELS[name][2] and kind == "disk" and means == "accelerate":
        # Accelerate breaks ties, and a checkpoint on disk stores only one of the tied names.
        with pytest.raises(MismatchError, match=r"call the model's tie_weights\(\) first, which ties it to "):
            fewbits.load(path, into=into)
        into.tie_weights()
    loaded = fewbits.load(path, into=into)
    expected = fewbits.load(path, into=seeded(lambda: make(name), 1))
    assert not any(tensor.is_meta for tensor in tensors_in(loaded))
    assert same_state(loaded, expected)
    buffers = dict(source.named_buffers())
    assert all(same_bits(buffer, buffers[key]) for key, buffer in loaded.named_buffers() if key in buffers)
    assert same_bits(outputs(loaded), outputs(expected))
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    if MODELS[name][2]:
        assert head.weight_stored is embeddings.weight_stored


def test_a_model_that_ran_before_quantizing_loads_with_its_original_rotary_embeddings(tmp_path):
    """Dynamic rotary embeddings replace their buffers when they see a longer input."""

    def model() -> nn.Module:
        config = copy.deepcopy({**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()

    source = seeded(model)
    quantizer = fewbits.Int8PerChannel(activations="static", selector=fewbits.LayerSelector(min_elements=0))
    prepared = quantizer.prepare(source)
    with torch.no_grad():
        prepared(torch.arange(40).view(1, 40))
    result = quantizer.convert()
    quantizer.save(tmp_path / "model.safetensors")
    with torch.device("meta"):
        into = model()
    loaded = fewbits.load(tmp_path / "model.safetensors", into=into)
    assert same_bits(loaded.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    assert same_bits(outputs(loaded), outputs(result))


def test_without_init_weights_the_message_names_the_rotary_buffers(tmp_path, monkeypatch):
    path = quantized(seeded(lambda: make("Llama")), tmp_path, "state dict")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_init_weights", lambda self, module: None)
    monkeypatch.setattr(transformers.LlamaModel, "_init_weights", lambda self, module: None)
    with pytest.raises(MismatchError, match=r"model\.rotary_emb\.inv_freq is a buffer .* init_buffers="):
        fewbits.load(path, into=on_meta("Llama", "torch"))

    def init_buffers(module):
        module.inv_freq, _ = module.compute_default_rope_parameters(module.config)
        module.original_inv_freq = module.inv_freq.clone()

    loaded = fewbits.load(path, into=on_meta("Llama", "torch"), init_buffers=init_buffers)
    assert same_bits(loaded.model.rotary_emb.inv_freq, make("Llama").model.rotary_emb.inv_freq)
