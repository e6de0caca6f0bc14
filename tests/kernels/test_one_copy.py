"""A private layout takes the place of the canonical codes, and gives them back exactly, at any time, to anybody."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fewbits
from fewbits import QuantSpec
from fewbits.kernels import features
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.numerics.tensor import same_bits
from kernels.kernel_cases import INT4, INT8, Of, exactly, linear, noise_db, normal, quantized

SPECS = [
    INT8,
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="group", group_size=64, symmetric=False),
    INT4,
    QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False),
    QuantSpec(bits=8, granularity="channel", activations="static"),
    QuantSpec(bits=6, granularity="group", group_size=32),
]
SHAPE = 100, 130


@pytest.fixture(params=SPECS, ids=str)
def module(request):
    return quantized(linear(*SHAPE), request.param)


@pytest.fixture
def state(module):
    """The canonical layout."""
    return canonical(exactly(module))


def canonical(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def alike(found, expected):
    return found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)


def held(module):
    return {name: tensor for name, tensor in module.weight_stored._buffers.items() if tensor is not None}


def stored_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


def test_the_canonical_words_go(module):
    fewbits.set_compute(module, "exact")
    words = weakref.ref(held(module)["packed"])
    fewbits.set_compute(module, "auto")
    gc.collect()
    kept = module.weight_stored.weight_layout().name == "packed_int32"
    assert (words() is not None) == kept
    assert ("packed" in held(module)) == kept


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (INT8, 1.01),
        (QuantSpec(bits=4, granularity="group", group_size=128), 1.1),
        (QuantSpec(bits=4, granularity="group", group_size=32), 1.25),
    ],
    ids=str,
)
def test_a_layout_takes_little_more_than_the_codes(spec, most):
    module = quantized(linear(512, 1024), spec)
    assert stored_bytes(held(module)) <= most * stored_bytes(held(exactly(module)))


def test_parameters_and_buffers_are_never_float_weights(module):
    with torch.no_grad():
        for rows in (1, 40, 200):
            module(normal(rows, SHAPE[1]))
    module(normal(3, SHAPE[1]).requires_grad_()).sum().backward()
    gc.collect()
    tensors = [*module.parameters(), *module.buffers()]
    assert not any(tensor.is_floating_point() and tensor.shape == SHAPE for tensor in tensors)
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and tuple(t.shape) == SHAPE]
    assert not [t for t in alive if t.is_floating_point()]


def test_state_dict(module, state):
    assert alike(module.state_dict(), state)
    assert alike(module.state_dict(keep_vars=True), state)
    assert alike({k.removeprefix("a."): v for k, v in nn.ModuleDict({"a": module}).state_dict().items()}, state)


def test_a_state_dict_is_a_copy_of_a_private_layout(module, state):
    """Changes of a copy do not reach the layer."""
    taken = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        before = module(normal(3, SHAPE[1]))
        for tensor in taken.values():
            tensor.zero_()
        assert torch.equal(module(normal(3, SHAPE[1])), before)


@pytest.mark.parametrize("compute", ["auto", "exact", "int8"])
def test_copies_and_pickles(module, state, compute):
    fewbits.set_compute(module, compute)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    made = {
        "deepcopy": copy.deepcopy(module),
        "copy": copy.copy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for storage_spec, other in made.items():
        assert alike(other.state_dict(), state), storage_spec
        assert other.weight_stored.compute == compute
        assert type(other.weight_stored.weight_layout()) is type(module.weight_stored.weight_layout())
        with torch.no_grad():
            for rows in (1, 40):
                assert torch.equal(other(normal(rows, SHAPE[1])), module(normal(rows, SHAPE[1]))), storage_spec


def test_a_pickle_holds_the_canonical_layout_alone(module):
    assert abs(len(pickle.dumps(module)) - len(pickle.dumps(exactly(module)))) < 200


def test_a_pickle_takes_the_layout_that_suits_the_cpu_that_reads_it(monkeypatch):
    module = quantized(linear(*SHAPE), INT4)
    data, state = pickle.dumps(module), module.state_dict()
    for width in features.WIDTHS:
        monkeypatch.setattr(features, "tile_width", lambda width=width: width)
        other = pickle.loads(data)
        layout = other.weight_stored.weight_layout()
        assert isinstance(layout, Int4Tiles)
        assert layout.width == width
        assert alike(other.state_dict(), state)
    monkeypatch.setattr(features, "tile_width", lambda: None)
    assert pickle.loads(data).weight_stored.weight_layout().name == "packed_int32"


def test_a_changed_dtype_changes_no_stored_tensor(module, state):
    for change in (lambda m: m.to(torch.float16), lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.float()):
        other = change(copy.deepcopy(module))
        stored = {name: tensor for name, tensor in other.state_dict().items() if name != "bias"}
        assert alike(stored, {name: tensor for name, tensor in state.items() if name != "bias"})
        x = normal(5, SHAPE[1], dtype=other.bias.dtype)
        with torch.no_grad():
            assert other(x).dtype == x.dtype
            assert noise_db(other(x), module(x.float())) > 25
        assert other.weight.dtype == x.dtype


def test_the_meta_device_and_back(module, state):
    other = copy.deepcopy(module).to("meta")
    found = other.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert other(torch.empty(3, SHAPE[1], device="meta")).shape == (3, SHAPE[0])
    other.load_state_dict(state, assign=True)
    assert alike(other.state_dict(), state)
    with torch.no_grad():
        for rows in (1, 40):
            # The same kernels compute after the way to the meta device and back.
            assert torch.equal(other(normal(rows, SHAPE[1])), module(normal(rows, SHAPE[1])))
    assert type(other.weight_stored.weight_layout()) is type(module.weight_stored.weight_layout())


def test_to_empty_and_load(module, state):
    other = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    for buffer in other.buffers():
        buffer.zero_()  # uninitialized memory can hold any number, even a scale of zero
    copy.deepcopy(other).load_state_dict(state)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(normal(5, SHAPE[1])), module(normal(5, SHAPE[1])))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_loading_other_codes(module, assign, compute):
    torch.manual_seed(99)
    source = quantized(nn.Linear(*reversed(SHAPE)), module.weight_stored.spec, compute)
    target = copy.deepcopy(module)
    with torch.no_grad():
        target(normal(1, SHAPE[1]))
        target.load_state_dict(source.state_dict(), assign=assign)
        assert alike(target.state_dict(), source.state_dict())
        fewbits.set_compute(source, "auto")
        for rows in (1, 40, 200):
            assert torch.equal(target(normal(rows, SHAPE[1])), source(normal(rows, SHAPE[1])))
    assert same_bits(target.weight, source.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_does_not_fit_changes_nothing(module, state, assign):
    other = quantized(linear(*SHAPE), QuantSpec(bits=3, granularity="channel")).state_dict()
    with pytest.raises(RuntimeError):
        module.load_state_dict(other, assign=assign)
    assert alike(
        {k: v for k, v in module.state_dict().items() if k != "bias"}, {k: state[k] for k in state if k != "bias"}
    )


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_model_from_a_file(module, tmp_path, assign):
    """The scales of a loaded model alias the file, or did: tensors derived from them have to follow."""
    spec = module.weight_stored.spec
    data = [normal(64, SHAPE[1])] if spec.activations == "static" else None
    fewbits.quantize(linear(*SHAPE), Of(spec), data=data, validate=False).save(tmp_path / "file")
    loaded = fewbits.load(tmp_path / "file", into=linear(*SHAPE))
    torch.manual_seed(98)
    source = quantized(nn.Linear(*reversed(SHAPE)), spec)
    with torch.no_grad():
        assert torch.equal(loaded(normal(3, SHAPE[1])), quantized(linear(*SHAPE), spec)(normal(3, SHAPE[1]))) or data
        loaded.load_state_dict(source.state_dict(), assign=assign)
        for rows in (1, 40):
            assert torch.equal(loaded(normal(rows, SHAPE[1])), source(normal(rows, SHAPE[1])))


def test_the_weight_is_that_of_the_codes(module):
    assert same_bits(module.weight, exactly(module).weight)
    assert same_bits(module.weight, module.weight_stored.value().dequantize())
    assert same_bits(fewbits.dequantize(module).weight.detach(), exactly(module).weight)


def test_files_are_the_same_under_every_setting(tmp_path):
    data = set()
    for compute in ("auto", "exact", "int8"):
        model = nn.Sequential(linear(*SHAPE), linear(64, 100))
        fewbits.quantize(model, Of(INT4), compute=compute, validate=False).save(tmp_path / compute)
        data.add((tmp_path / compute).read_bytes())
    assert len(data) == 1


def test_back_and_forth_has_the_same_bits(module, state):
    x, seen = normal(40, SHAPE[1]), {}
    with torch.no_grad():
        for compute in ("auto", "exact", "int8", "exact", "auto", "int8", "auto"):
            fewbits.set_compute(module, compute)
            assert torch.equal(seen.setdefault(compute, module(x)), module(x))
            assert alike(module.state_dict(), state)


def test_memory_can_be_shared_with_other_processes(module, state):
    module.share_memory()
    assert all(tensor.is_shared() for tensor in module.buffers())
    assert alike(module.state_dict(), state)
    with torch.no_grad():
        assert noise_db(module(normal(5, SHAPE[1])), exactly(module)(normal(5, SHAPE[1]))) > 30


def in_threads(*tasks):
    """Run functions at the same time; the first error is raised."""
    barrier = threading.Barrier(len(tasks))

    def run(task):
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def test_eight_threads_read_while_others_compute(module, state):
    x = normal(3, SHAPE[1])
    with torch.no_grad():
        expected = module(x)

    def compute():
        with torch.inference_mode():
            return all(torch.equal(module(x), expected) for _ in range(30))

    def read():
        return all(alike(module.state_dict(), state) for _ in range(10))

    def duplicate():
        return all(alike(copy.deepcopy(module).state_dict(), state) for _ in range(5))

    assert all(in_threads(*[read] * 8, *[compute] * 4, duplicate))


def test_a_forward_goes_on_while_the_setting_changes():
    module = quantized(linear(*SHAPE), INT8)
    x, done = normal(3, SHAPE[1]), threading.Event()
    known = []
    with torch.no_grad():
        for compute in ("exact", "auto"):
            fewbits.set_compute(module, compute)
            known.append(module(x))

    def compute():
        with torch.inference_mode():
            while not done.is_set():
                output = module(x)
                if not any(torch.equal(output, expected) for expected in known):
                    return False
        return True

    def change():
        try:
            for _ in range(400):
                fewbits.set_compute(module, "exact")
                fewbits.set_compute(module, "auto")
        finally:
            done.set()
        return True

    # Threads take turns as often as can be.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert all(in_threads(compute, compute, change))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Conv2d(8, 16, 3, bias=False), torch.ones(1, 8, 4, 4)), (nn.Embedding(20, 8), torch.arange(20))],
    ids=["Conv2d", "Embedding"],
)
@torch.no_grad()
def test_a_layer_sees_scales_whose_data_was_replaced(layer, x):
    """As FullyShardedDataParallel does with all buffers."""
    layer = quantized(layer, INT8)
    before, scale = layer(x), layer.weight_stored.scale
    scale.data = 2 * scale.data
    assert layer.weight_stored.weight_layout().name == "plain_int8"
    assert torch.equal(layer(x), 2 * before)
