"""Promises to users, one short test each, through public names and files only."""

import ast
import gc
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewbits
from fewbits.cli import main
from fewbits.extend import MovingAverageMinMaxObserver

SCHEMES = ["int8", "int8-tensor", "int4", "fp16"]
#: The least SQNR of normal weights, and the largest size relative to float32, scales and shapes included.
LEAST_DB = {"int8": 40, "int8-tensor": 35, "int4": 18, "fp16": 70}
MOST_BYTES = {"int8": 0.26, "int8-tensor": 0.26, "int4": 0.14, "fp16": 0.51}

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(module):
    """The module with normally distributed weights, independent of the initialization of its class."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def mlp():
    return normal(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)))


def sqnr_db(true, found):
    """Signal-to-noise ratio in dB, in float64."""
    true, found = true.detach().double(), found.detach().double()
    return 10 * (true.square().sum() / (true - found).square().sum()).log10().item()


def through_disk(model, scheme, path, into=None, **settings):
    """Quantize, save, and load into a fresh model, or into a mapping."""
    fewbits.quantize(model, scheme, **settings).save(path)
    return fewbits.load(path, into=into)


def payload(path):
    """The bytes of all tensors in a safetensors file."""
    return sum(tensor.nbytes for tensor in load_file(path).values())


# 4 bits.


@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
def test_int4_has_four_bits_in_the_model_and_in_the_file(activations, tmp_path):
    class FourBits(fewbits.Quantizer):
        spec = fewbits.QuantSpec(bits=4, granularity="channel", activations=activations)

    class Grouped(fewbits.Int4Grouped):
        pass

    model = normal(nn.Sequential(nn.Linear(256, 64, bias=False)))
    for scheme in [FourBits] if activations else [FourBits, Grouped]:
        result = fewbits.quantize(model, scheme(), data=[torch.randn(50, 256)])
        result.save(tmp_path / "f")
        assert load_file(tmp_path / "f")["0.weight_packed"].nbytes == 256 * 64 // 2
        assert result.model.state_dict()["0.weight_packed"].nbytes == 256 * 64 // 2
        codes = fewbits.load(tmp_path / "f")["0.weight"].codes()
        assert 8 < len(codes.unique()) <= 16


def test_int8_does_not_use_the_default_skips_of_int4():
    model = nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64))
    fates = {scheme: fewbits.quantize(model, scheme).ledger["0.weight"].fate for scheme in ("int4", "int8")}
    assert fates == {"int4": "kept", "int8": "quantized"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_reaches_its_expected_sqnr_and_keeps_signs_and_range(symmetric, tmp_path):
    weight = torch.randn(256, 512)
    found = through_disk({"w": weight}, "int4", tmp_path / "f", symmetric=symmetric)["w"].dequantize()
    assert sqnr_db(weight, found) > LEAST_DB["int4"]
    assert found.min() < -3
    assert found.max() > 3
    assert abs(found.mean()) < 0.01
    clear = weight.abs() > 0.6
    assert torch.equal(found[clear].sign(), weight[clear].sign())


def test_a_group_is_a_run_of_inputs_of_one_output(tmp_path):
    weight = torch.randn(256, 512)
    louder = weight.clone()
    louder[3, 128:256] *= 8
    scales = [through_disk({"w": w}, "int4", tmp_path / "f", group_size=128)["w"].scale for w in (weight, louder)]
    assert scales[0].shape == (256, 4)
    assert torch.nonzero(scales[0] != scales[1]).tolist() == [[3, 1]]


def test_a_layer_too_small_for_groups_computes_with_int8(tmp_path):
    model, x = normal(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 256), nn.Linear(256, 8))), torch.randn(5, 64)
    fresh = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 256), nn.Linear(256, 8))
    result = fewbits.quantize(model, "int4", group_size=128)
    assert [result.ledger[f"{i}.weight"].spec.bits for i in range(3)] == [8, 8, 4]
    result.save(tmp_path / "f")
    assert torch.equal(fewbits.load(tmp_path / "f", into=fresh)(x), result.model(x))
    assert sqnr_db(model[:2](x), result.model[:2](x)) > 35


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 9, 31, 33, 127, 129, 131])
def test_a_row_of_any_length_keeps_its_last_weight(columns, tmp_path):
    weight = torch.randn(5, columns).clamp(-2, 2)
    weight[:, -1] = torch.tensor([5.0, -5.0, 7.0, -7.0, 3.5])
    settings = {"group_size": 16, "ragged": "shorter", "min_elements": 1}
    found = through_disk({"w": weight}, "int4", tmp_path / "f", **settings)["w"].dequantize()
    assert found.shape == weight.shape
    assert torch.allclose(found[:, -1], weight[:, -1])
    assert (found - weight).abs().max() < 0.501  # the largest scale is 7 / 7


# Files.


@pytest.mark.parametrize("bias", [True, False])
@every_scheme
def test_a_file_fills_a_fresh_model_with_the_same_bits(scheme, bias, tmp_path):
    def make():
        return normal(nn.Sequential(nn.Linear(256, 64, bias=bias), nn.ReLU(), nn.Linear(64, 256, bias=bias)))

    result = fewbits.quantize(make(), scheme)
    result.save(tmp_path / "f")
    loaded, x = fewbits.load(tmp_path / "f", into=make()), torch.randn(3, 256)
    assert torch.equal(loaded(x), result.model(x))
    assert type(loaded[0]) is type(result.model[0]) is not nn.Linear or scheme == "fp16"


def test_a_file_states_bits_and_group_size(tmp_path):
    spec = through_disk(mlp(), "int4", tmp_path / "f", group_size=64, symmetric=False)["0.weight"].spec
    assert (spec.bits, spec.granularity, spec.group_size, spec.symmetric) == (4, "group", 64, False)


@pytest.mark.parametrize("kind", [str, Path])
@every_scheme
def test_a_path_may_be_a_str_or_a_path(scheme, kind, tmp_path):
    path = kind(tmp_path / "quantized.safetensors")
    result = fewbits.quantize(mlp(), scheme)
    result.save(path)
    assert fewbits.verify(path, against=mlp()).general == ()
    assert fewbits.load(path).keys() == mlp().state_dict().keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(1024, 512, bias=False),
        lambda: nn.Conv2d(128, 128, 3, bias=False),
        lambda: nn.LSTM(256, 256, bias=False),
        lambda: nn.Embedding(1024, 512),
    ],
    ids=["linear", "convolution", "recurrent", "embedding"],
)
@every_scheme
def test_a_model_and_its_file_have_the_expected_size(scheme, make, tmp_path):
    model = nn.ModuleList([normal(make())])
    save_file(model.state_dict(), tmp_path / "float")
    result = fewbits.quantize(model, scheme, skip_types=[])
    result.save(tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < MOST_BYTES[scheme] * (tmp_path / "float").stat().st_size + 8192
    assert payload(tmp_path / "small") < MOST_BYTES[scheme] * payload(tmp_path / "float")
    held = sum(tensor.nbytes for tensor in [*result.model.parameters(), *result.model.buffers()])
    assert held < 1.1 * payload(tmp_path / "small")  # a kernel may keep its own table of scales
    kinds = {tensor.dtype for name, tensor in load_file(tmp_path / "small").items() if not name.endswith("_shape")}
    assert kinds <= {torch.int32, torch.float32 if scheme != "fp16" else torch.float16}


# Layers of all kinds, anywhere in a model.


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_convolution_pads_like_the_float_one(rank, mode, tmp_path):
    def make():
        return normal(getattr(nn, f"Conv{rank}d")(16, 16, 3, padding=1, padding_mode=mode))

    model, x = make(), torch.randn(2, 16, *[4] * rank)
    loaded = through_disk(model, "int8", tmp_path / "f", into=make())
    assert sqnr_db(model(x), loaded(x)) > LEAST_DB["int8"]


@every_scheme
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(256, 256, bias=False), torch.ones(2, 256)),
        (lambda: nn.Conv2d(64, 64, 3, bias=False), torch.ones(1, 64, 8, 8)),
    ],
    ids=["linear", "convolution"],
)
def test_no_float_weight_stays_after_a_forward(scheme, make, x):
    module = fewbits.quantize(make(), scheme).model
    float_size = make().weight.nbytes
    before = {id(t) for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)}
    with torch.no_grad():
        y = module(x)
    gc.collect()
    new = [t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and id(t) not in before]
    assert float_size not in [size for size in new if size != y.nbytes]


@every_scheme
def test_an_embedding_is_quantized_in_the_state_dict_and_in_the_file(scheme, tmp_path):
    model, ids = normal(nn.Sequential(nn.Embedding(64, 128))), torch.arange(64)
    result = fewbits.quantize(model, scheme, include=["0"])
    assert any(name.startswith("0.weight") for name in result.model.state_dict())
    loaded = through_disk(model, scheme, tmp_path / "f", into=nn.Sequential(nn.Embedding(64, 128)), include=["0"])
    assert torch.equal(loaded(ids), result.model(ids))
    assert sqnr_db(model(ids), loaded(ids)) > LEAST_DB[scheme]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Sequential(nn.Linear(32, 32))})

    def forward(self, x):
        return x + self.inner["b"](self.inner["a"](x))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


MODELS = {
    "a bare layer": lambda: nn.Linear(32, 32),
    "sequences in sequences": lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(32, 32))), nn.Linear(32, 32)),
    "lists and dicts of blocks": lambda: nn.Sequential(Listed(), nn.Linear(32, 32)),
    "a 1d convolution": lambda: nn.Sequential(nn.Conv1d(32, 32, 3)),
    "a 2d convolution": lambda: nn.Sequential(nn.Conv2d(32, 32, 3)),
    "a 3d convolution": lambda: nn.Sequential(nn.Conv3d(32, 32, 3)),
    "a bilinear layer": lambda: nn.ModuleList([nn.Bilinear(8, 8, 32)]),
    "a recurrent layer": lambda: nn.ModuleList([nn.GRU(32, 32)]),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@every_scheme
def test_every_weight_is_quantized_wherever_it_is(scheme, make, tmp_path):
    model = make()
    result = fewbits.quantize(model, scheme)
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1 and "bias" not in name}
    assert {row.name for row in result.ledger if row.fate != "kept"} == weights
    assert not weights & dict(result.model.named_parameters()).keys()
    result.save(tmp_path / "f")
    assert payload(tmp_path / "f") < 0.6 * sum(parameter.nbytes for parameter in model.parameters())


def test_include_quantizes_only_the_named_layer():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)), nn.Conv1d(32, 32, 3))
    quantized = fewbits.quantize(model, "int8", include=["3"]).ledger
    assert [row.name for row in quantized if row.fate == "quantized"] == ["3.weight"]
    for rule in ({"include": ["3", "x"]}, {"exclude": ["x"]}, {"overrides": {"x": "keep"}}, {"input_axes": {"x": 0}}):
        with pytest.raises(fewbits.errors.SelectionError, match="'x'"):
            fewbits.quantize(model, "int8", **rule)


# Data and measurements.


def test_calibration_data_decide_on_the_scales_of_inputs(tmp_path):
    model, data = mlp(), torch.randn(50, 256)
    outputs = {}
    for factor in (1, 1000):
        settings = {"activations": "static", "data": [data * factor]}
        outputs[factor] = through_disk(model, "int8", tmp_path / "f", into=mlp(), **settings)(data)
    assert sqnr_db(model(data), outputs[1]) > 30
    assert sqnr_db(model(data), outputs[1000]) < 10
    with pytest.raises(fewbits.errors.CalibrationError, match="observe"):
        fewbits.quantize(model, "int8", activations="static")


@every_scheme
def test_reported_bytes_and_errors_match_the_file_and_the_weights(scheme, tmp_path):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fewbits.quantize(model, scheme, on_failure="warn")
    result.save(tmp_path / "f")
    loaded = fewbits.dequantize(fewbits.load(tmp_path / "f"))
    names = ["0.weight", "2.weight"]
    true, found = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (model.state_dict(), loaded))
    assert result.report.sqnr_db == pytest.approx(sqnr_db(true, found.float()), abs=0.01)
    assert result.report.sqnr_db > LEAST_DB[scheme]
    assert not result.report.warnings or scheme == "int4"
    assert result.report.bytes_before == sum(parameter.nbytes for parameter in model.parameters())
    assert result.report.bytes_after == result.ledger.bytes_after == payload(tmp_path / "f")


class Asymmetric(fewbits.Quantizer):
    spec = fewbits.QuantSpec(bits=8, granularity="channel", symmetric=False)


@pytest.mark.parametrize(("low", "high"), [(5, 6), (-6, -5), (0, 1), (-1, 0), (-0.1, 6), (1e-3, 2e-3), (1e4, 1.2e4)])
def test_an_asymmetric_range_of_one_sign_is_no_worse_than_a_symmetric_one(low, high, tmp_path):
    weight = torch.rand(32, 64) * (high - low) + low
    figures = [
        sqnr_db(weight, through_disk({"w": weight}, scheme, tmp_path / "f")["w"].dequantize())
        for scheme in (Asymmetric(), "int8")
    ]
    assert figures[0] > 45
    assert figures[0] > figures[1] + 4


def test_a_zero_point_is_rounded_to_nearest(tmp_path):
    weight = torch.rand(64, 64) * 9 - 3
    found = through_disk({"w": weight}, Asymmetric(), tmp_path / "f")["w"]
    low, high = weight.double().aminmax(dim=1, keepdim=True)
    assert torch.allclose(found.scale.double(), (high - low) / 255)
    assert torch.equal(found.zero_points(), (-128 - low / found.scale).round().int())


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "histogram"])
def test_every_observer_handles_any_distribution(name, tmp_path):
    """Constant, far from zero, and of many magnitudes."""
    lonely, wide = torch.full((32, 64), 10.5), torch.cat([torch.randn(16, 512) * 2, torch.randn(16, 512) * 100])
    for weight in (lonely, -lonely, wide):
        found = through_disk({"w": weight}, "int8", tmp_path / "f", observer=name)["w"].dequantize()
        assert torch.allclose(found.sum(1), weight.sum(1), rtol=0.01, atol=0.1 * weight.abs().max())
        assert sqnr_db(weight, found) > 35


@pytest.mark.parametrize("name", ["MinMaxObserver", "PercentileObserver", "MSEObserver", "HistogramObserver"])
@pytest.mark.parametrize("order", [1, -1], ids=["narrow first", "wide first"])
def test_batches_with_other_ranges_have_their_due_weight(name, order):
    spec = fewbits.QuantSpec(bits=8, granularity="tensor", symmetric=False)
    observer = getattr(fewbits, name)()
    for batch in [torch.rand(1000) * 4, torch.rand(1000) * 388, torch.full((1000,), 10.5)][::order]:
        observer.observe_input(batch)
    params = observer.input_params(spec)
    scale, zero_point = params.scale.item(), params.zero_point.item()
    assert zero_point == -128
    assert 0.9 * 388 < 255 * scale < 1.1 * 388


@pytest.mark.parametrize("order", [1, -1], ids=["narrow first", "wide first"])
def test_a_few_outliers_do_not_distort_other_batches(order):
    observer = fewbits.PercentileObserver(98)
    for batch in [torch.rand(10_000) * 4, torch.rand(100) * 388][::order]:
        observer.observe_input(batch)
    scale = observer.input_params(fewbits.QuantSpec(bits=8, granularity="tensor", symmetric=False)).scale
    assert 0.95 * 4 < 255 * scale.item() < 1.3 * 4


@pytest.mark.parametrize(("low", "high"), [(100, 101), (-101, -100), (1e-6, 2e-6)])
@pytest.mark.parametrize(
    "make",
    [fewbits.MinMaxObserver, MovingAverageMinMaxObserver, fewbits.HistogramObserver, fewbits.MSEObserver],
)
def test_a_zero_point_is_one_of_the_codes_and_the_range_reaches_zero(make, low, high):
    observer = make()
    observer.observe_input(torch.rand(1000) * (high - low) + low)
    spec = fewbits.QuantSpec(bits=8, granularity="tensor", symmetric=False)
    params = observer.input_params(spec)
    scale, zero_point = params.scale.item(), params.zero_point.item()
    assert zero_point == (-128 if low > 0 else 127)
    middle = (low + high) / 2
    code = min(max(round(middle / scale) + zero_point, -128), 127)
    assert abs((code - zero_point) * scale - middle) <= 0.501 * scale


@pytest.mark.parametrize("name", ["minmax", "moving-average", "percentile", "mse", "histogram"])
def test_a_nonfinite_number_always_raises_an_error(name):
    model, data = mlp(), torch.randn(50, 256)
    data[3, 4] = float("nan")
    with pytest.raises(fewbits.errors.CalibrationError, match="NaN"):
        fewbits.quantize(model, "int8", activations="static", activation_observer=name, data=[data])
    with torch.no_grad():
        model[0].weight[3, 4] = float("inf")
    with pytest.raises(fewbits.errors.NonFiniteError, match=r"0\.weight"):
        fewbits.quantize(model, "int8")


# Dtypes and devices.


@pytest.mark.parametrize("data", [None, [torch.ones(50, 8, 16, 16)]], ids=["without data", "with data"])
def test_a_half_model_is_quantized_and_keeps_excluded_weights(data, tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)).eval()

    model, x = make(), torch.randn(2, 8, 16, 16)
    result = fewbits.quantize(model, "fp16", exclude=["2"], data=data)
    assert result.report.ok
    result.save(tmp_path / "f")
    loaded = fewbits.load(tmp_path / "f", into=make())
    assert loaded(x).dtype == torch.float32
    assert sqnr_db(model(x), loaded(x)) > 60
    stored = load_file(tmp_path / "f")
    assert (stored["0.weight"].dtype, stored["2.weight"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(stored["1.running_var"], model[1].running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_scheme
def test_a_model_of_any_dtype_is_quantized_and_computes_in_that_dtype(scheme, dtype, tmp_path):
    if (scheme, dtype) == ("fp16", torch.float16):
        with pytest.raises(fewbits.errors.SelectionError, match="float16 already"):
            fewbits.quantize(mlp().to(dtype), scheme)
        return
    model, x = mlp().to(dtype), torch.randn(4, 256, dtype=dtype)
    loaded = through_disk(model, scheme, tmp_path / "f", into=mlp().to(dtype))
    assert not {"0.weight", "2.weight"} & dict(loaded.named_parameters()).keys()
    assert loaded(x).dtype == dtype
    assert sqnr_db(model(x), loaded(x)) > LEAST_DB[scheme] - 5


@pytest.mark.parametrize("device", ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_scheme
def test_a_quantized_model_moves_as_a_whole(scheme, dtype, device):
    model = fewbits.quantize(mlp(), scheme).model.to(device, dtype)
    numbers = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_shape")}
    assert len(numbers) == (4 if scheme == "fp16" else 6)
    assert {tensor.device.type for tensor in [*numbers.values(), *model.buffers()]} == {device}
    y = model(torch.randn(2, 256, device=device, dtype=dtype))
    assert (y.device.type, y.dtype) == (device, dtype)


# Settings.


@pytest.mark.parametrize("as_config", [False, True], ids=["keyword", "config"])
def test_the_scheme_decides_between_one_scale_per_tensor_and_per_row(as_config, tmp_path):
    weight = torch.randn(32, 64) * torch.logspace(-2, 0, 32)[:, None]
    scales = {}
    for scheme in ("int8-tensor", "int8"):
        storage_spec = {"config": fewbits.QuantizationConfig(scheme=scheme)} if as_config else {"scheme": scheme}
        fewbits.quantize({"w": weight}, **storage_spec).save(tmp_path / "f")
        scales[scheme] = fewbits.load(tmp_path / "f")["w"].scale
    assert (scales["int8-tensor"].numel(), scales["int8"].shape) == (1, (32, 1))
    assert torch.allclose(scales["int8"][:, 0], weight.abs().amax(1) / 127)


@every_scheme
def test_dequantize_gives_float_layers_with_the_same_weights(scheme, tmp_path):
    x = torch.randn(2, 256)
    quantized = through_disk(mlp(), scheme, tmp_path / "f", into=mlp())
    fewbits.set_compute(quantized, "exact")
    plain = fewbits.dequantize(quantized)
    assert [type(module) for module in plain.modules()] == [type(module) for module in mlp().modules()]
    assert plain.state_dict().keys() == mlp().state_dict().keys()
    assert torch.equal(plain(x), quantized(x))
    mlp().load_state_dict(plain.state_dict())


# Checkpoints and the command line.


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command line in this process, in `tmp_path`; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


@every_scheme
def test_a_state_dict_a_file_and_the_command_line_need_no_class_and_give_the_same_codes(scheme, tmp_path, cli):
    state = dict(mlp().state_dict())
    save_file(state, tmp_path / "float.safetensors")
    fewbits.quantize(state, scheme).save(tmp_path / "a")
    fewbits.quantize(tmp_path / "float.safetensors", scheme, output=tmp_path / "b")
    code, _, err = cli("quantize", "float.safetensors", "-o", "c", "--scheme", scheme)
    assert (code, err) == (0, "")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert payload(tmp_path / "c") < 0.55 * payload(tmp_path / "float.safetensors")


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "bare"])
def test_a_pickle_is_refused_and_never_run(write, tmp_path, cli):
    path, trap = tmp_path / "model.pt", tmp_path / "trap"
    write(Payload(str(trap)), path)
    for act in (
        lambda: fewbits.quantize(path, "int8", output=tmp_path / "out"),
        lambda: fewbits.load(path, into=mlp()),
        lambda: fewbits.load(path),
        lambda: fewbits.verify(path),
    ):
        with pytest.raises(fewbits.errors.FormatError, match=r"model\.pt"):
            act()
    for arguments in (["quantize", path, "-o", "out", "--scheme", "int8"], ["inspect", path], ["verify", path]):
        code, out, _ = cli(*arguments)
        assert (code, out) == (2, "")
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("arguments", [["--scheme", "int8", "--bits", "5"], ["--scheme", "int9"]], ids=" ".join)
def test_unknown_arguments_of_the_command_line_set_the_exit_code(arguments, tmp_path, cli):
    save_file(dict(mlp().state_dict()), tmp_path / "in")
    code, out, _ = cli("quantize", "in", "-o", "out", *arguments)
    assert (code, out) == (2, "")
    assert os.listdir(tmp_path) == ["in"]


def test_every_listed_command_works(tmp_path, cli):
    save_file(dict(mlp().state_dict()), tmp_path / "in")
    listed = cli("--help")[1].partition("Commands:")[2].splitlines()
    names = {"quantize", "allocate", "inspect", "verify", "report", "convert", "completion"}
    assert {line.split()[0] for line in listed if line.strip()} == names
    for arguments in (
        ["quantize", "in", "-o", "out", "--scheme", "int4"],
        ["inspect", "out"],
        ["verify", "out"],
        ["report", "out", "-o", "page.html"],
        ["allocate", "in", "-o", "plan.json", "--min-sqnr", "20"],
        ["completion", "zsh"],
    ):
        code, _, err = cli(*arguments)
        assert (code, err) == (0, "")
    assert cli("--version")[1].split()[-1] == fewbits.__version__


# Costs.


class Counting(TorchDispatchMode):
    """Records the operations that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@every_scheme
