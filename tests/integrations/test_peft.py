"""Adapters of PEFT on quantized models: they train, are saved and loaded, and are merged or refused, never lost."""

import contextlib
import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits.errors import ArgumentError, CheckpointError, NonFiniteError, ReadOnlyWeightError
from fewbits.nn.base import QuantizedModule
from fewbits.nn.stored import stored_weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# Names of transformers that PEFT and users of older versions call.
pytestmark = pytest.mark.filterwarnings("ignore:.*_checkpointing.* is deprecated and will be removed:FutureWarning")

IDS = torch.arange(14).reshape(2, 7)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
SCHEMES = {name: {"scheme": name} for name in ("int8", "int4", "nf4", "fp16")}
SCHEMES["dynamic"] = {"scheme": "int8", "activations": "dynamic"}
TARGETS = ["embed", "conv", "patch", "mix", "proj"]


@pytest.fixture(autouse=True)
def integration(monkeypatch):
    """The module under test, imported; other tests see PEFT without it."""
    integration = importlib.import_module("fewbits.integrations.peft")
    monkeypatch.setitem(peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, integration.LoraModel)
    return integration


class Net(nn.Module):
    """A layer of each kind that LoRA can be used with."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.patch = nn.Embedding(40, 32), nn.Conv1d(32, 32, 3, padding=1), nn.Conv2d(1, 32, 3)
        self.mix, self.proj, self.head = transformers.pytorch_utils.Conv1D(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2) + self.patch(x[:, None]).mean((2, 3))[:, None]
        return self.head(torch.relu(self.proj(torch.tanh(self.mix(x)))))


def quantized(model: nn.Module | None = None, scheme: str = "int8", **settings) -> fewbits.Result:
    if model is None:
        torch.manual_seed(0)
        model = Net()
    return fewbits.quantize(model, scheme, include=["*"], **settings)


def adapted(model: nn.Module, targets=("proj",), **options):
    """A PEFT model with an adapter that changes its outputs; in evaluation mode."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False, **options)
    with pytest.warns(match="fan_in_fan_out") if "mix" in targets else contextlib.nullcontext():
        return peft.get_peft_model(model, config).eval()


def train(model: nn.Module, steps: int = 10) -> list[float]:
    """Fit the outputs for the ids to fixed numbers; return the losses."""
    torch.manual_seed(2)
    goal, losses = torch.randn(2, 7, 4), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(IDS), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def codes(model: nn.Module) -> list[Tensor]:
    """All stored parts of quantized weights, copied."""
    stored = [s for module in model.modules() for s in stored_weights(module).values()]
    return [part.clone() for s in stored for part in s.parts().values()]


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **options)).eval()


# Training.


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "dynamic"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_trains_on_a_quantized_model_whose_codes_stay(scheme, use_dora, tmp_path):
    targets = ["proj", "head"] if use_dora else ["embed", "conv", "proj", "head"]
    config = peft.LoraConfig(target_modules=targets, r=4, use_dora=use_dora)
    model = peft.get_peft_model(quantized(**SCHEMES[scheme]).model, config)
    before = codes(model)
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0]
    assert all(map(torch.equal, codes(model), before))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(**SCHEMES[scheme]).model, tmp_path)
    assert torch.equal(loaded(IDS), model.eval()(IDS))


def test_adding_an_adapter_dequantizes_a_weight_a_few_times_at_most(monkeypatch):
    model, reads, read = quantized().model, [], QuantizedModule.__getattr__
    monkeypatch.setattr(QuantizedModule, "__getattr__", lambda module, name: reads.append(name) or read(module, name))
    adapted(model)
    assert reads.count("weight") <= 4


