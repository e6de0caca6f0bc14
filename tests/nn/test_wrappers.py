"""Models inside of something else: TorchScript, data parallel wrappers, compiled models, graphs."""

import functools

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, MismatchError, SourceError
from support.lifecycle_helpers import mlp, quantize_small

X = torch.linspace(-1, 1, 32).reshape(2, 16)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.inner(x))


def scripted():
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        return torch.jit.script(mlp())


def traced():
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        return torch.jit.trace(mlp(), X)


@pytest.fixture
def file(tmp_path):
    quantize_small(mlp()).save(path := tmp_path / "model.safetensors")
    return path


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [scripted, traced])
def test_a_torchscript_model_is_refused_with_what_to_take_instead(make, inplace, file):
    message = "the model is a TorchScript module .* pass the nn.Module that it was made from, before torch.jit.script"
    with pytest.raises(SourceError, match=message):
        quantize_small(make(), inplace=inplace)
    with pytest.raises(MismatchError, match=message):
        fewbits.load(file, into=make())
    with pytest.raises(SourceError, match=message):
        fewbits.plan(make(), "int8")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [scripted, traced])
def test_torchscript_inside_of_a_model_is_kept_with_the_reason(make, inplace):
    result = quantize_small(Outer(make()), inplace=inplace)
    assert result.ledger["head.weight"].fate == "quantized"
    assert result.ledger["inner.0.weight"].fate == "kept"
    assert "TorchScript modules cannot be changed" in result.ledger["inner.0.weight"].reason
    assert torch.equal(result.model.inner(X), mlp()(X))


@functools.cache
def process_group():
    """A group of this process alone, as DistributedDataParallel needs one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def data_parallel(model):
    return nn.DataParallel(model)


def distributed(model):
    process_group()
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture(scope="module", autouse=True)
def _leaves_the_process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        process_group.cache_clear()


@pytest.mark.parametrize("wrap", [data_parallel, distributed])
def test_a_data_parallel_wrapper_is_refused_and_its_module_is_not(wrap, file):
    wrapped = wrap(mlp())
    message = f"the model is wrapped in {type(wrapped).__name__}; pass model.module"
    for inplace in (False, True):
        with pytest.raises(SourceError, match=message):
            quantize_small(wrapped, inplace=inplace)
    with pytest.raises(MismatchError, match=message):
        fewbits.load(file, into=wrapped)
    assert torch.equal(quantize_small(wrapped.module).model(X), fewbits.load(file, into=mlp())(X))


def test_a_wrapper_inside_of_a_model_is_named():
    model = nn.ModuleDict({"encoder": Outer(nn.DataParallel(mlp()))})
    with pytest.raises(SourceError, match=r"^encoder\.inner is wrapped .*; put model\.encoder\.inner\.module in"):
        quantize_small(model)


def test_an_exported_program_is_refused():
    program = torch.export.export(mlp(), (X,))
    with pytest.raises(ArgumentError, match=r"ExportedProgram cannot be quantized; give an nn.Module.*torch.export"):
        quantize_small(program)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("make", [compiled, compiled_in_place, torch.fx.symbolic_trace])
def test_a_compiled_model_and_a_graph_compute_with_quantized_weights(make, ran, inplace):
    torch.compiler.reset()
    model = make(mlp())
    with torch.no_grad():
        if ran:
            model(X)
        quantized = quantize_small(model, inplace=inplace, compute="exact").model
        assert torch.equal(quantized(X), quantize_small(mlp(), compute="exact").model(X))


def test_a_file_that_names_tensors_as_a_compiled_model_does_is_loaded_into_one(tmp_path, file):
    quantize_small(compiled(mlp())).save(path := tmp_path / "compiled.safetensors")
    with pytest.raises(MismatchError, match=r"file was made from a compiled model: load into torch.compile\(model\)"):
        fewbits.load(path, into=mlp())
    with pytest.raises(MismatchError, match=r"the model is a compiled one: load into model\._orig_mod"):
        fewbits.load(file, into=compiled(mlp()))
    loaded = fewbits.load(path, into=compiled(mlp()), compute="exact")
    assert torch.equal(loaded(X), fewbits.load(file, into=compiled(mlp())._orig_mod, compute="exact")(X))


# Modules whose tensors get their shapes from the first input.

# Older versions of torch call them a new feature.
lazies = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

LAZY = {
    "LazyLinear": (lambda: nn.LazyLinear(32), lambda: nn.Linear(16, 32)),
    "LazyConv1d": (lambda: nn.LazyConv1d(32, 3), lambda: nn.Conv1d(16, 32, 3)),
    "LazyConv2d": (lambda: nn.LazyConv2d(32, 3), lambda: nn.Conv2d(16, 32, 3)),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(32, 3), lambda: nn.ConvTranspose1d(16, 32, 3)),
    "LazyBatchNorm1d": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.LazyBatchNorm1d(affine=False)),
        lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, affine=False)),
    ),
}


@lazies
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("kind", LAZY)
def test_a_file_is_not_loaded_into_a_lazy_module_that_was_never_run(kind, activations, device, tmp_path):
    lazy, run = LAZY[kind]
    quantize_small(run(), activations=activations).save(path := tmp_path / "model.safetensors")
    with torch.device(device):
        model = lazy()
    with pytest.raises(MismatchError, match=r"(weight|1\.running_mean) is not initialized in the model; run it once"):
        fewbits.load(path, into=model)


@lazies
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_module_that_was_never_run_is_not_quantized(kind, inplace):
    model = LAZY[kind][0]()
    with pytest.raises(SourceError, match=r"(weight|1\.running_mean) is not initialized; run the model once"):
        quantize_small(model, inplace=inplace)


@lazies
def test_a_lazy_module_is_loaded_into_after_it_was_run(tmp_path):
    quantize_small(nn.Conv1d(16, 32, 3), activations="dynamic").save(path := tmp_path / "model.safetensors")
    model = nn.LazyConv1d(32, 3)
    model(torch.ones(1, 16, 8))
    loaded = fewbits.load(path, into=model)
    assert torch.equal(loaded.weight_stored.value().codes(), fewbits.load(path)["weight"].codes())
