"""One layer as one operation: its fake and its gradient match its output."""

import json
from urllib.parse import unquote

import attrs
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fewbits
from fewbits import QuantSpec
from fewbits.kernels import blocks, features, ops
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.choose import KERNELS
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.testing.kernel_outputs import exact
from kernels.kernel_cases import (
    BY_NAME,
    FLOAT8,
    INT4,
    INT8,
    NF4,
    any_words,
    exactly,
    linear,
    noise_db,
    normal,
    quantized,
)

DYNAMIC8 = QuantSpec(bits=8, granularity="channel", activations="dynamic")
SPECS = [
    INT8,
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel", symmetric=False),
    QuantSpec(bits=8, granularity="group", group_size=64),
    INT4,
    QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False),
    DYNAMIC8,
    QuantSpec(bits=8, granularity="channel", activations="static"),
    QuantSpec(bits=6, granularity="group", group_size=64, symmetric=False),
    NF4,
    FLOAT8,
]


LAYOUTS = PackedInt32, Int8Rows, BytePairs, Int4Tiles


def layouts_of(words):
    """The weight in every layout that can hold it."""
    yield from (layout.of(words) for layout in LAYOUTS if layout.refuses(words) is None)


def arguments(layout, compute="auto"):
    return list(layout.tensors().values()), ops.describe(layout, compute, KERNELS)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (1,), (200,), (2, 3)], ids=str)
def test_the_operation_is_what_it_says(spec, dtype, rows):
    """Odd sizes: the padding of a kernel must not show. Shapes, strides and aliases are compared with the fake's."""
    for layout in layouts_of(any_words(spec, 100, 130)):
        x = normal(*rows, 130, dtype=dtype)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.fewbits.linear.default, (x, *arguments(layout)), test_utils=tests)


@pytest.mark.parametrize("spec", [INT8, INT4, SPECS[-1]], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_operation_can_be_differentiated_and_traced(spec):
    for layout in layouts_of(any_words(spec, 100, 130)):
        x = normal(5, 130).requires_grad_()
        for operation in (torch.ops.fewbits.linear, torch.ops.fewbits.compiled_linear):
            torch.library.opcheck(operation.default, (x, *arguments(layout)))


@pytest.mark.parametrize("spec", [INT8, INT4, SPECS[-1]], ids=str)
def test_the_gradient_is_an_operation_too(spec):
    for layout in layouts_of(any_words(spec, 100, 130)):
        x, grad = normal(2, 5, 130), normal(2, 5, 100)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(
            torch.ops.fewbits.linear_gradient.default, (grad, x, *arguments(layout)), test_utils=tests
        )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_the_operation_has_the_bits_of_the_layer(spec):
    module = quantized(linear(100, 130, bias=False), spec)
    stored = module.weight_stored
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 20, 200):
            x = normal(rows, 130, dtype=dtype)
            found = torch.ops.fewbits.linear(x, stored.prepared().tensors, stored.prepared().description)
            assert found.dtype == torch.float32
            assert torch.equal(found.to(dtype), module(x))
    assert torch.ops.fewbits.linear(normal(0, 130), stored.prepared().tensors, stored.prepared().description).shape == (
        0,
        100,
    )


@pytest.mark.parametrize("names", [["int4pack_mm"], ["tile_blocks"], []], ids=str)
@torch.no_grad()
def test_the_operation_chooses_from_the_kernels_that_the_layer_has(names):
    module = quantized(linear(100, 130, bias=False), INT4)
    fewbits.set_compute(module, "auto", [BY_NAME[name] for name in names])
    for rows in (1, 200):
        expected = module(normal(rows, 130))
        with torch.enable_grad():
            found = module(normal(rows, 130).requires_grad_())
        assert torch.equal(found, expected)


def test_a_description_is_plain_text_without_the_weight():
    layout = Int8Rows.of(any_words(INT8, 100, 130))
    fields = json.loads(unquote(ops.describe(layout, "auto", KERNELS)))
    assert fields["weight_layout"] == "int8_rows"
    assert fields["tensors"] == ["signed", "scale"]
    assert QuantSpec.__name__ not in json.dumps(fields)


@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_tiles_of_another_instruction_set_are_computed_right(symmetric, monkeypatch):
    """A program that was exported on a CPU with another width of tiles."""
    own = features.tile_width()
    words, x = any_words(attrs.evolve(INT4, symmetric=symmetric), 130, 192), normal(200, 192)
    for width in features.WIDTHS:
        monkeypatch.setattr(features, "tile_width", lambda width=width: width)
        layout = Int4Tiles.of(words)
        assert layout.width == width
        monkeypatch.setattr(features, "tile_width", lambda: own)
        for rows in (1, 3, 200):
            found = torch.ops.fewbits.linear(x[:rows], *arguments(layout))
            assert noise_db(found, exact(words, x[:rows], rounds=False)[0]) > 45
            if width != own:
                assert BY_NAME["int4pack_mm"].supports(layout) is not None


