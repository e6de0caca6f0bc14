"""Code outside of a module can compute with its weights; an error reports changes that would be lost."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits.errors import ReadOnlyWeightError

SCHEMES = ("int8", "int4", "fp16")
LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), "weight"),
    "convolution": (lambda: nn.Conv2d(16, 8, 3), "weight"),
    "embedding": (lambda: nn.Embedding(64, 32), "weight"),
    "recurrent": (lambda: nn.LSTM(32, 16), "weight_ih_l0"),
    "attention": (lambda: nn.MultiheadAttention(32, 2), "in_proj_weight"),
    "any": (lambda: nn.Bilinear(8, 8, 16), "weight"),
}


def quantized(model: nn.Module, scheme: str = "int8") -> nn.Module:
    return fewbits.quantize(model, scheme, include=["*"]).model


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_changing_a_quantized_weight_from_outside_is_refused(layer, scheme):
    make, name = LAYERS[layer]
    module = quantized(make(), scheme)
    before = {key: part.clone() for key, part in module.state_dict().items()}
    for change in (
        lambda: delattr(module, name),
        lambda: setattr(getattr(module, name), "data", torch.zeros(1)),
        lambda: getattr(module, name).data.add_(1),
        lambda: nn.init.zeros_(getattr(module, name)),
        lambda: getattr(module, name).detach()[0].fill_(0),
    ):
        with pytest.raises(ReadOnlyWeightError, match=rf"{name} is quantized .*fewbits\.dequantize\(model\)"):
            change()
    assert all(torch.equal(part, before[key]) for key, part in module.state_dict().items())


def test_resetting_the_parameters_of_a_quantized_layer_is_refused():
    for make, _ in (LAYERS["linear"], LAYERS["convolution"], LAYERS["embedding"]):
        with pytest.raises(ReadOnlyWeightError):
            quantized(make()).reset_parameters()


@pytest.mark.parametrize("layer", LAYERS)
def test_copies_of_a_quantized_weight_are_plain_tensors_to_be_changed(layer):
    make, name = LAYERS[layer]
    weight = getattr(quantized(make()), name)
    for own in (weight.clone(), copy.deepcopy(weight), weight.double(), nn.Parameter(weight.clone())):
        own.data.zero_()
        assert type(own) in (Tensor, nn.Parameter)
    assert weight.any()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_module_answers_for_every_key_of_its_state_dict(layer, scheme):
    make, _ = LAYERS[layer]
    module = quantized(make(), scheme)
    for key, tensor in module.state_dict().items():
        path, _, name = key.rpartition(".")
        assert torch.equal(getattr(module.get_submodule(path), name), tensor)
    assert not hasattr(module, "weight_g")


class ReadsAChild(nn.Module):
    """Multiplies with the weight of a layer that it does not call, as tied output layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kept = nn.Embedding(64, 32), []

    def forward(self, ids: Tensor) -> Tensor:
        self.kept.append(type(self.embed.weight))
        return nn.functional.linear(self.embed(ids).to(self.embed.weight.dtype), self.embed.weight)


def test_another_module_computes_with_a_quantized_weight_as_with_a_plain_one():
    model = quantized(ReadsAChild())
    plain, ids = fewbits.dequantize(model), torch.arange(5)
    output = model(ids)
    assert type(output) is Tensor
    assert torch.equal(output, plain(ids))


def test_a_compiler_gets_plain_tensors():
    model = quantized(ReadsAChild())
    ids = torch.arange(5)
    expected = model(ids)
    model.kept.clear()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(ids), expected)
    assert set(model.kept) == {Tensor}


