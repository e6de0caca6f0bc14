"""`explain`: it names the kernel that runs, and why those before it do not."""

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.kernels import features
from fewbits.kernels.choose import KERNELS
from kernels.kernel_cases import INT4, INT8, Of, linear, normal, quantized


@pytest.fixture
def ran(monkeypatch):
    """The names of kernels, in the order in which they compute."""
    names = []
    for kernel in KERNELS:

        def linear(x, weight, kernel=kernel, original=kernel.linear):
            names.append(kernel.name)
            return original(x, weight)

        monkeypatch.setattr(kernel, "linear", linear, raising=False)
    return names


class Everything(nn.Module):
    """Layers of many kinds, one that is not called, and one that takes no tensor."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.up, self.down = linear(128, 64), linear(64, 128)
        self.unused = linear(64, 64)
        self.table = Table()

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.gru(x)[0]
        return self.down(self.up(x)) + self.table(8)


class Table(nn.Module):
    """A parameter that is read with a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))

    def forward(self, row):
        return self.weight[row]


def test_every_layer_has_a_row():
    model = fewbits.quantize(Everything().eval(), Of(INT8), validate=False).model
    found = fewbits.explain(model, torch.arange(6).reshape(2, 3))
    names = [row.name for row in found.rows]
    for name in ("embedding.weight", "conv.weight", "attention.in_proj_weight", "gru.weight_ih_l0", "up.weight"):
        assert name in names
    assert "unused.weight" not in names
    assert names.index("embedding.weight") < names.index("conv.weight") < names.index("down.weight")
    by_name = {row.name: row for row in found.rows}
    assert by_name["up.weight"].rows == 6
    assert by_name["up.weight"].dtype == torch.float32
    assert by_name["up.weight"].weight_layout == "int8_rows"
    assert by_name["up.weight"].scheme == "int8 channel"


