"""Models with further references to their weights, and layers that override the usual computation."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewbits

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Holding(nn.Module):
    """Uses its weight through another object that refers to it."""

    def __init__(self, hold):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.layer = nn.Linear(64, 64)
        self.held, self.use = hold(self.weight)

    def forward(self, x):
        return self.layer(self.use(self.held, x))


def _use_list(held, x):
    return x @ held[0]


def _use_view(held, x):
    return x @ held


def _use_partial(held, x):
    return held(x)


def _use_namespace(held, x):
    return x @ held.w


HOLDS = {
    "list": lambda w: ([w], _use_list),
    "a view": lambda w: (w.data.t(), _use_view),
    "partial": lambda w: (functools.partial(F.linear, weight=w), _use_partial),
    "namespace": lambda w: (types.SimpleNamespace(w=w.data), _use_namespace),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_with_another_reference_is_kept_with_that_reason(hold, inplace):
    result = fewbits.quantize(Holding(hold), "int8", inplace=inplace)
    assert result.ledger["weight"].fate == "kept"
    assert "held holds it too" in result.ledger["weight"].reason
    assert result.ledger["layer.weight"].fate == "quantized"


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_quantized_weight_is_not_loaded_into_a_weight_with_another_reference(hold, tmp_path):
    fewbits.quantize(Holding(hold).state_dict(), "int8").save(tmp_path / "f")
    with pytest.raises(fewbits.errors.MismatchError, match="weight is int8 channel in the file, but held holds it too"):
        fewbits.load(tmp_path / "f", into=Holding(hold))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@torch.no_grad()
def test_loading_a_kept_weight_updates_all_of_its_references(hold, tmp_path):
    result = fewbits.quantize(Holding(hold), "int8")
    result.save(tmp_path / "f")
    assert torch.equal(fewbits.load(tmp_path / "f", into=Holding(hold))(X), result.model(X))


class Calling(nn.Module):
    """Has an attribute that is a function with a reference to the module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.multiply = lambda x: x @ self.weight

    def forward(self, x):
        return self.multiply(x)


def test_a_function_that_refers_to_the_source_is_refused_unless_in_place():
    with pytest.raises(fewbits.errors.SourceError, match="multiply is a function that is set on the instance"):
        fewbits.quantize(Calling(), "int8")
    quantized = fewbits.quantize(Calling(), "int8", inplace=True).model
    assert torch.equal(quantized(X), X @ quantized.weight)


