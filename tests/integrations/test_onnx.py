"""Quantized modules as ONNX files, run by ONNX Runtime and compared with torch."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.integrations.onnx import export
from fewbits.numerics.spec import QuantSpec
from support.lifecycle_helpers import small

#: Torch's exporter calls functions that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

#: The largest difference, relative to the largest output: ONNX Runtime adds float32 in another order.
CLOSE = 3e-6


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


class Layers(nn.Module):
    """Layers side by side: each reads the inputs that it can take."""

    def __init__(self, layers, inputs):
        super().__init__()
        self.layers, self.inputs = nn.ModuleList(layers).eval(), inputs

    def forward(self, *inputs):
        return tuple(layer(inputs[index]) for layer, index in zip(self.layers, self.inputs, strict=True))


class Chosen(fewbits.Quantizer):
    """Gives every weight one spec; rows that groups do not divide have a shorter last group."""

    def __init__(self, spec, **settings):
        self.spec = spec
        super().__init__(ragged="shorter", **settings)


def quantized(layer, kind, observed=None, **settings):
    quantizer = small(kind, **settings)
    quantizer.prepare(layer)
    if observed is not None:
        quantizer.observe([observed])
    return quantizer.convert()


def run(path, inputs, **options):
    """Return the outputs of ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, value in options.items():
        settings.add_session_config_entry(name.replace("__", "."), value)
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


def differences(found, expected):
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


@torch.no_grad()
def reference(model, inputs):
    fewbits.set_compute(model, "exact")
    expected = model(*inputs)
    fewbits.set_compute(model, "auto")
    return expected


def operators(path_or_model, onnx):
    return Counter(node.op_type for node in onnx.load(path_or_model).graph.node)


def groups(size, **fields):
    return QuantSpec(4, "group", group_size=size, **fields)


#: The spec of a layer, and its number of inputs.
INTEGERS = {
    "int4 groups of 128": (groups(128), 256),
    "int4 with zero points": (groups(32, symmetric=False), 160),
    "int4, a shorter last group": (groups(32), 100),
    "int4, a shorter last group of whole blocks": (groups(128), 160),
    "int4, groups of three blocks": (groups(48, symmetric=False), 192),
    "int4, one group for a whole row": (groups(64), 48),
    "int8 channels, one block": (QuantSpec(8, "channel"), 256),
    "int8 channels, several blocks": (QuantSpec(8, "channel"), 192),
    "int8 channels with zero points, padded": (QuantSpec(8, "channel", symmetric=False), 37),
    "int8, one scale": (QuantSpec(8, "tensor"), 100),
    "int4 with two levels of scales": (groups(32, scale_bits=6), 256),
    "int3": (QuantSpec(3, "group", group_size=64, symmetric=False), 256),
    "int5": (QuantSpec(5, "group", group_size=16), 192),
}


def integer_layers():
    torch.manual_seed(0)
    layers = [quantized(nn.Linear(width, 24), Chosen, spec=spec) for spec, width in INTEGERS.values()]
    widths = [layer.in_features for layer in layers]
    inputs = [torch.randn(3, width) for width in dict.fromkeys(widths)]
    indices = [list(dict.fromkeys(widths)).index(width) for width in widths]
    return Layers(layers, indices), inputs


def test_a_linear_layer_with_integer_codes_becomes_one_matmulnbits_with_the_same_output(tmp_path, onnx):
    model, inputs = integer_layers()
    expected = reference(model, inputs)
    torch.onnx.export(model, tuple(inputs), tmp_path / "model.onnx", dynamo=True, verbose=False)
    found = operators(tmp_path / "model.onnx", onnx)
    assert found["MatMulNBits"] == len(model.layers)
    assert set(found) <= {"MatMulNBits", "Add"}
    assert max(differences(run(tmp_path / "model.onnx", inputs), expected)) < CLOSE


def test_dequantize_linear_gives_the_same_output_with_standard_operators_only(tmp_path, onnx):
    model, inputs = integer_layers()
    expected = reference(model, inputs)
    path = tmp_path / "model.onnx"
    export(model, tuple(inputs), path, operator="DequantizeLinear", external_data=False, verbose=False)
    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert [(opset.domain, opset.version) for opset in written.opset_import] == [("", 21)]
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in written.graph.initializer}
    position = {name: f"layers.{index}" for index, name in enumerate(INTEGERS)}
    assert types[f"{position['int4 groups of 128']}.weight"] == "INT4"
    assert types[f"{position['int4 with zero points']}.weight_zero_point"] == "INT4"
    assert types[f"{position['int8 channels, one block']}.weight"] == "INT8"
    assert "UINT8" not in types.values()
    found = run(path, inputs, session__qdq_matmulnbits_accuracy_level="0")
    assert max(differences(found, expected)) < CLOSE


