"""Fast layers where something else is going on: transforms, other threads, others who hold their memory."""

import collections
import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

import fewbits
from fewbits.kernels.packed_mm import Int8PackMM
from kernels.kernel_cases import normal

#: Forward mode of torch uses a function that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
SHAPE = 128, 128


def layer(scheme="int8", seed=0):
    torch.manual_seed(seed)
    return fewbits.quantize(nn.Linear(*SHAPE), scheme, validate=False).model


def squares(module):
    return lambda x: module(x).square().sum()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    "transformed",
    [
        lambda m: lambda x: jvp(m, (x,), (x,))[1],
        vmap,
        lambda m: grad(squares(m)),
        lambda m: vmap(grad(squares(m))),
    ],
    ids=["jvp", "vmap", "grad", "vmap of grad"],
)
@torch.no_grad()
def test_compiled_transforms_compute_as_eager_ones(scheme, transformed):
    function, x = transformed(layer(scheme)), normal(3, SHAPE[1])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_gradients_go_straight_through_rounded_inputs_under_every_transform(activations, compute):
    quantizer = fewbits.Int8PerChannel(activations=activations)
    quantizer.prepare(nn.Linear(*SHAPE))
    if activations == "static":
        quantizer.observe([normal(40, SHAPE[1])])
    module, x = quantizer.convert(compute=compute), normal(3, SHAPE[1])
    expected = grad(squares(module))(x)
    assert expected.norm() > 0
    torch.testing.assert_close(vmap(grad(squares(module)))(x), expected)
    torch.testing.assert_close(grad(lambda x: vmap(module)(x).square().sum())(x), expected)
    torch.testing.assert_close(jacfwd(module)(x[0]), jacrev(module)(x[0]))


@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_a_convolution_of_rounded_inputs_under_transforms(compute):
    quantizer = fewbits.Int8PerChannel(activations="dynamic")
    quantizer.prepare(nn.Conv2d(8, 16, 3))
    module, x = quantizer.convert(compute=compute), normal(2 * 8, 36).view(2, 8, 6, 6)
    assert torch.equal(vmap(module)(x), module(x))
    torch.testing.assert_close(grad(lambda x: vmap(module)(x).square().sum())(x), grad(squares(module))(x))


@pytest.mark.parametrize("rows", [1, 100])
@torch.no_grad()
def test_an_ensemble_of_stacked_weights(rows):
    modules, x = [layer(seed=seed) for seed in range(3)], normal(rows, SHAPE[1])
    params, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0])
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    for module, output in zip(modules, found, strict=True):
        fewbits.set_compute(module, "exact")
        torch.testing.assert_close(output, module(x))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_threads_that_change_the_layout_of_a_weight_change_no_output(scheme):
    module, x = layer(scheme), normal(20, SHAPE[1]).requires_grad_()
    before, good = {k: v.clone() for k, v in module.state_dict().items()}, module(x).detach()
    found, done = collections.Counter(), threading.Event()

    def change():
        while not done.is_set():
            fewbits.set_compute(module, "exact")
            fewbits.set_compute(module, "auto")

    def move():
        while not done.is_set():
            module.to("cpu")

    def compute():
        for turn in range(150):
            with torch.set_grad_enabled(turn % 2 == 0):
                near = (module(x).detach() - good).norm() < 0.02 * good.norm()
            same = all(torch.equal(part, before[key]) for key, part in module.state_dict().items())
            found[bool(near), same] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    others = [threading.Thread(target=change), threading.Thread(target=move)]
    try:
        for thread in others:
            thread.start()
        compute()
    finally:
        done.set()
        for thread in others:
            thread.join()
        sys.setswitchinterval(interval)
    assert found == {(True, True): 150}


def test_what_somebody_holds_of_a_failed_conversion_is_left_alone():
    model = nn.Sequential(nn.Linear(*SHAPE), nn.Linear(*SHAPE))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(model, inplace=True)
    with pytest.raises(fewbits.errors.NumericsError):
        quantizer.convert()
    held = model.state_dict()["0.weight_packed"]
    before = held.clone()
    with torch.no_grad():
        model[1].weight[0, 0] = 0
    quantizer.convert()
    assert torch.equal(held, before)


def test_what_a_replaced_method_holds_is_left_alone():
    quantizer, held = fewbits.Int8PerChannel(), []
    quantize = quantizer.quantize_tensor

    def quantize_tensor(*args):
        value = quantize(*args)
        held.append((value.packed, value.packed.clone()))
        return value

    quantizer.quantize_tensor = quantize_tensor
    quantizer.prepare(nn.Linear(*SHAPE))
    quantizer.convert()
    ((words, before),) = held
    assert torch.equal(words, before)


def test_kernels_of_one_name_are_not_taken_for_each_other():
    class Sevens(Int8PackMM):
        def linear(self, x, weight):
            return super().linear(x, weight) * 0 + 7

    plain, other, x = layer(), layer(), normal(1, SHAPE[1])
    fewbits.set_compute(other, "auto", (Sevens(),))
    expected = plain(x).detach()
    assert torch.equal(plain(x.clone().requires_grad_()).detach(), expected)
    torch.testing.assert_close(other(x.clone().requires_grad_()) - other.bias, torch.full((1, SHAPE[0]), 7.0))


def test_words_of_any_strides_are_loaded():
    module = layer("int4")
    turned = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in module.state_dict().items()}
    other = layer("int4", seed=1)
    other.load_state_dict(turned)
    assert torch.equal(other(normal(1, SHAPE[1])), module(normal(1, SHAPE[1])))


def test_a_state_dict_that_is_filled_again_has_the_new_codes():
    module, other = layer(), layer(seed=1)
    kept = collections.OrderedDict()
    kept._metadata = collections.OrderedDict()
    module.state_dict(destination=kept)
    module.load_state_dict(other.state_dict())
    module.state_dict(destination=kept)
    assert torch.equal(kept["weight_packed"], other.state_dict()["weight_packed"])


def test_a_choice_made_in_inference_mode_leaves_gradients_possible():
    module = layer()
    with torch.inference_mode():
        fewbits.set_compute(module, "exact")
        fewbits.set_compute(module, "auto")
    x = normal(2, SHAPE[1]).requires_grad_()
    module(x).sum().backward()
    assert x.grad.norm() > 0


@torch.no_grad()
def test_a_sparse_input():
    module = layer()
    x = torch.eye(SHAPE[1])
    fewbits.set_compute(module, "exact")
    expected = module(x)
    fewbits.set_compute(module, "auto")
    torch.testing.assert_close(module(x.to_sparse()), expected)


def test_an_embedding_in_tiles_is_read_whatever_the_default_device():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(256, 128), nn.Linear(128, 256, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, index):
            return self.head(self.embedding(index))

    model = fewbits.quantize(Tied(), fewbits.Int4Grouped(skip_types=()), validate=False).model
    index = torch.tensor([1, 2])
    expected = model(index)
    with torch.device("meta"):
        assert torch.equal(model(index), expected)
