"""Directories of compressed-tensors that `fewbits.convert` writes, opened by transformers and the original package."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewbits
from fewbits.errors import ArgumentError
from fewbits.formats.compressed_checkpoint import CompressedCheckpoint
from fewbits.formats.compressed_format import CompressedTensorsFormat
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.formats.registry import open_quantized
from fewbits.numerics.dtypes import SCALE_DTYPES
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.progress import no_progress
from support.transformers_sizes import TEXT

INT4 = {"scheme": "int4", "group_size": 32, "min_elements": 0}
INT8 = {"scheme": "int8", "exclude": ["*embed*"], "min_elements": 0}


def converted(source: Path, **options) -> Path:
    out = source.with_name(f"{source.name}-exported")
    fewbits.convert(source, out, CompressedTensorsFormat(**options))
    return out


def values(path: Path) -> dict[str, Tensor]:
    return fewbits.load(path, dequantize=True)


def config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


# Through transformers.


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A directory of each tiny float model, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors", reason="transformers reads the results with it")
    experts = {**TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    configs = {
        "Llama": transformers.LlamaConfig(**TEXT),
        "Qwen3": transformers.Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=True),
        "Mixtral": transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
        "Qwen3Moe": transformers.Qwen3MoeConfig(**experts),
    }
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("float") / name
            transformers.AutoModelForCausalLM.from_config(configs[name]).save_pretrained(made[name])
        return made[name]

    return folder


def opened(path: Path):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model


@torch.no_grad()
def logits(model) -> Tensor:
    return model(torch.arange(12).reshape(2, 6)).logits


def check_opens_with_equal_weights(source: Path, exported: Path, folder: Path, equal_logits: bool = True) -> None:
    """Compare with a float model that transformers loads with our dequantized weights."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    safetensors.torch.save_file(values(exported.with_name("small")), folder / "model.safetensors", {"format": "pt"})
    reference, model = opened(folder), opened(exported)
    expected, found = logits(reference), logits(model)  # a forward decompresses all weights
    state = model.state_dict()
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert not equal_logits or torch.equal(expected, found)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral", "Qwen3Moe"])
def test_transformers_opens_an_int4_export_with_equal_weights_and_logits(floats, tmp_path, name):
    routers = ["*.gate"] if "M" in name else []
    fewbits.quantize(floats(name), output=tmp_path / "small", on_failure="ignore", exclude=routers, **INT4)
    check_opens_with_equal_weights(floats(name), converted(tmp_path / "small"), tmp_path / "dense")