@pytest.mark.slow
def test_every_other_weight_is_decoded_by_the_graph(tmp_path, onnx):
    torch.manual_seed(0)
    layers = [
        fewbits.quantize(nn.Linear(128, 24), "nf4").model,
        fewbits.quantize(nn.Linear(128, 24), "fp8").model,
        fewbits.quantize(nn.Linear(128, 24), "fp16").model,
        quantized(nn.Linear(96, 8), Chosen, spec=groups(24)),
        quantized(nn.Conv2d(4, 8, 3), fewbits.Int8PerChannel),
        quantized(nn.ConvTranspose2d(4, 8, 3), Chosen, spec=groups(16, symmetric=False)),
        quantized(nn.Embedding(20, 48), fewbits.Int8PerChannel),
        quantized(nn.Embedding(20, 128), Chosen, spec=groups(128)),
        quantized(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), fewbits.Int8PerChannel),
    ]
    inputs = [torch.randn(3, 128), torch.randn(3, 96), torch.randn(2, 4, 6, 6), torch.arange(20).view(4, 5)]
    inputs.append(torch.randn(2, 5, 32))
    model = Layers(layers, [0, 0, 0, 1, 2, 2, 3, 3, 4])
    expected = reference(model, inputs)
    torch.onnx.export(model, tuple(inputs), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert max(differences(run(tmp_path / "model.onnx", inputs), expected)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_layers_round_their_inputs_as_they_do_in_torch(tmp_path, onnx, activations):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 128), torch.randn(2, 4, 6, 6)]
    layers = [nn.Linear(128, 24), nn.Conv2d(4, 8, 3)]
    observed = inputs if activations == "static" else [None, None]
    layers = [
        quantized(layer, fewbits.Int8PerChannel, x, activations=activations)
        for layer, x in zip(layers, observed, strict=True)
    ]
    model = Layers(layers, [0, 1])
    expected = reference(model, inputs)
    torch.onnx.export(model, tuple(inputs), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert max(differences(run(tmp_path / "model.onnx", inputs), expected)) < CLOSE


class Repeated(nn.Module):
    """Calls one layer three times, and another layer that shares its weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.other.weight = self.layer.weight

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.other(x)


def test_a_weight_is_written_once_under_the_name_of_its_layer(tmp_path, onnx):
    torch.manual_seed(0)
    model = fewbits.quantize(Repeated(), "int8").model
    program = export(model, (torch.randn(2, 64),), tmp_path / "model.onnx", external_data=False, verbose=False)
    codes = [tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if len(tensor.dims) == 3]
    assert codes == ["layer.weight"]
    assert "layer.weight_scale" in program.model.graph.initializers


@pytest.mark.slow
def test_a_batch_of_another_size_runs_through_a_graph_with_a_dynamic_axis(tmp_path, onnx):
    torch.manual_seed(0)
    model = fewbits.quantize(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)), "int4").model
    shapes = ({0: torch.export.Dim("batch")},)
    path = tmp_path / "model.onnx"
    export(model, (torch.randn(2, 64),), path, dynamic_shapes=shapes, accuracy_level=1, verbose=False)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert all({"accuracy_level": 1}.items() <= {a.name: a.i for a in node.attribute}.items() for node in nodes)
    x = torch.randn(7, 64)
    assert max(differences(run(path, [x]), [reference(model, [x])])) < CLOSE


@pytest.mark.slow
def test_a_block_of_a_transformers_model_runs_with_the_outputs_of_torch(tmp_path, onnx):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(1, 6, 64)
    cos, sin = rotary(hidden, torch.arange(6)[None])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, hidden, cos, sin):
            found = self.block(hidden, position_embeddings=(cos, sin))
            return found if isinstance(found, torch.Tensor) else found[0]

    model, inputs = fewbits.quantize(Block(), "int4").model, [hidden, cos, sin]
    expected = reference(model, inputs)
    export(model, tuple(inputs), tmp_path / "model.onnx", verbose=False)
    assert operators(tmp_path / "model.onnx", onnx)["MatMulNBits"] == 7
    assert max(differences(run(tmp_path / "model.onnx", inputs), [expected])) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "QLinearMatMul"}, "operator must be 'MatMulNBits' or 'DequantizeLinear'"),
        ({"accuracy_level": 5}, "accuracy_level must be 0 to 4"),
        ({"accuracy_level": 4, "operator": "DequantizeLinear"}, "needs operator 'MatMulNBits'"),
        ({"dynamo": False}, "the exporter of TorchScript"),
        ({"operator": "DequantizeLinear", "opset_version": 20}, "from opset 21 on, not in opset 20"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    model = fewbits.quantize(nn.Linear(64, 16), "int8").model
    with pytest.raises(ArgumentError, match=message):
        export(model, (torch.ones(1, 64),), **arguments)


def test_a_model_that_cannot_be_written_is_refused():
    with pytest.raises(ArgumentError, match="no layer of this model is quantized"):
        export(nn.Linear(4, 4), (torch.ones(1, 4),))
    with pytest.raises(ArgumentError, match="not a str"):
        export("model")
    with pytest.raises(ArgumentError, match="float8_e8m0fnu, the dtype of the scales of weight; quantize to nf4"):
        export(fewbits.quantize(nn.Linear(64, 16), "mxfp4").model, (torch.ones(1, 64),))


def test_a_missing_package_is_named(monkeypatch):
    model = fewbits.quantize(nn.Linear(64, 16), "int8").model
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ArgumentError, match=r"needs onnxscript: pip install 'fewbits\[onnx\]'"):
        export(model, (torch.ones(1, 64),))