class Proxy(nn.Module):
    """Overrides ``__getattr__`` to look up attributes in a submodule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.gain = nn.Parameter(torch.ones(64))
        self.base = nn.Linear(64, 64)

    def __getattr__(self, name):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "base"), name)

    def forward(self, x):
        return self.base(x @ self.weight * self.gain)


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_a_class_whose_getattr_would_read_another_weight_is_refused_and_the_model_stays_usable(inplace):
    model = Proxy()
    expected, attributes, parameters = model(X), set(vars(model)), list(model._parameters)
    with pytest.raises(fewbits.errors.SourceError, match="Proxy computes its attribute weight itself"):
        fewbits.quantize(model, "int8", inplace=inplace)
    assert (type(model), set(vars(model)), list(model._parameters)) == (Proxy, attributes, parameters)
    assert torch.equal(model(X), expected)


class Helped(nn.Module):
    """Collects its matrices in a helper method of `forward`."""

    def __init__(self):
        super().__init__()
        self.matrix, self.layer = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 64)

    def matrices(self):
        return list(self.parameters(recurse=False))

    def forward(self, x):
        for matrix in self.matrices():
            x = x @ matrix
        return self.layer(x)


def test_a_weight_that_a_helper_of_forward_finds_through_parameters_is_kept():
    ledger = fewbits.quantize(Helped(), "int8").ledger
    assert ledger["matrix"].fate == "kept"
    assert "goes through its parameters" in ledger["matrix"].reason


class Standardized(nn.Conv2d):
    """Standardizes its weight before the convolution."""

    def _conv_forward(self, x, weight, bias):
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


def _with_a_forward_of_its_own():
    layer = nn.Linear(64, 64)
    layer.forward = functools.partial(F.linear, weight=torch.eye(64))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Standardized(8, 8, 3), _with_a_forward_of_its_own], ids=["method", "instance"]
)
def test_a_layer_that_overrides_its_computation_keeps_float_inputs(make):
    quantizer = fewbits.Int8PerChannel(activations="dynamic")
    quantizer.prepare(make())
    assert quantizer.ledger["weight"].scheme == "int8 channel"


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 32), lambda: nn.Conv1d(4, 32, 5, padding=2)], ids=["linear", "conv"]
)
def test_gradients_pass_through_quantized_inputs_as_through_float_inputs(make, activations):
    layer = make()
    x = X if isinstance(layer, nn.Linear) else X.reshape(4, 4, 16).repeat(1, 1, 4)
    quantizer = fewbits.Int8PerChannel(activations=activations)
    quantizer.prepare(layer)
    if activations == "static":
        quantizer.observe([x])
    model = quantizer.convert()
    plain = fewbits.dequantize(model)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(found).square().sum().backward()
    plain(expected).square().sum().backward()
    assert F.cosine_similarity(found.grad.flatten(), expected.grad.flatten(), dim=0) > 0.999
    assert model.bias.grad is not None
    with torch.no_grad():
        assert torch.equal(model(x), model(found)), "gradients must not change the output"


def test_calibration_with_zeros_only_is_an_error():
    quantizer = fewbits.Int8PerChannel(activations="static")
    quantizer.prepare(nn.Linear(64, 64))
    quantizer.observe([torch.zeros(8, 64)])
    with pytest.raises(fewbits.errors.CalibrationError, match=r"weight, .* has seen only zeros"):
        quantizer.convert()


class TiedInputs(nn.Module):
    """Two layers share one weight, and so does a third module that is not a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.other = nn.Module()
        self.other.weight = self.first.weight

    def forward(self, x, both=True):
        y = self.first(x)
        return self.second(y) if both else y


def test_every_layer_with_static_inputs_needs_calibration_data():
    quantizer = fewbits.Int8PerChannel(activations="static")
    prepared = quantizer.prepare(TiedInputs())
    prepared(X, both=False)
    with pytest.raises(fewbits.errors.CalibrationError, match=r"no data for second\.weight"):
        quantizer.convert()
    prepared(X)
    quantizer.convert()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_input_scale_that_is_not_positive_and_finite_is_refused(scale):
    spec = fewbits.QuantSpec(bits=8, granularity="channel", activations="static", scale_dtype=torch.float32)
    parts = {
        "packed": torch.zeros(2, 1, dtype=torch.int32),
        "scale": torch.ones(2, 1),
        "shape": torch.tensor([2, 4]),
        "input_scale": torch.tensor([scale]),
    }
    with pytest.raises(fewbits.errors.FormatError, match="the scale of inputs is"):
        fewbits.QuantizedTensor.from_parts(
            parts, spec=spec, layout=fewbits.extend.Layout.of((2, 4)), dtype=torch.float32
        )


def test_a_state_dict_with_another_weight_layout_is_refused():
    def quantized(**options):
        return fewbits.quantize(nn.Linear(64, 64), "int8", **options).model

    with pytest.raises(RuntimeError, match="weight is stored as"):
        quantized().load_state_dict(quantized(input_axes={"weight": 0}).state_dict())


def test_embeddings_of_a_state_dict_have_no_quantized_inputs():
    state = {"embed_tokens.weight": torch.randn(64, 64), "head.weight": torch.randn(64, 64)}
    ledger = fewbits.quantize(state, "int8", activations="dynamic").ledger
    assert ledger["embed_tokens.weight"].scheme == "int8 channel"
    assert ledger["head.weight"].scheme == "int8 channel, dynamic int8 inputs"
