"""`from_pretrained` quantizes while it loads, and loads results of fewbits, with the layers of fewbits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.errors import ArgumentError, DigestError
from stress import from_pretrained as stress
from support.transformers_sizes import TEXT

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("fewbits.integrations.transformers")
tokens = pytest.importorskip("support.tokens")

FewbitsConfig = integration.FewbitsConfig
IDS = torch.arange(3, 13)[None]
#: Schemes with their settings: one that readers of compressed-tensors take too, and one that only fewbits reads.
SCHEMES = [
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 32, "symmetric": False, "skip_types": ()}),
    ("int4", {"group_size": 32, "embeddings": "int8"}),
    ("nf4", {}),
]


def seeded(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model


def llama(**sizes):
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**TEXT, **sizes}))


def mixtral():
    return seeded(transformers.MixtralForCausalLM, transformers.MixtralConfig(**TEXT, num_local_experts=4))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def saved(model, path, **arguments):
    model.save_pretrained(path, **arguments)
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("scheme", "settings"), SCHEMES)
def test_quantizing_while_loading_gives_the_codes_of_quantizing_in_memory(scheme, settings, tied, tmp_path):
    source = llama(tie_word_embeddings=tied)
    folder = saved(source, tmp_path / "float", max_shard_size="100KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FewbitsConfig(scheme, **settings)
    )
    expected = fewbits.quantize(source, scheme, validate=False, **settings).model
    assert type(loaded.model.layers[1].mlp.down_proj) is fewbits.nn.modules.QuantizedLinear
    assert torch.equal(logits(loaded), logits(expected))
    state, known = loaded.state_dict(), expected.state_dict()
    assert state.keys() == known.keys()
    assert all(torch.equal(state[name], known[name]) for name in known)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("scheme", "settings"), SCHEMES)
def test_a_saved_model_loads_again_by_both_doors_and_verifies(scheme, settings, tied, tmp_path):
    folder = saved(llama(tie_word_embeddings=tied), tmp_path / "float")
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=FewbitsConfig(scheme, **settings)
    )
    loaded.save_pretrained(tmp_path / "result", max_shard_size="60KB")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "result")
    filled = fewbits.load(tmp_path / "result", into=llama(tie_word_embeddings=tied))
    assert torch.equal(logits(again), logits(loaded))
    assert torch.equal(logits(filled), logits(loaded))
    assert fewbits.verify(tmp_path / "result", folder).ok
    if tied and settings.get("skip_types") == ():
        assert again.lm_head.weight_stored is again.model.embed_tokens.weight_stored


@pytest.mark.parametrize(("scheme", "settings"), SCHEMES)
def test_from_pretrained_loads_the_result_of_the_command_line(scheme, settings, tmp_path):
    folder = saved(mixtral(), tmp_path / "float")
    output = fewbits.Output(tmp_path / "result", max_shard_size="60KB")
    fewbits.quantize(folder, scheme, output=output, validate=False, **settings)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "result", device_map="cpu", output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = fewbits.load(tmp_path / "result", into=mixtral())
    expected.set_experts_implementation("fewbits")
    assert torch.equal(logits(model), logits(expected))


def test_the_dtype_of_from_pretrained_is_the_dtype_that_weights_read_as(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    fewbits.quantize(folder, "int8", output=tmp_path / "result", validate=False)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "result", dtype=torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_loaded_result_generates_the_tokens_of_fewbits_load(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    fewbits.quantize(folder, "int8", output=tmp_path / "result", validate=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    known = fewbits.load(tmp_path / "result", into=llama())
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **arguments), known.generate(IDS, **arguments))


@pytest.mark.parametrize(
    ("task", "arguments"),
    [("text-generation", {"max_new_tokens": 8, "do_sample": False}), ("feature-extraction", {})],
)
def test_a_pipeline_runs_on_a_result_as_on_the_model_in_memory(task, arguments, tmp_path):
    folder = saved(llama(), tmp_path / "float")
    tokens.write_tokenizer(folder, eos_token="</s>", pad_token="</s>")
    fewbits.quantize(folder, "int8", output=tmp_path / "result", validate=False)
    causal = fewbits.load(tmp_path / "result", into=llama())
    known = causal.model if task == "feature-extraction" else causal
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "result")
    loaded = transformers.pipeline(task, model=str(tmp_path / "result"), device="cpu")
    expected = transformers.pipeline(task, model=known, tokenizer=tokenizer, device="cpu")
    text = " ".join(tokens.WORDS[:10])
    assert loaded(text, **arguments) == expected(text, **arguments)
    assert any(isinstance(module, fewbits.nn.modules.QuantizedLinear) for module in loaded.model.modules())


def test_a_loaded_model_dequantizes_in_place_and_saves_as_a_float_model(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("int8"))
    expected = fewbits.dequantize(model).state_dict()
    floats = model.dequantize()
    assert floats is model
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"": "disk"}])
def test_offloading_to_disk_is_refused_with_the_alternative(device_map, tmp_path):
    folder = saved(llama(), tmp_path / "float")
    with pytest.raises(ArgumentError, match=r"loaded onto one device.*dispatch_model"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, offload_folder=tmp_path, quantization_config=FewbitsConfig("int8")
        )


def test_a_damaged_byte_is_an_error(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    fewbits.quantize(folder, "nf4", output=tmp_path / "result", validate=False)
    file = tmp_path / "result" / "fewbits.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DigestError, match="not the bytes that were written"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a scheme"),
        ({"scheme": "int4", "rounding": "gptq"}, "needs data"),
        ({"scheme": "int8", "activations": "static"}, "need data"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(config, message, tmp_path):
    folder = saved(llama(), tmp_path / "float")
    with pytest.raises(ArgumentError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig(**config))


def test_saving_beside_other_weights_is_refused(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("nf4"))
    with pytest.raises(ArgumentError, match=r"has other weights.*model\.safetensors"):
        model.save_pretrained(folder)


def test_saving_into_the_same_directory_replaces_the_earlier_result(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("nf4"))
    model.save_pretrained(tmp_path / "result", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "result")
    assert [file.name for file in (tmp_path / "result").glob("*.safetensors*")] == ["fewbits.safetensors"]
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result")), logits(model))


WITHOUT_FEWBITS = """
import sys, transformers
for path in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(path)
    except OSError as error:
        print("refused:", error)
