"""A linear layer's forward: every input of torch's own layer, with the same numbers or the same error."""

import warnings

import pytest
import torch
from torch import nn

import fewbits
from fewbits.kernels.run import chosen
from kernels.kernel_cases import FLOAT8, INT4, INT8, NF4, any_words, exactly, linear, noise_db, normal, quantized

INPUTS = 128
SPECS = [
    INT8,
    INT4,
    fewbits.QuantSpec(bits=8, granularity="channel", activations="dynamic"),
    fewbits.QuantSpec(bits=8, granularity="channel", activations="static"),
    fewbits.QuantSpec(bits=6, granularity="channel"),
    NF4,
    FLOAT8,
]


@pytest.fixture(params=SPECS, ids=str)
def module(request):
    return quantized(linear(96, INPUTS), request.param)


def near(found, expected, least=45.0):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert noise_db(found.detach(), expected.detach()) >= least


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (1, 2, 1, 3), (300,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_inputs_of_any_shape_and_dtype(module, shape, dtype):
    x = normal(*shape, INPUTS, dtype=dtype)
    near(module(x), exactly(module)(x))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)], ids=str)
@torch.no_grad()
def test_inputs_without_rows(module, shape):
    assert module(normal(*shape, INPUTS)).shape == (*shape, 96)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (127,), (3, 129), (128, 3), (0, 64), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_of_another_size_raise_torch_s_own_error(module, shape, grad):
    x = normal(*shape).requires_grad_(grad)
    with pytest.raises(Exception) as expected:  # noqa: PT011, whatever it is
        exactly(module)(x)
    with pytest.raises(type(expected.value)) as found:
        module(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_dtypes_that_are_not_floating_raise_as_the_reference_does(module, dtype):
    x = torch.ones(3, INPUTS, dtype=dtype)
    try:
        expected = exactly(module)(x)
    except Exception as error:
        with pytest.raises(type(error)):
            module(x)
    else:
        assert torch.equal(module(x), expected)


@torch.no_grad()
def test_an_input_on_another_device_raises(module):
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.empty(3, INPUTS, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_bias_of_another_dtype(dtype):
    for spec in SPECS[:2]:
        module = quantized(linear(96, INPUTS), spec)
        x = normal(5, INPUTS, dtype=dtype)
        assert module.bias.dtype == torch.float32
        near(module(x), exactly(module)(x))


@torch.no_grad()
def test_a_parameter_as_input(module):
    x = nn.Parameter(normal(5, INPUTS))
    near(module(x), exactly(module)(x))


def test_gradients_are_those_of_the_dequantized_weight(module):
    for shape in [(), (5,), (2, 3), (300,)]:
        found, expected = (normal(*shape, INPUTS, seed=3).requires_grad_() for _ in range(2))
        grad = normal(*shape, 96, seed=4)
        output = module(found)
        near(output, exactly(module)(expected))
        output.backward(grad)
        exactly(module)(expected).backward(grad)
        near(found.grad, expected.grad, 60.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_narrow_inputs(module, dtype):
    found, expected = (normal(5, INPUTS, dtype=dtype).requires_grad_() for _ in range(2))
    module(found).square().sum().backward()
    exactly(module)(expected).square().sum().backward()
    near(found.grad, expected.grad, 40.0)


def test_a_bias_gets_its_gradient(module):
    module.bias.requires_grad_(True)
    for x in (normal(5, INPUTS), normal(5, INPUTS).requires_grad_()):
        module.bias.grad = None
        module(x).sum().backward()
        assert torch.equal(module.bias.grad, torch.full((96,), 5.0))


def test_a_layer_trained_beside_it_gets_its_gradient(module):
    """A low-rank adapter on a frozen base, and a layer before it."""
    before, down = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 4, bias=False)
    up, x = nn.Linear(4, 96, bias=False), normal(5, INPUTS)
    grads = []
    for base in (module, exactly(module)):
        for part in (before, down, up):
            part.zero_grad()
        hidden = before(x)
        (base(hidden) + up(down(hidden))).tanh().sum().backward()
        grads.append([part.weight.grad.clone() for part in (before, down, up)])
    for found, expected in zip(*grads, strict=True):
        near(found, expected, 25.0)


def test_gradients_of_gradients(module):
    results = []
    for base in (module, exactly(module)):
        x = normal(5, INPUTS).requires_grad_()
        (first,) = torch.autograd.grad(base(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append(second)
    near(*results, 30.0)


def test_inference_mode_leaves_nothing_behind(module):
    with torch.inference_mode():
        inside = module(normal(5, INPUTS))
    assert inside.is_inference()
    x = normal(5, INPUTS).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(module(normal(5, INPUTS)), inside)


def test_a_layer_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        module = quantized(linear(96, INPUTS), INT8)
        first = module(normal(5, INPUTS))
    with torch.no_grad():
        assert torch.equal(module(normal(5, INPUTS)), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_gives_its_own_dtype(module, dtype):
    x = normal(5, INPUTS)
    with torch.autocast("cpu", dtype=dtype):
        found, expected = module(x), exactly(module)(x)
    near(found, expected)
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert module(x).dtype == torch.float32


def test_autocast_with_gradients(module):
    grads = []
    for base in (module, exactly(module)):
        x = normal(5, INPUTS).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = base(x)
        output.float().square().sum().backward()
        grads.append(x.grad)
    near(*grads, 35.0)


@torch.no_grad()
def test_strides_do_not_matter(module):
    x = normal(40, INPUTS)
    expected = exactly(module)(x)
    near(module(x.t().contiguous().t()), expected)
    near(module(torch.stack([x, -x], 2)[..., 0]), expected)
    near(module(x[:1].expand(40, -1)), expected[:1].expand(40, -1).contiguous())
    near(module(x.view(5, 8, INPUTS).transpose(0, 1)), expected.view(5, 8, 96).transpose(0, 1))
    near(module(torch._neg_view(x)), exactly(module)(-x))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vmap over another axis": lambda f, x: torch.func.vmap(f, in_dims=1)(x),
    "vmap twice": lambda f, x: torch.func.vmap(torch.func.vmap(f))(x),
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).square().sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t).square().sum()))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(*x.shape[:-1], 96))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0, 0]),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[0, 0]),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).square().sum())(x[0, 0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("spec", [INT8, INT4], ids=str)
def test_transforms_of_functions(transform, spec):
    module, x = quantized(linear(96, INPUTS), spec), normal(4, 3, INPUTS)
    with warnings.catch_warnings():
        # Inside torch.func, on its way to a warning about something else.
        warnings.simplefilter("ignore", DeprecationWarning)
        found, expected = (TRANSFORMS[transform](base, x) for base in (module, exactly(module)))
    near(found, expected, 35.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch itself, at the first use of forward mode
def test_forward_mode(module):
    x, tangent = normal(5, INPUTS), normal(5, INPUTS, seed=9)
    with torch.autograd.forward_ad.dual_level():
        results = []
        for base in (module, exactly(module)):
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            results.append(torch.autograd.forward_ad.unpack_dual(base(dual)).tangent)
    near(*results, 45.0)


def test_functional_call_with_its_own_tensors(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        x = normal(5, INPUTS)
        assert torch.equal(torch.func.functional_call(module, tensors, (x,)), module(x))


@torch.no_grad()
def test_functional_call_with_other_tensors(module):
    other = quantized(linear(96, INPUTS), module.weight_stored.spec)
    for name, buffer in other.named_buffers():
        if name.endswith((".scale", ".table")):
            buffer.mul_(2)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    x = normal(5, INPUTS)
    found = torch.func.functional_call(module, tensors, (x,))
    near(found - module.bias, (module(x) - module.bias) * 2, 40.0)


def test_the_kernel_that_is_named_is_the_one_that_runs(module):
    for rows in (1, 300):
        kernel = chosen(normal(rows, INPUTS), module.weight_stored.prepared())
        if module.weight_stored.prepared().kernels:
            assert kernel in module.weight_stored.prepared().kernels
    assert chosen(normal(0, INPUTS), module.weight_stored.prepared()).name == "reference"
    assert chosen(normal(3, 5), module.weight_stored.prepared()).name == "reference"


@torch.no_grad()
def test_outputs_are_contiguous():
    for spec in (INT8, INT4):
        module = quantized(linear(90, INPUTS, bias=False), spec)
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 5, 300):
                x = normal(rows, INPUTS, dtype=dtype)
                assert module(x).view(-1).shape == (rows * 90,)


def test_words_of_any_weight_have_a_reference():
    words = any_words(fewbits.QuantSpec(bits=5, granularity="group", group_size=7), 9, 30)
    assert words.dequantize(torch.float32).shape == (9, 30)
