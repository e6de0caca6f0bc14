"""Models that hold on to their weights in odd places, and layers that do something else than they seem to."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewbits

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Holding(nn.Module):
    """A matrix that is used through something else that holds it."""

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
def test_a_weight_that_is_held_elsewhere_is_kept_with_a_reason(hold, inplace):
    result = fewbits.quantize(Holding(hold), "int8", inplace=inplace)
    assert result.ledger["weight"].fate == "kept"
    assert "held holds it too" in result.ledger["weight"].reason
    assert result.ledger["layer.weight"].fate == "quantized"


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_file_does_not_fill_a_weight_that_is_held_elsewhere(hold, tmp_path):
    fewbits.quantize(Holding(hold).state_dict(), "int8").save(tmp_path / "f")
    with pytest.raises(fewbits.errors.MismatchError, match="weight is int8 channel in the file, but held holds it too"):
        fewbits.load(tmp_path / "f", into=Holding(hold))


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
@torch.no_grad()
def test_what_is_kept_is_filled_wherever_it_is_held(hold, tmp_path):
    result = fewbits.quantize(Holding(hold), "int8")
    result.save(tmp_path / "f")
    assert torch.equal(fewbits.load(tmp_path / "f", into=Holding(hold))(X), result.model(X))


class Calling(nn.Module):
    """Keeps a function that knows the module itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.multiply = lambda x: x @ self.weight

    def forward(self, x):
        return self.multiply(x)


def test_a_function_that_knows_the_source_is_refused_unless_in_place():
    with pytest.raises(fewbits.errors.SourceError, match="multiply is a function that is set on the instance"):
        fewbits.quantize(Calling(), "int8")
    quantized = fewbits.quantize(Calling(), "int8", inplace=True).model
    assert torch.equal(quantized(X), X @ quantized.weight)


class Proxy(nn.Module):
    """Looks for its attributes in a way of its own."""

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
def test_a_class_that_would_read_another_weight_is_an_error_and_leaves_the_model_usable(inplace):
    model = Proxy()
    expected, attributes, parameters = model(X), set(vars(model)), list(model._parameters)
    with pytest.raises(fewbits.errors.SourceError, match="Proxy computes its attribute weight itself"):
        fewbits.quantize(model, "int8", inplace=inplace)
    assert (type(model), set(vars(model)), list(model._parameters)) == (Proxy, attributes, parameters)
    assert torch.equal(model(X), expected)


class Helped(nn.Module):
    """Its forward asks a method for all matrices."""

    def __init__(self):
        super().__init__()
        self.matrix, self.layer = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 64)

    def matrices(self):
        return list(self.parameters(recurse=False))

    def forward(self, x):
        for matrix in self.matrices():
            x = x @ matrix
        return self.layer(x)


def test_a_method_that_goes_through_parameters_for_the_forward_is_seen():
    ledger = fewbits.quantize(Helped(), "int8").ledger
    assert ledger["matrix"].fate == "kept"
    assert "goes through its parameters" in ledger["matrix"].reason


class Standardized(nn.Conv2d):
    """Changes its weight before it convolves."""

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
def test_a_layer_that_computes_in_its_own_way_keeps_float_inputs(make):
    quantizer = fewbits.Int8PerChannel(activations="dynamic")
    quantizer.prepare(make())
    assert quantizer.ledger["weight"].scheme == "int8 channel"


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 32), lambda: nn.Conv1d(4, 32, 5, padding=2)], ids=["linear", "conv"]
)
def test_gradients_go_through_rounded_inputs_as_through_float_ones(make, activations):
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


def test_a_layer_that_saw_nothing_but_zeros_is_an_error():
    quantizer = fewbits.Int8PerChannel(activations="static")
    quantizer.prepare(nn.Linear(64, 64))
    quantizer.observe([torch.zeros(8, 64)])
    with pytest.raises(fewbits.errors.CalibrationError, match=r"weight, .* has seen only zeros"):
        quantizer.convert()


class TiedInputs(nn.Module):
    """Two layers with one weight; another class that has it too sees much larger inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.other = nn.Module()
        self.other.weight = self.first.weight

    def forward(self, x, both=True):
        y = self.first(x)
        return self.second(y) if both else y


def test_every_layer_that_rounds_its_inputs_has_to_be_seen():
    quantizer = fewbits.Int8PerChannel(activations="static")
    prepared = quantizer.prepare(TiedInputs())
    prepared(X, both=False)
    with pytest.raises(fewbits.errors.CalibrationError, match=r"no data for second\.weight"):
        quantizer.convert()
    prepared(X)
    quantizer.convert()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_of_inputs_that_is_no_scale_is_refused(scale):
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


def test_a_state_dict_of_other_codes_of_the_same_shapes_is_refused():
    def quantized(**options):
        return fewbits.quantize(nn.Linear(64, 64), "int8", **options).model

    with pytest.raises(RuntimeError, match="weight is stored as"):
        quantized().load_state_dict(quantized(input_axes={"weight": 0}).state_dict())


def test_embeddings_of_a_state_dict_keep_their_inputs():
    state = {"embed_tokens.weight": torch.randn(64, 64), "head.weight": torch.randn(64, 64)}
    ledger = fewbits.quantize(state, "int8", activations="dynamic").ledger
    assert ledger["embed_tokens.weight"].scheme == "int8 channel"
    assert ledger["head.weight"].scheme == "int8 channel, dynamic int8 inputs"