def test_the_number_of_operations_in_a_forward_does_not_depend_on_the_layer_size(scheme):
    steps = []
    for size in (256, 1024):
        module = fewbits.quantize(nn.Linear(size, size), scheme).model
        with torch.no_grad(), Counting() as counting:
            module(torch.ones(2, size))
        steps.append(counting.names)
    assert steps[0] == steps[1]
    assert not [name for name in steps[0] if "_local_scalar_dense" in name]


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(512, 128)
        self.head = nn.Linear(128, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@every_scheme
def test_tied_weights_stay_tied_in_the_model_the_file_and_the_loaded_model(scheme, tmp_path):
    result = fewbits.quantize(TiedModel(), scheme, include=["head"])
    result.save(tmp_path / "f")
    once = MOST_BYTES[scheme] * TiedModel().head.weight.nbytes
    assert payload(tmp_path / "f") < 1.02 * once
    for model in (result.model, fewbits.load(tmp_path / "f", into=TiedModel())):
        assert sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) < 1.02 * once


# The package.

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in Path(fewbits.__file__).parent.rglob("*.py")}


def test_every_public_error_can_be_raised():
    """Abstract errors are raised through their subclasses."""
    called = {
        node.func.id for tree in TREES.values() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }  # fmt: skip
    errors = [
        value for value in vars(fewbits.errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(errors) > 10
    assert [error.__name__ for error in errors if error.__name__ not in called] == ["FewbitsError"]


def test_only_the_function_that_reports_missing_extras_imports_from_the_package():
    found = [
        (path.parent.name, path.name)
        for path, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("fewbits"))
    ]
    assert found == [("cli", "__init__.py")]


def test_the_library_contains_no_tests():
    names = [n.name for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert len(names) > 300
    assert not [name for name in names if name.startswith("test_")]
