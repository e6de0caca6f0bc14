"""Transformers and sentence-transformers open directories of results with the right weights, or raise an error."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import fewbits
from fewbits.cli.commands import cli
from support.transformers_sizes import TEXT

accelerate = pytest.importorskip("accelerate", reason="peft and sentence-transformers bring it")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", reason="transformers reads the results with it")
sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.usefixtures("transformers_alone")

EXPERTS = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8}
SEQUENCES = {"vocab_size": 112, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}

MODELS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "Llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "Bert": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "T5": lambda: transformers.T5Model(transformers.T5Config(**SEQUENCES)),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)),
    "Qwen3Moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**EXPERTS)),
    "GPT2": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=112)),
}  # fmt: skip

INT4 = {"scheme": "int4", "group_size": 32, "min_elements": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """A directory of each float model, as `save_pretrained` writes it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("float")
            MODELS[name]().save_pretrained(made[name])
        return made[name]

    return folder


def quantized(source: Path, out: Path, **settings) -> fewbits.Result:
    return fewbits.quantize(source, output=out, on_failure="ignore", **settings)


def dense(source: Path, out: Path, folder: Path) -> Path:
    """Write the dequantized result as the directory of a float model."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = fewbits.dequantize(fewbits.load(out))
    from safetensors.torch import save_file

    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def state(model: nn.Module) -> dict[str, Tensor]:
    """The dense weights of a transformers model. A model that decompresses at its first forward pass is run once."""
    if getattr(model, "hf_quantizer", None) is not None and any(
        "packed" in name for name, _ in model.named_parameters()
    ):
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
    return {name: weight for name, weight in model.state_dict().items() if not name.endswith(("_scale", "_shape"))}


def opened(folder: Path, cls: type) -> nn.Module:
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model


OPEN = {
    "int4": INT4,
    "int8": {"scheme": "int8", "exclude": ["*emb*"], "min_elements": 0},
    "int8 with embeddings": {"scheme": "int8", "min_elements": 0},
    "int8-tensor": {"scheme": "int8-tensor", "exclude": ["*emb*"], "min_elements": 0},
    "int4 and int8": {**INT4, "overrides": {"*.layers.0.mlp.down_proj": "int8", "*.layers.1.mlp.up_proj": "keep"}},
}


@pytest.mark.parametrize("settings", OPEN.values(), ids=OPEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_opens_a_result_with_its_dequantized_weights(folders, tmp_path, settings, dtype):
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_pretrained(folders("Llama"), dtype=dtype).save_pretrained(source)
    result = quantized(source, tmp_path / "out", **settings)
    assert result.quantizer.opens_in == "opens in transformers, with compressed-tensors installed"
    cls = transformers.LlamaForCausalLM
    expected = state(cls.from_pretrained(dense(source, tmp_path / "out", tmp_path / "dense")))
    found = state(opened(tmp_path / "out", cls))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("name", ["Llama, tied", "Bert", "T5", "ViT", "Qwen3Moe"])
def test_transformers_opens_results_of_many_architectures(folders, tmp_path, name):
    source, cls = folders(name), type(MODELS[name]())
    quantized(source, tmp_path / "out", **INT4, exclude=["*patch_embeddings*"] if name == "ViT" else [])
    expected = cls.from_pretrained(dense(source, tmp_path / "out", tmp_path / "dense")).state_dict()
    found = opened(tmp_path / "out", cls).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in found.items())


def test_a_cast_result_opens_like_any_float_model(folders, tmp_path):
    result = quantized(folders("Llama"), tmp_path / "out", scheme="fp16")
    assert result.quantizer.opens_in == "opens in transformers"
    assert (tmp_path / "out" / "config.json").read_bytes() == (folders("Llama") / "config.json").read_bytes()
    opened(tmp_path / "out", transformers.LlamaForCausalLM)


REFUSED = {
    "a quantized embedding beside": (
        "Llama",
        {"scheme": "int8", "overrides": {"*.mlp": {"scheme": "int4", "group_size": 32}}},
    ),
    "zero points": ("Llama", {**INT4, "symmetric": False}),
    "not a multiple of the group size 128": ("Llama", {"scheme": "int4", "group_size": 128, "ragged": "shorter"}),
    "quantizes its inputs": ("Llama", {"scheme": "int8", "activations": "dynamic", "exclude": ["*emb*"]}),
    "rows are inputs, not outputs": ("GPT2", INT4),
}


@pytest.mark.parametrize(("name", "settings"), REFUSED.values(), ids=REFUSED)
def test_a_result_that_transformers_cannot_read_has_no_file_that_transformers_looks_for(
    folders, tmp_path, name, settings, request
):
    source, out = folders(name), tmp_path / "out"
    reason = request.node.callspec.id
    planned = fewbits.plan(source, output=out, **settings)
    result = quantized(source, out, **settings)
    assert reason in result.quantizer.opens_in
    assert planned.opens_in == result.quantizer.opens_in
    assert [shard.file for shard in planned.shards] == [file.name for file in out.glob("*.safetensors")]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "fewbits"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModel.from_pretrained(out)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        sentence_transformers.SentenceTransformer(str(out))
    assert fewbits.verify(out, against=source).ok
    fewbits.load(out, into=MODELS[name]())


def test_shards_that_only_fewbits_reads_have_names_that_transformers_does_not_look_for(folders, tmp_path):
    out = tmp_path / "out"
    quantized(folders("Llama"), fewbits.Output(out, max_shard_size="40kB"), **INT4, symmetric=False)
    names = sorted(file.name for file in out.iterdir() if "safetensors" in file.name)
    assert names[0].startswith("fewbits-00001-of-")
    assert names[-1] == "fewbits.safetensors.index.map.json"
    with pytest.raises(OSError, match="no file named model"):
        transformers.AutoModel.from_pretrained(out)
    with pytest.raises(ValueError, match="is not a folder containing"):
        accelerate.load_checkpoint_in_model(MODELS["Llama"](), out)
    fewbits.load(out, into=MODELS["Llama"]())


def test_a_directory_that_is_not_a_transformers_model_keeps_its_configuration(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"embed.weight": torch.randn(64, 64)}, source / "model.safetensors")
    (source / "config.json").write_text('{"vocab_size": "none of transformers"}')
    result = quantized(source, tmp_path / "out", scheme="int8")
    assert result.quantizer.opens_in is None
    assert (tmp_path / "out" / "config.json").read_text() == (source / "config.json").read_text()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_command_line_states_which_libraries_can_open_a_result(folders, tmp_path):
    arguments = ["quantize", str(folders("Llama")), "--scheme", "int8", "-q"]
    options = ["--override", "*.mlp=int4:32", "--dry-run"]
    said = CliRunner().invoke(cli, [*arguments, *options], standalone_mode=False).output
    assert (
        "it opens with fewbits.load(..., into=model) only, or from_pretrained after import "
        "fewbits.integrations.transformers: model.embed_tokens.weight is a quantized embedding"
        in " ".join(said.split())
    )
    options = ["-o", str(tmp_path / "out"), "--json"]
    printed = json.loads(CliRunner().invoke(cli, [*arguments, *options], standalone_mode=False).stdout)
    assert printed["opens_in"] == "opens in transformers, with compressed-tensors installed"


def test_a_quantized_sentence_encoder_opens_in_sentence_transformers(minilm_path, sentences, tmp_path):
    out, some = tmp_path / "out", list(sentences[:8])
    quantized(minilm_path.parent, out, scheme="int8")
    floats = sentence_transformers.SentenceTransformer(str(minilm_path.parent))
    found = sentence_transformers.SentenceTransformer(str(out)).encode(some, convert_to_tensor=True)
    assert torch.cosine_similarity(found, floats.encode(some, convert_to_tensor=True)).min() > 0.998
    loaded = fewbits.load(out, into=floats[0].model) and floats.encode(some, convert_to_tensor=True)
    assert torch.cosine_similarity(found, loaded).min() > 0.9999


# Models in memory.


def refusing(model: nn.Module, folder: Path) -> None:
    with pytest.raises(fewbits.errors.CheckpointError, match=r"fewbits\.dequantize\(model\)\.save_pretrained"):
        model.save_pretrained(folder / "refused")
    assert not (folder / "refused").exists()


def test_save_pretrained_is_refused_for_a_quantized_model_but_not_for_its_source(tmp_path):
    source = MODELS["Bert"]()
    result = fewbits.quantize(source, "int8")
    for model in (result.model, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))):
        refusing(model, tmp_path)
    result.save(tmp_path / "bert.safetensors")
    refusing(fewbits.load(tmp_path / "bert.safetensors", into=MODELS["Bert"]()), tmp_path)
    source.save_pretrained(tmp_path / "float")
    refusing(fewbits.quantize(source, "int8", inplace=True).model, tmp_path)


def test_save_pretrained_is_refused_for_a_model_left_partly_quantized_by_an_interruption(tmp_path):
    def interrupt(step: fewbits.extend.Step) -> None:
        if step.activity == "convert" and step.done > step.total / 2:
            raise KeyboardInterrupt

    model = MODELS["Bert"]()
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(model, "int8", inplace=True, progress=interrupt)
    refusing(model, tmp_path)


def test_transformers_loads_a_dequantized_and_saved_model(tmp_path):
    result = fewbits.quantize(MODELS["Bert"](), "int8")
    plain = fewbits.dequantize(result.model)
    plain.save_pretrained(tmp_path / "plain")
    loaded = opened(tmp_path / "plain", transformers.BertModel).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in plain.state_dict().items())
    refusing(result.model, tmp_path)


def test_a_sentence_encoder_refuses_to_save_its_quantized_model(minilm_path, tmp_path):
    encoder = sentence_transformers.SentenceTransformer(str(minilm_path.parent))
    quantized = fewbits.quantize(encoder, "int8").model
    for save in (quantized.save, quantized.save_pretrained, quantized[0].model.save_pretrained):
        with pytest.raises(fewbits.errors.CheckpointError, match="random numbers"):
            save(str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    encoder.save(str(tmp_path / "float"))
