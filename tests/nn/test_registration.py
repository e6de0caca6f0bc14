"""Classes from outside get a quantized form with one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, SelectionError
from fewbits.extend import QuantizedConv2d, QuantizedLinear, QuantizedModule
from fewbits.nn import base
from fewbits.testing import ConformanceError, check_module
from nn.cases import converted, keeping, pickled

pytestmark = pytest.mark.usefixtures("forget_registrations")


@pytest.fixture
def forget_registrations(monkeypatch):
    """Undo the registrations of a test."""
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    monkeypatch.setattr(base, "_made", {})


class FrameworkLinear(nn.Module):
    """A linear layer that does not inherit from `torch.nn.Linear`."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.arange(float(outputs)))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self):
        return "from a framework"


class ScaledLinear(nn.Linear):
    """A linear layer whose output is multiplied with a gain."""

    gain = 3.0

    def forward(self, input):
        return F.linear(input, self.weight, self.bias) * self.gain


class TransposedLinear(nn.Module):
    """A linear layer with a weight of shape (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x @ self.weight


class QuantizedTransposedLinear(QuantizedModule):
    """Declares which axes of the weight are inputs."""

    input_axes = {"weight": (0,)}  # noqa: RUF012


class QuantizedScaledLinear(QuantizedLinear):
    """Multiplies the product that kernels compute with the gain."""

    def forward(self, input):
        return super().forward(input) * self.gain


class ReadsTwice(QuantizedModule):
    """Reads its weight twice."""

    def forward(self, x):
        assert self.weight is self.weight
        return x @ self.weight


class FrameworkConv2d(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input):
        return self._conv_forward(input, self.weight, self.bias)


def x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run_all(checks):
    for check in checks:
        check()


def test_a_registered_linear_layer_computes_with_kernels_itself():
    model = nn.Sequential(FrameworkLinear(64, 256))
    (before,) = fewbits.explain(fewbits.quantize(model, "int8").model, x(3, 64)).rows
    QuantizedLinear.register(FrameworkLinear)
    quantized = fewbits.quantize(model, "int8").model
    (after,) = fewbits.explain(quantized, x(3, 64)).rows
    assert (before.of_part, after.of_part) == (True, False)
    assert before.kernel == after.kernel != "reference"
    assert isinstance(quantized[0], FrameworkLinear)
    assert quantized[0].extra_repr() == "from a framework"


def test_a_registered_linear_layer_rounds_its_inputs():
    quantizer = keeping(overrides={"weight": {"activations": "dynamic"}})
    _, ledger = converted(FrameworkLinear(64, 32), quantizer)
    assert ledger["weight"].spec.activations is None
    QuantizedLinear.register(FrameworkLinear)
    run_all(check_module(FrameworkLinear(64, 32), x(3, 64)))


def test_registering_a_subclass_that_overrides_forward_replaces_it_with_a_warning():
    with pytest.warns(UserWarning, match=r"FrameworkConv2d overrides the forward of Conv2d, .* do not register"):
        QuantizedConv2d.register(FrameworkConv2d)
    run_all(check_module(FrameworkConv2d(8, 8, 3), x(2, 8, 9, 9)))


def test_a_form_with_the_subclass_as_its_float_class_replaces_its_forward_without_a_warning():
    class QuantizedFrameworkConv2d(QuantizedConv2d):
        float_class = FrameworkConv2d

    module, _ = converted(FrameworkConv2d(8, 8, 3), keeping())
    assert isinstance(module, QuantizedFrameworkConv2d)
    assert type(module).forward is QuantizedConv2d.forward


def test_registering_a_subclass_without_a_forward_of_its_own_does_not_warn():
    QuantizedConv2d.register(type("Renamed", (nn.Conv2d,), {}))


def test_a_form_of_ones_own_computes_with_the_inherited_forward():
    QuantizedScaledLinear.register(ScaledLinear)
    run_all(check_module(ScaledLinear(64, 256), x(3, 64)))
    model = fewbits.quantize(nn.Sequential(ScaledLinear(64, 256)), "int8").model
    assert isinstance(model[0], ScaledLinear)
    assert isinstance(model[0], QuantizedScaledLinear)
    assert fewbits.explain(model, x(3, 64)).rows[0].kernel != "reference"


def test_a_form_declares_which_axes_are_inputs():
    QuantizedTransposedLinear.register(TransposedLinear)
    run_all(check_module(TransposedLinear(64, 32), x(3, 64)))
    _, ledger = converted(TransposedLinear(64, 32), keeping())
    assert ledger["weight"].layout.matrix_shape == (32, 64)


def test_a_class_is_registered_by_name_without_importing_it():
    QuantizedTransposedLinear.register(f"{__name__}.TransposedLinear")
    _, ledger = converted(TransposedLinear(64, 32), keeping())
    assert ledger["weight"].layout.matrix_shape == (32, 64)


def test_a_form_is_registered_for_its_float_class():
    class Own(nn.Linear):
        pass

    class QuantizedOwn(QuantizedLinear):
        float_class = Own

    assert isinstance(converted(Own(64, 32), keeping())[0], QuantizedOwn)


def test_a_forward_of_a_form_dequantizes_each_weight_once():
    ReadsTwice.register(TransposedLinear)
    run_all(check_module(TransposedLinear(64, 32), x(3, 64)))


def test_a_subclass_of_a_registered_class_keeps_its_own_forward():
    class Doubling(FrameworkLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    QuantizedLinear.register(FrameworkLinear)
    model, _ = converted(Doubling(64, 32), keeping())
    torch.testing.assert_close(model(x(3, 64)), fewbits.dequantize(model)(x(3, 64)))


def test_a_registered_forward_replaces_one_that_goes_through_its_parameters():
    class Walking(FrameworkLinear):
        def forward(self, x):
            weight, bias = self.parameters()
            return F.linear(x, weight, bias)

    with pytest.raises(SelectionError, match=r"goes through its\s+parameters"):
        converted(Walking(64, 32), keeping())
    QuantizedLinear.register(Walking)
    module, _ = converted(Walking(64, 32), keeping())
    assert isinstance(module, QuantizedLinear)
    assert module(x(3, 64)).shape == (3, 32)


def test_a_file_is_loaded_into_a_registered_class(tmp_path):
    QuantizedLinear.register(FrameworkLinear)
    model = nn.Sequential(FrameworkLinear(64, 32))
    result = fewbits.quantize(model, "int8", activations="dynamic")
    result.save(tmp_path / "model.safetensors")
    loaded = fewbits.load(tmp_path / "model.safetensors", into=nn.Sequential(FrameworkLinear(64, 32)))
    assert torch.equal(loaded(x(3, 64)), result.model(x(3, 64)))


def test_a_pickle_needs_no_registration():
    QuantizedLinear.register(FrameworkLinear)
    model, _ = converted(FrameworkLinear(64, 32), keeping())
    base._registered.pop(FrameworkLinear)
    base._made.clear()
    for copied in (pickled(model), copy.deepcopy(model)):
        assert isinstance(copied, FrameworkLinear)
        assert torch.equal(copied(x(3, 64)), model(x(3, 64)))


def test_the_last_registration_counts():
    QuantizedLinear.register(FrameworkLinear)
    before, _ = converted(FrameworkLinear(64, 32), keeping())
    QuantizedModule.register(FrameworkLinear)
    after, _ = converted(FrameworkLinear(64, 32), keeping())
    assert isinstance(before, QuantizedLinear)
    assert not isinstance(after, QuantizedLinear)


@pytest.mark.parametrize("wrong", [3, None, int, nn.Linear(2, 2), nn.Module, QuantizedLinear], ids=str)
def test_only_classes_of_float_modules_are_registered(wrong):
    with pytest.raises(ArgumentError, match="regist"):
        QuantizedLinear.register(wrong)


class QuantizedWithoutGain(QuantizedLinear):
    """Forgets the gain."""

    def forward(self, input):
        return super().forward(input)


class QuantizedWrongForward(QuantizedModule):
    """Multiplies with the transposed weight."""

    def forward(self, input):
        return F.linear(input, self.weight.t()[: self.out_features], self.bias)


class QuantizedWithoutRounding(QuantizedLinear):
    """Says that it rounds its inputs, and does not."""

    def forward(self, input):
        return F.linear(input, self.weight_stored.dequantize(), self.bias) * 3


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (QuantizedModule, "a_form_is_registered"),
        (QuantizedWithoutGain, "outputs_are_those_of_the_dequantized_weights"),
        (QuantizedWrongForward, "outputs_are_those_of_the_dequantized_weights"),
        (QuantizedWithoutRounding, "inputs_are_rounded_as_declared"),
    ],
)
def test_the_kit_finds_a_form_that_breaks_its_promise(form, wrong):
    form.register(ScaledLinear)
    checks = {str(check): check for check in check_module(ScaledLinear(64, 32), x(3, 64))}
    with pytest.raises(ConformanceError):
        checks[wrong]()


def test_the_kit_takes_a_float_module():
    quantized, _ = converted(nn.Linear(8, 8), keeping())
    for wrong in (nn.Linear, quantized):
        with pytest.raises(ArgumentError, match="takes a float module"):
            check_module(wrong)