def test_several_adapters_are_chosen_mixed_and_turned_off(tmp_path):
    base = quantized().model
    base_output = base.eval()(IDS)
    model = adapted(base)
    first = model(IDS)
    model.add_adapter("other", peft.LoraConfig(target_modules=["proj"], r=2, init_lora_weights=False))
    model.set_adapter("other")
    second = model.eval()(IDS)
    torch.testing.assert_close(model(IDS, adapter_names=["default", "other"]), torch.stack([first[0], second[1]]))
    with model.disable_adapter():
        assert torch.equal(model(IDS), base_output)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized().model, tmp_path / "other", low_cpu_mem_usage=True)
    assert torch.equal(loaded(IDS), second)


def test_a_quantized_module_to_save_is_trained_as_a_float_copy(tmp_path):
    config = peft.LoraConfig(target_modules=["proj"], modules_to_save=["head"], r=4)
    model = peft.get_peft_model(quantized().model, config)
    head = model.base_model.model.head
    before = head.modules_to_save["default"].weight.detach().clone()
    assert torch.equal(before, head.original_module.weight)
    train(model)
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized().model, tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(IDS), model.eval()(IDS))
    merged = loaded.merge_and_unload()
    assert type(merged.head) is nn.Linear
    torch.testing.assert_close(merged(IDS), model(IDS))


def test_an_adapter_of_the_embeddings_of_a_language_model_is_saved_and_loaded(tmp_path):
    model = adapted(quantized(llama()).model, ["embed_tokens", "q_proj"])
    with pytest.warns(match="save_embedding_layers"):  # PEFT adds the codes of the embeddings to the adapter
        model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(llama()).model, tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_quantized_classifier_that_peft_adds_to_the_modules_to_save_is_trained():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0)
    model = quantized(transformers.LlamaForSequenceClassification(config)).model
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=4))
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.base_model.model.score.modules_to_save["default"].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_give_the_gradients_of_an_adapter(dtype, use_reentrant):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(quantized(llama(use_cache=False).to(dtype)).model, config).train()
        if checkpointing:
            options = {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 28
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


def test_a_quantized_model_is_prepared_for_training_as_peft_prepares_any_model():
    model = peft.prepare_model_for_kbit_training(quantized(llama().to(torch.bfloat16)).model)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_with_a_float_adapter_can_be_quantized_without_it():
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["proj"], r=4, init_lora_weights="pissa")  # it changes the float weight
    model = peft.get_peft_model(Net(), config)
    result = fewbits.quantize(model, "int8", exclude=["*lora_*"])
    assert isinstance(result.model.base_model.model.proj.base_layer, QuantizedModule)
    torch.testing.assert_close(result.model(IDS), model(IDS), rtol=0.05, atol=0.05)
    train(result.model)
    adapted = result.model.eval()(IDS)
    torch.testing.assert_close(result.model.merge_and_unload()(IDS), adapted, rtol=1e-4, atol=1e-5)


def test_an_optimizer_trains_the_float_parameters_and_leaves_the_codes():
    model = quantized().model
    before = codes(model)
    trainable = [name for name, _ in model.named_parameters()]
    assert trainable == ["conv.bias", "patch.bias", "mix.bias", "proj.bias", "head.bias"]
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, codes(model), before))


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp16"])
def test_a_merge_gives_the_dequantized_weight_plus_that_of_the_adapter(scheme, dtype):
    torch.manual_seed(0)
    base = quantized(Net().to(dtype), scheme).model
    model = adapted(base, TARGETS)
    layers = {name: layer for name, layer in base.named_modules() if hasattr(layer, "lora_A")}
    terms = {name: (layer.weight.float(), layer.get_delta_weight("default").float()) for name, layer in layers.items()}
    output = model(IDS)
    merged = model.merge_and_unload()
    assert merged is base
    assert sorted(terms) == sorted(TARGETS)
    for name, (weight, delta) in terms.items():
        layer = merged.get_submodule(name)
        assert not isinstance(layer, QuantizedModule)
        rounding = torch.finfo(dtype).eps * (weight.abs() + delta.abs())
        assert ((layer.weight - weight - delta).abs() <= rounding).all()
    assert isinstance(merged.head, QuantizedModule)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged(IDS), output, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_can_quantize_each_layer_again_with_its_own_scheme(scheme, integration):
    base = quantized(**SCHEMES[scheme], compute="exact").model
    specs = {name: getattr(base, name).weight_stored.spec for name in TARGETS}
    model = adapted(base, TARGETS)
    floats = copy.deepcopy(model).merge_and_unload()
    merged = integration.merge_and_unload(model, requantize=True)
    for name, spec in specs.items():
        stored = getattr(merged, name).weight_stored
        assert str(stored.spec).replace(", rounded freely", "") == str(spec)
        assert getattr(stored, "compute", "exact") == "exact"
        weight = getattr(floats, name).weight.detach()
        assert fewbits.measure(weight, stored.value()).sqnr_db > 15
    torch.testing.assert_close(merged(IDS), floats(IDS), rtol=0.5, atol=0.5)