"""


def test_without_fewbits_a_result_that_only_fewbits_reads_is_not_loaded(tmp_path):
    folder = saved(llama(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("nf4"))
    results = [tmp_path / "saved", tmp_path / "converted"]
    model.save_pretrained(results[0])
    fewbits.quantize(folder, "nf4", output=results[1], validate=False)
    command = [sys.executable, "-c", WITHOUT_FEWBITS, *map(str, results)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.count("refused: ") == 2, ran.stderr


def test_experts_decode_only_those_that_a_token_is_routed_to(tmp_path, monkeypatch):
    folder = saved(mixtral(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("int8"))
    kernels = {row.name: row.kernel for row in fewbits.explain(model, {"input_ids": IDS}).rows if row.of_part}
    assert len(kernels) == 4
    assert "reference" not in kernels.values()
    fewbits.set_compute(model, "exact")
    rows = []
    original = fewbits.nn.packed.PackedWeight.matrix_rows

    def counting(self, where, dtype):
        rows.append((self.layout.rows, where))
        return original(self, where, dtype)

    monkeypatch.setattr(fewbits.nn.packed.PackedWeight, "matrix_rows", counting)
    with torch.no_grad():
        model(IDS[:, :1])
    decoded = [where.stop - where.start for total, where in rows if isinstance(where, slice)]
    # Two layers, two of four experts each, two weights each.
    assert len(decoded) == 8
    assert sum(decoded) == 2 * 2 * (2 * TEXT["intermediate_size"] + TEXT["hidden_size"])


def test_experts_give_the_outputs_of_the_dequantized_model(tmp_path):
    folder = saved(mixtral(), tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig("int8"))
    fewbits.set_compute(model, "exact")
    floats = fewbits.dequantize(model)
    floats.set_experts_implementation("eager")
    assert torch.allclose(logits(model), logits(floats), atol=1e-5)


def test_sentence_transformers_loads_a_result(tmp_path, minilm_path, sentences):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(minilm_path).parent
    fewbits.quantize(folder, "nf4", output=tmp_path / "result", validate=False)
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "result"), device="cpu")
    floats = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    found, expected = (each.encode(list(sentences[:4]), convert_to_tensor=True) for each in (model, floats))
    assert float(torch.nn.functional.cosine_similarity(found, expected).min()) > 0.9
    assert any(isinstance(module, fewbits.nn.modules.QuantizedLinear) for module in model.modules())


def test_a_result_of_compressed_tensors_by_another_tool_keeps_its_own_reader(tmp_path):
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    pytest.importorskip("compressed_tensors")
    config = transformers.quantizers.auto.AutoQuantizationConfig.from_dict(settings)
    assert type(config) is transformers.CompressedTensorsConfig
    config = transformers.quantizers.auto.AutoQuantizationConfig.from_dict({**settings, "written_by": "fewbits"})
    assert type(config) is FewbitsConfig


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_quantizing_while_loading_needs_the_result_one_shard_and_little_more(tmp_path):
    figures, allowed = stress.measure(tmp_path, 800 * stress.MB, "int8")
    assert figures["rise"] <= allowed