@pytest.mark.parametrize("include", ["*", "*linear1*", "*out_proj*"])
def test_the_transformer_layer_of_torch_keeps_its_fast_path_if_no_kernel_computes(include):
    model, x, mask = encoder(include)
    fewbits.set_compute(model, "exact")
    plain = fewbits.dequantize(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        assert torch.equal(model(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("include", ["*", "*linear1*", "*out_proj*"])
def test_kernels_compute_the_transformer_layer_of_torch(include):
    model, x, mask = encoder(include)
    plain = fewbits.dequantize(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = model(x, src_key_padding_mask=mask)[~mask], plain(x, src_key_padding_mask=mask)[~mask]
    assert not torch.equal(found, expected)
    assert (
        fewbits.numerics.metrics.sqnr_db(float(expected.square().sum()), float((found - expected).square().sum())) > 45
    )


def encoder(include):
    """An encoder with quantized weights, an input, and a mask of its padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = fewbits.quantize(nn.TransformerEncoder(layer, 2), "int8", include=[include]).model.eval()
    return model, torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def test_the_weight_of_one_layer_is_an_input_of_another_like_any_tensor():
    one, other = quantized(nn.Linear(64, 32)), quantized(nn.Linear(64, 32))
    assert torch.equal(other(one.weight), other(one.weight.clone()))


class OwnWrites(nn.Module):
    """Limits its own weight before it uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.matrix.data.clamp_(-0.1, 0.1)
        return x @ self.matrix


def test_the_forward_of_the_module_itself_may_write_to_what_it_reads():
    model = quantized(OwnWrites())
    plain, x = fewbits.dequantize(model), torch.randn(2, 32)
    assert torch.equal(model(x), plain(x))
    assert model.matrix.abs().max() > 0.1


class OwnConv(nn.Conv1d):
    """Has a constructor of its own, and the forward of torch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)
        self.channels = channels


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(lambda: nn.Conv1d(32, 32, 3), (32, 32, 3)), (lambda: OwnConv(32), (32,)), (OwnWrites, ())],
    ids=["torch's", "subclass", "any"],
)
def test_calling_the_class_of_a_quantized_layer_makes_a_float_layer(make, arguments):
    source = make()
    other = type(quantized(source))(*arguments)
    assert type(other) is type(source)
    other.load_state_dict(source.state_dict())
    x = torch.randn(2, 32, 32)
    assert torch.equal(other(x), source(x))


# peft.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(40, 32), nn.Conv1d(32, 32, 3, padding=1)
        self.proj, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(torch.relu(self.proj(x)))


@pytest.fixture
def peft(monkeypatch):
    """PEFT as it is without `fewbits.integrations.peft`, which another test may have imported."""
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, peft.LoraModel)
    return peft


def trained(peft, target: str, **options):
    """A LoRA adapter on a quantized model, after two steps, and inputs."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=[target], r=4, **options)
    model = peft.get_peft_model(quantized(Net()), config)
    ids = torch.randint(0, 40, (2, 7))
    first = model(ids)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(model(ids), first), "the adapter has not learnt"
    return model, ids


@pytest.mark.parametrize("target", ["proj", "embed", "conv"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_is_merged_into_the_dequantized_model_and_never_lost(peft, target, use_dora):
    model, ids = trained(peft, target, use_dora=use_dora)
    adapted = model(ids)
    for merge in (
        lambda: model.merge_adapter(),
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_and_unload(),
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(ReadOnlyWeightError, match=r"weight is quantized .*fewbits\.dequantize\(model\)"):
            merge()
        assert torch.equal(model(ids), adapted), "a merge that was refused has changed the model"
    merged = fewbits.dequantize(model).merge_and_unload()
    assert type(merged) is Net
    torch.testing.assert_close(merged(ids), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("AdaLoraConfig", {"total_step": 10}),
        ("IA3Config", {"feedforward_modules": []}),
        ("LoHaConfig", {}),
        ("OFTConfig", {"oft_block_size": 8}),
        ("VeraConfig", {"r": 4}),
        ("MissConfig", {"r": 8}),
    ],
)
def test_no_kind_of_adapter_is_lost_by_a_merge(peft, config, options):
    model = peft.get_peft_model(quantized(Net()), getattr(peft, config)(target_modules=["proj"], **options)).eval()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ReadOnlyWeightError):
        model.merge_and_unload()
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_unloading_an_adapter_gives_the_quantized_model_back(peft):
    model, ids = trained(peft, "proj")
    base = model.unload()
    assert torch.equal(base(ids), quantized_net(ids))


def quantized_net(ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    return quantized(Net())(ids)