def test_the_bias_of_an_adapter_is_merged():
    model = adapted(quantized().model, lora_bias=True)
    model.base_model.model.proj.lora_B["default"].bias.data.fill_(0.5)
    output = model(IDS)
    torch.testing.assert_close(model.merge_and_unload()(IDS), output, rtol=1e-4, atol=1e-5)


def test_static_input_scales_survive_a_merge_that_quantizes_again():
    result = quantized(activations="static", data=[IDS])
    scale = result.model.proj.weight_stored.value().input_scale.clone()
    merged = adapted(result.model).merge_and_unload(requantize=True)
    assert torch.equal(merged.proj.weight_stored.value().input_scale, scale)


def test_a_model_that_was_merged_and_quantized_again_is_saved_and_verified(tmp_path):
    result = quantized()
    merged = adapted(result.model, ["proj", "conv"]).merge_and_unload(requantize=True)
    result.save(tmp_path / "merged.safetensors")
    loaded = fewbits.load(tmp_path / "merged.safetensors", into=Net())
    assert torch.equal(loaded(IDS), merged(IDS))
    assert fewbits.verify(tmp_path / "merged.safetensors").ok
    rows = result.quantizer.ledger
    assert [row.name for row in rows if row.tuned] == ["conv.weight", "proj.weight"]


def test_a_merged_model_that_is_float_in_part_is_not_saved_as_the_quantized_result(tmp_path):
    result = quantized()
    adapted(result.model).merge_and_unload()
    with pytest.raises(CheckpointError, match="the model has changed since it was quantized"):
        result.save(tmp_path / "merged.safetensors")


def test_a_merged_model_can_be_saved_when_nothing_in_it_is_quantized(tmp_path):
    model = fewbits.quantize(llama(), "int8", include=["*_proj.weight"]).model
    output = adapted(model, ["q_proj"]).merge_and_unload()
    with pytest.raises(CheckpointError, match="holds quantized layers"):
        output.save_pretrained(tmp_path / "in part")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    merged = adapted(output, targets).merge_and_unload()
    merged.save_pretrained(tmp_path / "float")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float").eval()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_only_the_named_adapters_are_merged(integration):
    model = adapted(quantized().model, ["proj"])
    torch.manual_seed(3)
    other = peft.LoraConfig(target_modules=["proj", "conv"], r=2, init_lora_weights=False)
    model.add_adapter("other", other)
    model.set_adapter("other")
    output = model.eval()(IDS)
    merged = integration.merge_and_unload(copy.deepcopy(model), adapter_names=["other"])
    torch.testing.assert_close(merged(IDS), output, rtol=1e-4, atol=1e-4)
    first = integration.merge_and_unload(model, adapter_names=["default"])
    assert isinstance(first.conv, QuantizedModule), "a layer without the adapter stays quantized"
    assert type(first.proj) is nn.Linear