@torch.no_grad()
def test_layouts_that_this_cpu_would_not_choose_are_computed_right(monkeypatch):
    """Of a program that was exported where kernels were others."""
    for spec in (INT8, INT4):
        words, x = any_words(spec, 130, 192), normal(60, 192)
        described = [(layout, arguments(layout)) for layout in layouts_of(words)]
        for name in ("has_bf16", "has_int8pack", "tile_width", "int_mm_is_exact", "has_vnni"):
            monkeypatch.setattr(features, name, lambda: None)
        for layout, given in described:
            found = torch.ops.fewbits.linear(x, *given)
            assert noise_db(found, exact(words, x, rounds=False)[0]) > 45, layout.name
        monkeypatch.undo()


# Whole models; compilers are slow.


class Block(nn.Module):
    """Layers in several layouts, with a residual and a reshape between them."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = linear(96, 64), linear(64, 96, bias=False), linear(70, 64)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x).unflatten(-1, (7, 10)).flatten(-2)


@pytest.fixture(params=[INT8, INT4, DYNAMIC8, NF4], ids=str)
def block(request):
    torch._dynamo.reset()
    yield quantized(Block(), request.param)
    torch._dynamo.reset()


compiler = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@compiler
@torch.no_grad()
def test_a_graph_for_many_rows_holds_one_operation_for_a_layer(block):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for rows in (60, 61, 200):
        x = normal(rows, 64)
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("fewbits" in name for name in called) == 3


@pytest.fixture(params=[INT8, INT4, NF4, FLOAT8, DYNAMIC8], ids=str)
def layer(request):
    """A layer with a kernel for few rows, where this CPU has one."""
    torch._dynamo.reset()
    yield quantized(linear(256, 256), request.param)
    torch._dynamo.reset()


def _operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def _backend(graphs):
    """A backend that gets what inductor gets, and tells of each graph whether it holds the operation of a layer."""

    def record(graph, _):
        graphs.append(any("fewbits" in name for name in _operations(graph)))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=record)


def _is_taken_apart(layer):
    """Whether a compiler sees the operations of a kernel, of few rows."""
    held = layer.weight_stored.prepared()
    # Torch before 2.7 cannot tell compilation from an export; nothing is taken apart then.
    return any(kernel.traced_rows(held.weight) for kernel in held.kernels) and hasattr(torch.compiler, "is_exporting")


@compiler
@torch.no_grad()
def test_few_rows_compile_to_operations_of_torch(layer):
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=_backend(graphs))
    for rows in (1, 2, 3, 5, 100, 200, 1, 4, 150):
        x = normal(rows, 256)
        found, expected = compiled(x), layer(x)
        # A compiled product of one row with 8 bits is in float32.
        assert torch.equal(found, expected) or (rows == 1 and noise_db(found, expected) > 50)
    # One graph for one row, as in decoding, and one for any other number.
    assert graphs == [not _is_taken_apart(layer), True]


@compiler
@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch before 2.7 traces nothing")
@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("spec", [INT8, attrs.evolve(INT8, symmetric=False), attrs.evolve(INT8, granularity="tensor")])
@torch.no_grad()
def test_many_rows_of_a_small_layer_compile_to_operations_of_torch(spec, has_bf16, monkeypatch):
    monkeypatch.setattr(features, "has_bf16", lambda: has_bf16)
    torch.compiler.reset()
    layer, graphs = quantized(linear(256, 256), spec), []
    backend = _backend(graphs)
    x = normal(3, 40, 256)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    assert graphs == [False]
    torch.compiler.reset()
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    other = quantized(linear(256, 256), spec)
    assert torch.equal(torch.compile(other, fullgraph=True, backend=backend)(x), other(x))
    assert graphs == [False, True]


@compiler
@torch.no_grad()
def test_compiled_layers_that_may_round_inputs_round_them_as_eager_ones_do():
    layer = quantized(linear(256, 256), INT8)
    fewbits.set_compute(layer, "int8")
    for rows in (3, 100):
        torch.compiler.reset()
        x = normal(rows, 256)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@compiler
@torch.no_grad()
def test_numbers_of_rows_that_the_compiler_does_not_know_are_not_compared(layer):
    x = normal(5, 256)
    torch._dynamo.mark_dynamic(x, 0, min=1, max=1024)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    unbacked = normal(5, 256)
    torch._dynamo.decorators.mark_unbacked(unbacked, 0)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(unbacked), layer(unbacked))


@compiler
@torch.no_grad()
def test_layers_with_different_limits_make_no_more_graphs_than_one():
    torch._dynamo.reset()
    model, graphs = nn.Sequential(quantized(linear(256, 256), INT4), quantized(linear(256, 256), INT8)), []
    compiled = torch.compile(model, fullgraph=True, backend=_backend(graphs))
    for shape in ((1, 1), (1, 5), (2, 7), (3, 20), (2, 30), (4, 100)):
        x = normal(*shape, 256)
        found, expected = compiled(x), model(x)
        assert torch.equal(found, expected) or (shape == (1, 1) and noise_db(found, expected) > 50)
    assert len(graphs) <= 4  # as many as for a float layer


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("turned", [lambda y: y.flatten(2).mT * 2, lambda y: (y.permute(0, 2, 3, 1) + 1)[0, 0]])
@torch.no_grad()
def test_inductor_keeps_inputs_in_the_order_that_the_products_read(layer, turned):
    y = normal(1, 256, 3, 3)
    found = torch.compile(lambda y: layer(turned(y)))(y)
    assert noise_db(found, layer(turned(y))) > 50


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_the_one_operation(layer, strict):
    program = torch.export.export(layer, (normal(2, 256),), strict=strict)
    assert "fewbits.linear" in str(program.graph)
    assert "fewbits.linear" in str(program.run_decompositions().graph)


STATIC8 = QuantSpec(bits=8, granularity="channel", activations="static")


@compiler
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("spec", [INT8, INT4, DYNAMIC8, STATIC8], ids=str)
def test_gradients_of_compiled_layers_are_those_of_eager_layers(spec, rows):
    torch.compiler.reset()
    layer, graphs = quantized(linear(256, 256), spec), []
    x, y = (normal(rows, 256).requires_grad_() for _ in range(2))
    torch.compile(layer, fullgraph=True, backend=_backend(graphs))(x).square().sum().backward()
    layer(y).square().sum().backward()
    assert noise_db(x.grad, y.grad) > 45
    assert graphs == [not _is_taken_apart(layer), True]  # the gradient is one operation


@pytest.mark.parametrize("operation", [ops.linear, ops.compiled_linear])
def test_operations_refuse_inputs_of_another_width(operation):
    layout = Int8Rows.of(any_words(INT8, 100, 130))
    with pytest.raises(RuntimeError, match="rows of 130"):
        operation(normal(2, 131), *arguments(layout))


@compiler
def test_a_compiled_layer_refuses_inputs_of_another_width(layer):
    with pytest.raises(RuntimeError, match="rows of 256"):
        torch.compile(layer, backend="eager")(normal(2, 255))


@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_descriptions_can_be_written_into_c(weight_layout):
    words = next((w for w in (any_words(spec, 128, 256) for spec in SPECS) if weight_layout.refuses(w) is None), None)
    if words is None:
        pytest.skip(f"this torch has no {weight_layout.name}")
    description = ops.describe(weight_layout.of(words), "auto", KERNELS)
    assert not {'"', "\\", "\n"} & set(description)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("options", [{"dynamic": True}, {"mode": "max-autotune"}, {"options": {"cpp_wrapper": True}}])
@torch.no_grad()
def test_inductor_compiles_few_and_many_rows(layer, options):
    compiled = torch.compile(layer, fullgraph=True, **options)
    for rows in (1, 3, 100):
        x = normal(rows, 256)
        assert noise_db(compiled(x), layer(x)) > 50


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_compute_the_same(block, dtype):
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    block.to(dtype)
    with torch.no_grad():
        for rows in (2, 3, 60, 200):
            x = normal(rows, 64, dtype=dtype)
            assert noise_db(compiled(x), block(x)) > (100 if dtype == torch.float32 else 40)
    x, y = (normal(5, 64, dtype=dtype).requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    block(y).square().sum().backward()
    assert noise_db(x.grad, y.grad) > (80 if dtype == torch.float32 else 30)


@compiler
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@torch.no_grad()
def test_exported_programs_compute_the_same_when_they_are_loaded_again(block, strict, tmp_path):
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(block, (normal(8, 64),), dynamic_shapes=({0: rows},), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for count in (2, 60, 200):
        x = normal(count, 64)
        assert torch.equal(loaded(x), block(x))
        assert noise_db(loaded(x), exactly(block)(x)) > 30


@compiler
@torch.no_grad()
def test_exported_programs_do_not_hold_float_weights(tmp_path):
    module = quantized(linear(512, 512, bias=False), INT8)
    torch.export.save(torch.export.export(module, (normal(8, 512),)), tmp_path / "program.pt2")
    assert (tmp_path / "program.pt2").stat().st_size < 1.5 * 512 * 512


@compiler
@torch.no_grad()
def test_what_was_exported_in_the_exact_setting_is_the_reference(block, tmp_path):
    plain = exactly(block)
    program = torch.export.export(plain, (normal(8, 64),))
    assert "fewbits" not in str(program.graph)
    assert torch.equal(program.module()(normal(8, 64)), plain(normal(8, 64)))