SCHEMES = {
    "int8": INT8,
    "int8-tensor": {**INT8, "scheme": "int8-tensor"},
    "float16 scales": {**INT4, "scale_dtype": torch.float16},
    "fp8": {**INT8, "scheme": "fp8"},
    "int4, int8, fp8 and floats": {
        **INT4,
        "overrides": {"*.self_attn": "int8", "*.0.mlp.down_proj": "fp8", "*.1.mlp.down_proj": "keep"},
    },
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_transformers_opens_an_export_of_any_scheme_with_equal_weights_and_logits(floats, tmp_path, scheme):
    fewbits.quantize(floats("Llama"), output=tmp_path / "small", on_failure="ignore", **scheme)
    check_opens_with_equal_weights(floats("Llama"), converted(tmp_path / "small"), tmp_path / "dense")


def test_transformers_rounds_the_inputs_of_an_export_with_dynamic_int8_inputs(floats, tmp_path):
    result = fewbits.quantize(floats("Llama"), output=tmp_path / "small", **INT8, activations="dynamic")
    assert result.quantizer.opens_in.startswith("opens with fewbits.load")
    exported = converted(tmp_path / "small")
    check_opens_with_equal_weights(floats("Llama"), exported, tmp_path / "dense", equal_logits=False)
    found, model = logits(opened(exported)), opened(floats("Llama"))
    fewbits.load(tmp_path / "small", into=model)
    noise = (logits(model) - found).norm() / found.norm()
    assert noise < 0.02
    assert not torch.equal(found, logits(opened(tmp_path / "dense")))


def test_bfloat16_shards_open_with_equal_weights(floats, tmp_path):
    source = tmp_path / "source"
    opened(floats("Llama")).to(torch.bfloat16).save_pretrained(source)
    fewbits.quantize(source, output=tmp_path / "small", on_failure="ignore", **INT4)
    exported = converted(tmp_path / "small", max_shard_size="20kB")
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in exported.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    check_opens_with_equal_weights(source, exported, tmp_path / "dense")


def test_the_original_decompressor_gives_equal_weights(floats, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    mixed = SCHEMES["int4, int8, fp8 and floats"]
    fewbits.quantize(floats("Llama"), output=tmp_path / "small", on_failure="ignore", **mixed)
    exported = converted(tmp_path / "small")
    tensors = safetensors.torch.load_file(exported / "model.safetensors")
    groups = QuantizationConfig.model_validate(config(exported)).config_groups.values()
    seen = set()
    for name, expected in values(tmp_path / "small").items():
        module, _, last = name.rpartition(".")
        parts = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
        if last == "bias" or set(parts) == {"weight"}:
            assert same_bits(tensors[name], expected)
            continue
        scheme = next(group for group in groups if _takes(group, parts))
        seen.add(str(scheme.format))
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)
        assert same_bits(found["weight"], expected), name
    assert len(seen) == 2


def _takes(group, parts: dict[str, Tensor]) -> bool:
    """Whether a group of the configuration describes a weight with these tensors."""
    if "weight" in parts:
        return group.weights.type == "float"
    columns = int(parts["weight_shape"][1])
    return group.weights.type == "int" and parts["weight_packed"].shape[1] * 32 == columns * group.weights.num_bits


# Without transformers: the files, and the rules.


def model(**changes: tuple[int, ...]) -> dict[str, Tensor]:
    """A state dict with the names of a language model."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (112, 64), "model.norm.weight": (64,), "lm_head.weight": (112, 64),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (96, 64) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in (shapes | changes).items()}


def experts(layer: int = 0) -> dict[str, tuple[int, ...]]:
    """The experts of a layer and their routers."""
    home = f"model.layers.{layer}.mlp"
    return {
        **{f"{home}.experts.{e}.{part}_proj.weight": (32, 64) for e in range(4) for part in ("gate", "up", "down")},
        f"{home}.gate.weight": (4, 64),
        f"{home}.shared_expert_gate.weight": (1, 64),
    }


def small(folder: Path, source: dict[str, Tensor], vocabulary: int = 112, **settings) -> Path:
    """The quantized directory of a model that transformers could open."""
    (folder / "float").mkdir(exist_ok=True)
    safetensors.torch.save_file(source, folder / "float" / "model.safetensors")
    (folder / "float" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocabulary}))
    output = fewbits.Output(folder / "small", replace=True)
    fewbits.quantize(folder / "float", output=output, on_failure="ignore", **settings)
    return folder / "small"


def obstacles_of(path: Path) -> dict[str, str]:
    return CompressedTensorsFormat().obstacles(open_quantized(path))


def refused(folder: Path, source: dict[str, Tensor], **settings) -> dict[str, str]:
    """What stands in the way of an export. The export is refused with these reasons and leaves nothing behind."""
    path = small(folder, source, **{**INT4, **settings})
    found = obstacles_of(path)
    with pytest.raises(ArgumentError) as caught:
        fewbits.convert(path, folder / "exported", "compressed-tensors")
    assert all(f"{name} {reason}" in str(caught.value) for name, reason in [*found.items()][:3])
    assert sorted(entry.name for entry in folder.iterdir()) == ["float", "small"]
    return found


def test_the_files_have_no_metadata_of_fewbits(tmp_path):
    exported = converted(small(tmp_path, model(), **INT4))
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        home = "model.layers.0.mlp.down_proj.weight"
        assert sorted(key for key in file.keys() if key.startswith(home)) == [  # noqa: SIM118
            f"{home}_packed", f"{home}_scale", f"{home}_shape",
        ]  # fmt: skip


@settings(max_examples=12)
@given(
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from([None, *SCALE_DTYPES[1:]]),
)
def test_whatever_is_allowed_reads_back_with_equal_values(
    tmp_path_factory, bits, granularity, symmetric, dtype, scale_dtype
):
    folder = tmp_path_factory.mktemp("any")
    group_size = 32 if granularity == "group" else None
    spec = fewbits.QuantSpec(bits, granularity, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits)).to(dtype)
    (folder / "small").mkdir()
    scheme = fewbits.Int8PerChannel()
    scheme.spec = spec
    fewbits.quantize({"a.weight": weight}, scheme, validate=False).save(folder / "small" / "model.safetensors")
    exported = converted(folder / "small", allow=True)
    found, expected = CompressedCheckpoint(exported).value("a.weight"), values(folder / "small")["a.weight"]
    found = found.dequantize(dtype) if isinstance(found, QuantizedTensor) else found
    assert same_bits(found, expected)


def test_gptq_results_keep_their_codes(tmp_path):
    from torch import nn

    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    result = fewbits.quantize(net, **INT4, rounding="gptq", data=[torch.randn(64, 64)], on_failure="ignore")
    (tmp_path / "small").mkdir()
    result.save(tmp_path / "small" / "model.safetensors")
    (tmp_path / "small" / "config.json").write_text('{"model_type": "any"}')
    found = CompressedCheckpoint(converted(tmp_path / "small"))
    for name, value in fewbits.load(tmp_path / "small").items():
        other = found.value(name)
        if isinstance(value, QuantizedTensor):
            assert torch.equal(other.packed, value.packed)
            assert same_bits(other.scale, value.scale)


@pytest.mark.parametrize("settings", [INT4, {**INT8, "activations": "dynamic"}, {**INT8, "scheme": "fp8"}], ids=str)
def test_an_export_comes_back_to_fewbits_with_the_same_codes(tmp_path, settings):
    exported = CompressedCheckpoint(converted(small(tmp_path, model(), **settings)))
    (tmp_path / "back").mkdir()
    FewbitsFormat().write(exported, tmp_path / "back", no_progress)
    found = fewbits.load(tmp_path / "back")
    for name, value in fewbits.load(tmp_path / "small").items():
        if isinstance(value, QuantizedTensor):
            assert torch.equal(found[name].packed, value.packed)
            assert same_bits(found[name].scale, value.scale)
        else:
            assert same_bits(found[name], value)


REFUSED = {
    "has zero points": {"symmetric": False},
    "has 3-bit codes": {"scheme": "int3"},
    "has a table of levels": {"scheme": "nf4"},
    "has two levels of scales": {"scale_bits": 6},
    "multiple of the group size 128": {"group_size": 128, "ragged": "shorter"},
    "has groups of 16; vLLM and SGLang have kernels for 32, 64, 128": {"group_size": 16},
    "is a quantized embedding, which only some readers take": {"skip_types": ()},
}


@pytest.mark.parametrize(("reason", "settings"), REFUSED.items(), ids=REFUSED)
def test_weights_that_readers_cannot_take_are_refused_with_the_reason(tmp_path, reason, settings):
    found = refused(tmp_path, model(), **settings)
    assert any(reason in obstacle for obstacle in found.values())


def test_scales_that_readers_would_round_are_refused(tmp_path):
    source = {name: tensor.to(torch.bfloat16) for name, tensor in model().items()}
    found = refused(tmp_path, source, scale_dtype=torch.float32)
    assert found["lm_head.weight"] == "has scales in float32, which readers round to the bfloat16 of the weight"
    assert "readers round to the bfloat16" in fewbits.plan(tmp_path / "float", **INT4, scale_dtype="float32").opens_in


def test_static_inputs_are_refused(tmp_path):
    from torch import nn

    net = nn.Sequential(nn.Linear(64, 64))
    result = fewbits.quantize(net, "int8", activations="static", data=[torch.randn(8, 64)])
    (tmp_path / "small").mkdir()
    result.save(tmp_path / "small" / "model.safetensors")
    (tmp_path / "small" / "config.json").write_text('{"model_type": "any"}')
    with pytest.raises(ArgumentError, match="has a fixed scale for its int8 inputs"):
        fewbits.convert(tmp_path / "small", tmp_path / "out", "compressed-tensors")


def test_a_convolution_is_refused_or_stored_as_floats(tmp_path):
    source = model() | {"conv.weight": torch.randn(64, 32, 3, 3)}
    found = refused(tmp_path, source)
    assert found == {
        "conv.weight": "of shape (64, 32, 3, 3) is not the weight of a Linear layer or an embedding; exclude it (with "
        "--allow it is stored as floats)"
    }
    exported = converted(tmp_path / "small", allow=True)
    assert same_bits(CompressedCheckpoint(exported).value("conv.weight"), values(tmp_path / "small")["conv.weight"])


JOINED = {
    "q_proj, k_proj, v_proj": "*.self_attn.v_proj",
    "gate_proj, up_proj": "*.mlp.gate_proj",
}


@pytest.mark.parametrize("other", ["int8", "keep"])
@pytest.mark.parametrize(("layers", "pattern"), JOINED.items(), ids=JOINED)
def test_layers_that_servers_join_must_share_one_scheme(tmp_path, layers, pattern, other):
    found = refused(tmp_path, model(), overrides={pattern: other})
    assert len(found) == 1
    assert all(f"{layers} need one scheme" in reason for reason in found.values())
    whole = pattern.rpartition(".")[0]
    assert not obstacles_of(small(tmp_path, model(), **INT4, overrides={whole: other}))


def test_experts_of_a_layer_must_share_one_scheme(tmp_path):
    routers = ["*.gate", "*.shared_expert_gate"]
    source = model(**experts(0), **experts(1))
    assert not obstacles_of(small(tmp_path, source, **INT4, exclude=routers))
    for other in ("int8", "keep"):
        found = refused(tmp_path, source, exclude=routers, overrides={"*.1.mlp.experts.2.up_proj": other})
        assert any("all experts of a layer need one scheme" in reason for reason in found.values())
    assert fewbits.plan(tmp_path / "float", **INT4, overrides={"*.experts.2.up_proj": "keep"}).opens_in.startswith(
        "opens with fewbits.load"
    )


def test_routers_of_experts_are_refused(tmp_path):
    found = refused(tmp_path, model(**experts()))
    assert [*found] == ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"]
    assert all("is the router of experts" in reason for reason in found.values())


def test_experts_and_routers_beside_another_scheme_open_in_fewbits_only(tmp_path):
    small(tmp_path, model(**experts()), **INT4)
    routers = ["*.mlp.gate", "*.shared_expert_gate"]
    cases = [
        ({"*.self_attn": "int8"}, [], "gate.weight is a quantized router of experts beside weights of another scheme"),
        ({"*.experts": "int8"}, routers, "is of an expert and has int8 channel, but most other weights do not"),
    ]
    for overrides, exclude, reason in cases:
        keep = {"*.self_attn.o_proj": "int8"} if exclude else {}
        planned = fewbits.plan(tmp_path / "float", **INT4, exclude=exclude, overrides=overrides | keep)
        assert reason in planned.opens_in


def test_an_output_layer_is_a_target_by_name(tmp_path):
    assert config(converted(small(tmp_path, model(), **INT4)))["config_groups"]["group_0"]["targets"] == [
        "Linear",
        r"re:(.*\.)?lm_head$",
    ]


def test_a_checkpoint_without_the_configuration_of_a_model_is_refused(tmp_path):
    fewbits.quantize(model(), **INT4, on_failure="ignore").save(tmp_path / "small.safetensors")
    with pytest.raises(ArgumentError, match=r"config\.json of a transformers model is not beside the weights"):
        fewbits.convert(tmp_path / "small.safetensors", tmp_path / "out", "compressed-tensors")
    fewbits.convert(tmp_path / "small.safetensors", tmp_path / "out", CompressedTensorsFormat(allow=True))
    assert config(tmp_path / "out")["quant_method"] == "compressed-tensors"
    assert fewbits.verify(tmp_path / "out", model()).ok