@pytest.mark.parametrize("options", [{"requantize": True}, {"safe_merge": True}], ids=str)
@pytest.mark.parametrize("exclude", [[], ["conv.weight"]], ids=["quantized", "float in part"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(options, exclude):
    result = quantized(exclude=exclude)
    model = adapted(result.model, ["conv", "proj"])
    layer = model.base_model.model.proj
    healthy = layer.lora_B["default"].weight.data.clone()
    output, before = model(IDS), codes(model)
    layer.lora_B["default"].weight.data[0] = torch.nan
    error, message = (NonFiniteError, r"proj\.weight, merged") if "requantize" in options else (ValueError, "NaNs")
    with pytest.raises(error, match=message):
        model.merge_and_unload(**options)
    layer.lora_B["default"].weight.data.copy_(healthy)
    assert all(map(torch.equal, codes(model), before))
    torch.testing.assert_close(model(IDS), output, rtol=1e-5, atol=1e-5)  # a float layer lost and got its adapter again
    torch.testing.assert_close(model.merge_and_unload()(IDS), output, rtol=1e-4, atol=1e-4)
    assert not any(row.tuned for row in result.quantizer.ledger)


def test_merging_in_place_is_refused_before_any_layer_has_changed():
    model = adapted(quantized(exclude=["conv.weight"]).model, ["conv", "proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ReadOnlyWeightError, match=r"proj is quantized \(int8 channel\).*merge_and_unload\(\)"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("targets", "untied"), [(["q_proj"], False), (["lm_head"], True), (["embed_tokens"], True)])
def test_an_adapter_on_one_of_two_tied_layers_is_merged_into_that_one(targets, untied, events):
    model = quantized(llama(tie_word_embeddings=True)).model
    model = adapted(model, targets)
    output = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, output, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings is not untied
    assert [event["event"] for event in events if event["log_level"] == "warning"] == ["untied"] * untied


@pytest.mark.parametrize(
    ("config", "options"),
    [("IA3Config", {"feedforward_modules": []}), ("LoHaConfig", {"init_weights": False}), ("VeraConfig", {"r": 4})],
)
def test_other_kinds_of_adapters_are_merged_too(config, options, integration):
    model = peft.get_peft_model(quantized().model, getattr(peft, config)(target_modules=["proj"], **options))
    train(model)
    output = model.eval()(IDS)
    torch.testing.assert_close(integration.merge_and_unload(model)(IDS), output, rtol=1e-4, atol=1e-4)


def test_a_float_model_is_merged_by_peft_itself():
    torch.manual_seed(0)
    model = adapted(Net())
    output = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), output, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(IDS), output, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match=r"no layer with an adapter is quantized.*fewbits\.quantize"):
        adapted(Net()).merge_and_unload(requantize=True)


def test_a_model_with_adapters_is_copied_and_pickled():
    model = adapted(quantized().model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS), model(IDS))


# Messages.


def test_a_model_without_adapters_cannot_be_merged(integration):
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for model in (nn.Linear(2, 2), quantized().model, peft.get_peft_model(quantized(llama()).model, prompts)):
        with pytest.raises(ArgumentError, match=r"peft\.get_peft_model"):
            integration.merge_and_unload(model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starting_an_adapter_by_changing_a_quantized_weight_is_refused(start):
    with pytest.raises(ReadOnlyWeightError, match="weight is quantized"):
        peft.get_peft_model(quantized().model, peft.LoraConfig(target_modules=["proj"], r=4, init_lora_weights=start))


def test_an_adapter_on_the_quantized_projections_of_attention_is_refused():
    layer = quantized(nn.TransformerEncoderLayer(32, 2, 64)).model
    with pytest.raises(ReadOnlyWeightError, match=r"in_proj_weight is quantized.*cannot be assigned to or deleted"):
        adapted(layer, ["self_attn"])


def test_without_peft_the_message_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "fewbits.integrations.peft")
    with pytest.raises(ArgumentError, match="pip install peft"):
        importlib.import_module("fewbits.integrations.peft")