@pytest.mark.parametrize("spec", [INT8, INT4, fewbits.QuantSpec(bits=8, granularity="channel", activations="dynamic")])
@pytest.mark.parametrize("compute", ["auto", "exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernel_that_is_named_is_the_one_that_runs(spec, compute, dtype, ran):
    module = quantized(linear(100, 130), spec, compute)
    for shape in [(1, 130), (20, 130), (2, 100, 130), (130,), (0, 130)]:
        ran.clear()
        (row,) = fewbits.explain(module, normal(*shape, dtype=dtype)).rows
        assert ran == [row.kernel] or (row.kernel == "reference" and not ran)
        assert row.rows == torch.Size(shape[:-1]).numel()


@pytest.mark.parametrize("spec", [INT8, INT4], ids=str)
def test_the_kernel_that_is_named_is_the_one_that_runs_under_autocast(spec, ran):
    module = quantized(linear(100, 130), spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = fewbits.explain(module, normal(20, 130)).rows
    assert ran == [row.kernel]


def test_the_reference_computes_inputs_in_float64_and_the_reason_is_given():
    (row,) = fewbits.explain(quantized(linear(100, 130), INT8), normal(3, 130, dtype=torch.float64)).rows
    assert row.kernel == "reference"
    assert row.refused["byte_blocks"] == "inputs in float64 need float64 products"


@pytest.mark.parametrize("compute", ["auto", "exact", "int8"])
def test_every_kernel_before_it_has_a_reason(compute):
    names = [kernel.name for kernel in KERNELS]
    for spec in (INT8, INT4):
        module = quantized(linear(100, 130), spec, compute)
        for rows in (1, 20, 200):
            (row,) = fewbits.explain(module, normal(rows, 130)).rows
            assert list(row.refused) == names[: names.index(row.kernel)]
            assert all(isinstance(why, str) and why for why in row.refused.values())


def test_reasons_are_what_kernels_say():
    module = quantized(linear(200, 130), INT8)
    (row,) = fewbits.explain(module, normal(500, 130)).rows
    assert "500 rows are more than" in row.refused["int8pack_mm"]
    assert row.refused["float_sums"] == "compute is 'auto', and the scheme does not round inputs"
    (row,) = fewbits.explain(quantized(linear(100, 130), INT8, "exact"), normal(5, 130)).rows
    assert set(row.refused.values()) == {"compute is 'exact'"}
    (row,) = fewbits.explain(module, normal(5, 130, dtype=torch.float64)).rows
    assert "float64" in row.refused["byte_blocks"]


def test_an_input_without_rows_is_no_refusal_of_a_layout():
    (row,) = fewbits.explain(quantized(linear(100, 130), INT8), normal(0, 130)).rows
    assert row.kernel == "reference"
    assert "the weight lies in bytes" not in row.refused["byte_blocks"]


def test_it_prints_a_table_and_notes():
    model = nn.Sequential(quantized(linear(200, 130), INT8), quantized(linear(64, 200), INT4))
    text = str(fewbits.explain(model, normal(500, 130)))
    assert "0.weight" in text
    assert "1.weight" in text
    assert "byte_blocks, not int8pack_mm (as for 0.weight): 500 rows are more than" in text


def test_inputs_are_a_tensor_a_tuple_or_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quantized(linear(100, 130), INT8)

        def forward(self, x, *, twice=False, other=None):
            return self.layer(x if other is None else other) * (2 if twice else 1)

    for given in (normal(3, 130), (normal(3, 130),), {"x": normal(3, 130), "twice": True, "other": normal(3, 130)}):
        assert fewbits.explain(Two(), given).rows[0].rows == 3


def test_a_layer_called_by_keyword_has_a_row():
    assert fewbits.explain(quantized(linear(100, 130), INT8), {"input": normal(3, 130)}).rows[0].rows == 3


def test_a_layer_that_is_called_twice_has_two_rows():
    layer = quantized(linear(64, 64), INT8)
    assert [row.rows for row in fewbits.explain(nn.Sequential(layer, layer), normal(3, 64)).rows] == [3, 3]


def hooks(model):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def test_nothing_is_left_behind():
    model = quantized(nn.Sequential(linear(64, 64), nn.Dropout(0.5)).train(), INT8)
    model.register_forward_pre_hook(lambda *_: None)
    before, state = hooks(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fewbits.explain(model, normal(3, 64))
    assert hooks(model) == before
    assert model.training
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    with pytest.raises(RuntimeError):
        fewbits.explain(model, normal(3, 65))
    assert hooks(model) == before
    with pytest.raises(TypeError):
        fewbits.explain(model, (normal(3, 64), 1, 2))
    assert hooks(model) == before


def test_no_gradient_is_recorded_and_the_mode_stays():
    model = quantized(linear(64, 64), INT8)
    outputs = []
    model.register_forward_hook(lambda _, args, output: outputs.append(output.requires_grad))
    fewbits.explain(model, normal(3, 64).requires_grad_())
    assert outputs == [False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [linear(3, 3), nn.Sequential()], ids=["float", "empty"])
def test_a_model_without_quantized_layers_is_refused(value):
    with pytest.raises(ArgumentError, match="no layer of this model is quantized"):
        fewbits.explain(value, normal(3, 3))


@pytest.mark.parametrize("value", [None, "model", {}])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(ArgumentError, match="takes a model"):
        fewbits.explain(value, normal(3, 3))


class TakesFeatures(nn.Module):
    """As a sentence transformer: the whole mapping is its first argument."""

    def __init__(self):
        super().__init__()
        self.layer = linear(64, 64)

    def forward(self, features, **options):
        return {**features, "out": self.layer(features["x"])}


def test_features_are_one_argument_if_the_model_takes_them_so():
    model = quantized(TakesFeatures(), INT8)
    (row,) = fewbits.explain(model, {"x": normal(3, 64)}).rows
    assert (row.name, row.rows) == ("layer.weight", 3)


def test_without_an_input_there_is_nothing_to_explain():
    model = quantized(nn.Sequential(linear(64, 64)), INT8)
    with pytest.raises(ArgumentError, match="needs an input: a tensor, a tuple of arguments or a mapping"):
        fewbits.explain(model, None)


@pytest.mark.parametrize("exact", [True, False], ids=["exact sums", "sums that are not"])
def test_how_a_convolution_of_int8_inputs_is_computed_is_said(monkeypatch, exact):
    monkeypatch.setattr(features, "convolution_is_exact", lambda: exact)
    layers = nn.Sequential(nn.Conv1d(256, 256, 3, groups=256))
    model = fewbits.quantize(layers, "int8", activations="dynamic").model
    explanation = fewbits.explain(model, normal(1, 256, 9))
    (depthwise,) = explanation.rows
    assert "has groups" in depthwise.refused["int_mm"]
    assert depthwise.refused.get("float_sums") == (None if exact else features.INEXACT_CONVOLUTION)
    assert depthwise.kernel == ("float_sums" if exact else "reference")
    assert f"{depthwise.kernel}, not int_mm (as for 0.weight): it is transposed, has groups" in str(explanation)


def test_a_convolution_whose_sums_float32_does_not_hold_says_so():
    model = fewbits.quantize(nn.Conv1d(1025, 8, 1, padding_mode="circular"), "int8", activations="dynamic").model
    (row,) = fewbits.explain(model, normal(1, 1025, 9)).rows
    assert row.kernel == "reference"
    assert row.refused["float_sums"] == "float32 does not hold every sum of 1025 products exactly"
    fewbits.set_compute(model, "exact")
    assert set(fewbits.explain(model, normal(1, 1025, 9)).rows[0].refused.values()) == {"compute is 'exact'"}


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        (nn.Conv2d(64, 128, 3), {}, None),
        (nn.Conv2d(64, 128, 3), {"compute": "exact"}, "compute is 'exact'"),
        (nn.Conv2d(128, 128, 3, groups=2), {}, "it is transposed or has groups"),
        (nn.ConvTranspose2d(128, 128, 3), {}, "it is transposed or has groups"),
        (nn.Conv2d(64, 127, 3), {}, "127 channels out of 64 are too few for 50 dB in bfloat16"),
        (nn.Conv2d(63, 128, 3), {}, "128 channels out of 63 are too few for 50 dB in bfloat16"),
        (nn.Conv2d(64, 128, 3), {"input_axes": {"0": (0, 2, 3)}}, "the rows of its weight are not its output channels"),
        (nn.Conv2d(64, 128, 3), {"scheme": "int4"}, None),
        (nn.Conv2d(64, 128, 3, stride=2), {"scheme": "int4"}, "100 places are fewer than 256"),
        (nn.Conv2d(64, 128, (1, 3)), {}, "192 products for each output are fewer than 256"),
        (nn.Conv2d(64, 127, 3), {"scheme": "int4"}, "127 channels out of 64 are too few for 50 dB in bfloat16"),
        (nn.Conv2d(64, 128, 3), {"scheme": "fp8"}, "its codes of 8 bits are not symmetric integers with a scale for"),
    ],
)
def test_a_convolution_names_its_way(layer, settings, reason, monkeypatch):
    monkeypatch.setattr(features, "has_bf16", lambda: True)
    settings = {"scheme": "int8", "on_failure": "ignore", **settings}
    model = fewbits.quantize(nn.Sequential(layer), **settings).model
    x = normal(4, layer.in_channels, 9, 9)
    (row,) = fewbits.explain(model, x).rows
    assert row.kernel == ("bf16_convolution" if reason is None else "reference")
    assert row.refused.get("bf16_convolution", "").startswith(reason or "")


def test_a_convolution_without_instructions_for_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(features, "has_bf16", lambda: False)
    model = fewbits.quantize(nn.Conv1d(64, 128, 3), "int8").model
    (row,) = fewbits.explain(model, normal(1, 64, 9)).rows
    assert row.refused == {"bf16_convolution": "this CPU has no instructions for bfloat16"}


@pytest.mark.parametrize(
    ("layer", "size", "rows"),
    [
        (nn.Conv2d(64, 128, 1), (64, 4, 4), 16),
        (nn.Conv2d(64, 128, 1, stride=2), (2, 64, 5, 4), 12),
        (nn.Conv1d(64, 128, 1), (1, 64, 3), 3),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"scheme": "int8-tensor"}, {"compute": "int8"}], ids=str)
def test_a_convolution_of_one_place_names_the_kernel_of_a_linear_layer(settings, layer, size, rows):
    settings = {"scheme": "int8", **settings}
    (row,) = fewbits.explain(fewbits.quantize(nn.Sequential(layer), **settings).model, normal(*size)).rows
    (linear,) = fewbits.explain(
        fewbits.quantize(nn.Sequential(nn.Linear(64, 128)), **settings).model, normal(rows, 64)
    ).rows
    assert row == linear
    assert row.rows == rows


@pytest.mark.parametrize(
    ("settings", "size", "reason"),
    [
        ({}, (1, 64, 17), "17 places are more than 16"),
        ({"scheme": "int4"}, (1, 128, 3), "it is no linear layer over the channels of each place"),
        ({}, (0, 64, 3), "the input has no elements"),
        ({}, (1, 65, 3), "the input does not fit"),
        ({"compute": "exact"}, (1, 64, 9), "none of them computes with its weight"),
    ],
)
def test_a_convolution_of_one_place_says_why_it_is_no_linear_layer(settings, size, reason):
    channels = 128 if settings.get("scheme") == "int4" else 64
    model = fewbits.quantize(nn.Sequential(nn.Conv1d(channels, 128, 1)), **{"scheme": "int8", **settings}).model
    assert model[0].refuses_linear(normal(*size)) == reason
    if size[1] == 64:  # 8 bits, and an input that fits
        (row,) = fewbits.explain(model, normal(*size)).rows
        assert row.kernel in ("bf16_convolution", "reference")
        assert row.refused["kernels of linear layers"] == reason
