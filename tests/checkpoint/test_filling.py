"""Loading a tensor at a time: onto a device, within a bound on memory, and the state of the model after a failure."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Reader, Serializer
from fewbits.errors import ArgumentError, CheckpointError, SourceError
from nn.cases import Mixed, Tied, same_bits, same_state, seeded, snapshot, tensors_in
from support.checkpoints import forged_tensor
from support.lifecycle_helpers import small

MB = 10**6
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
NOWHERE = ["nonsense", "", "cpu:x", "meta", torch.device("meta"), -1, 1.5, [], "xla"]
NOWHERE += [] if torch.cuda.is_available() else ["cuda", "cuda:0", torch.device("cuda", 1)]


class Wide(nn.Module):
    """Layers that take a form of their own, tied and not, beside tensors that are kept and a buffer of no file."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.norm = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 160, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 128), persistent=False)
        self.register_buffer("again", self.shift, persistent=False)

    def forward(self, ids):
        x = self.embed(ids) + self.shift
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


IDS = torch.arange(160).view(2, 80)


def on_meta():
    """The model on the meta device, but for the buffer that no state dict holds."""
    with torch.device("meta"):
        model = Wide()
    model.shift = model.again = torch.linspace(0, 1, 128)
    return model


def saved(path, scheme):
    """A result in several files, made from a state dict: the buffers that no state dict holds are not in them."""
    source = seeded(Wide).eval()
    source.norm.running_var.uniform_(0.5, 2)
    fewbits.quantize(dict(source.state_dict()), scheme, validate=False).save(path, max_shard_size="40kB")
    return path


@pytest.fixture(params=["int8", "int4", "fp16"])
def path(request, tmp_path):
    return saved(tmp_path / "model", request.param)


def weight_layouts(model):
    return {module.weight_layout().name for module in model.modules() if hasattr(module, "weight_layout")}


def mapped(path):
    """Whether this process maps any file of the directory."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


# Devices.


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("place", ["fresh", "meta"])
def test_the_cpu_by_name_is_where_a_model_goes_anyway(path, place, compute):
    make = on_meta if place == "meta" else lambda: seeded(Wide, 1)
    models = [
        fewbits.load(path, into=make().eval(), compute=compute, device=device)
        for device in (None, "cpu", torch.device("cpu", 0))
    ]
    assert all(same_state(model, models[0]) for model in models)
    assert all(tensor.device == torch.device("cpu") for model in models for tensor in tensors_in(model))
    with torch.no_grad():
        assert all(same_bits(model(IDS), models[0](IDS)) for model in models)


@pytest.mark.parametrize("device", NOWHERE, ids=repr)
def test_a_device_that_cannot_be_used_is_refused_before_anything_is_opened(device, path):
    into = seeded(Wide, 1)
    before = snapshot(into)
    for place in (path, path / "missing"):
        with pytest.raises(ArgumentError, match="device="):
            fewbits.load(place, into=into, device=device)
    assert snapshot(into).equals(before)


def test_a_device_without_a_model_is_refused(path):
    with pytest.raises(ArgumentError, match="device= says where a model is to be"):
        fewbits.load(path, device="cpu")


@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_another_device_gets_every_tensor_and_nothing_stays_mapped(path, compute, monkeypatch):
    """The meta device stands in for one that is there: a model of it takes tensors as one of a GPU does."""
    monkeypatch.setattr("fewbits.formats.loading.usable", torch.device)
    expected = fewbits.load(path, into=on_meta(), compute=compute).state_dict()
    loaded = fewbits.load(path, into=on_meta(), compute=compute, device="meta")
    assert all(tensor.is_meta for tensor in tensors_in(loaded))
    found = loaded.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert loaded.shift is loaded.again
    for held in ("_parameters", "_modules"):
        assert all(getattr(loaded.head, held)[name] is tied for name, tied in getattr(loaded.embed, held).items())
    assert weight_layouts(loaded) <= {"packed_int32"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("place", ["fresh", "meta"])
def test_a_gpu_gets_every_tensor(path, place):
    into = on_meta() if place == "meta" else seeded(Wide, 1)
    loaded = fewbits.load(path, into=into.eval(), device="cuda")
    assert all(tensor.device == torch.device("cuda", 0) for tensor in tensors_in(loaded))
    on_cpu = fewbits.load(path, into=on_meta().eval(), compute="exact")
    assert same_state(loaded.cpu(), on_cpu)


# Mapped, or in memory of its own.


@LINUX
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_file_stays_mapped_only_where_no_layer_has_a_form_of_its_own(scheme, tmp_path):
    path = saved(tmp_path / "model", scheme)
    exact = fewbits.load(path, into=on_meta(), compute="exact")
    assert mapped(path)
    del exact
    fast = fewbits.load(path, into=on_meta())
    private = not weight_layouts(fast) <= {"packed_int32"}
    assert mapped(path) is not private


class Cached(Reader):
    """Hands out the tensors that it has, as a reader of another format may."""

    def __init__(self, reader):
        self.metadata, self.entries = reader.metadata, reader.entries
        self.tensors = {name: reader.read(name).clone() for name in reader.entries}

    def read(self, name):
        return self.tensors[name]


class CachingSerializer(Serializer):
    def __init__(self):
        self.readers = {}

    def writer(self, path, header):
        return SafetensorsSerializer().writer(path, header)

    def reader(self, path):
        if str(path) not in self.readers:
            self.readers[str(path)] = Cached(SafetensorsSerializer().reader(path))
        return self.readers[str(path)]


def test_what_a_reader_hands_out_is_never_written_to(path):
    serializer = CachingSerializer()
    first = fewbits.load(path, into=on_meta(), serializer=serializer)
    before = {(p, n): t.clone() for p, r in serializer.readers.items() for n, t in r.tensors.items()}
    second = fewbits.load(path, into=on_meta(), serializer=serializer)
    assert same_state(first, second)
    assert same_state(first, fewbits.load(path, into=on_meta()))
    assert all(same_bits(t, before[p, n]) for p, r in serializer.readers.items() for n, t in r.tensors.items())


# Failures.


class Asking(nn.Linear):
    """Computes its weight itself."""

    def __getattr__(self, name):
        return super().__getattr__("bias" if name == "weight" and name not in self._parameters else name)


@pytest.mark.parametrize("compute", ["auto", "exact"])
@pytest.mark.parametrize("make", [Wide, Mixed, Tied])
def test_a_module_that_would_miss_its_weight_leaves_the_whole_model_as_it_was(make, compute, tmp_path):
    quantizer = small(fewbits.Int8PerChannel)
    quantizer.prepare(dict(nn.ModuleDict({"a": seeded(make), "z": nn.Linear(8, 8)}).state_dict()))
    quantizer.convert()
    quantizer.save(tmp_path / "file")
    into = nn.ModuleDict({"a": seeded(make, 1), "z": Asking(8, 8)})
    before, held = snapshot(into), [id(tensor) for tensor in tensors_in(into)]
    with pytest.raises(SourceError, match="Asking computes its attribute weight itself"):
        fewbits.load(tmp_path / "file", into=into, compute=compute)
    assert snapshot(into).equals(before)
    assert [id(tensor) for tensor in tensors_in(into)] == held
    assert not any(isinstance(module, fewbits.nn.base.QuantizedModule) for module in into.modules())


@pytest.mark.parametrize("check", ["digests", "header"])
@pytest.mark.parametrize("bad", [{"2.weight_input_scale": struct.pack("<f", float("nan"))},
                                 {"2.weight_input_scale": struct.pack("<f", 0.0)},
                                 {"2.weight_shape": struct.pack("<2q", 8, 17)}])  # fmt: skip
def test_a_forged_part_is_found_before_anything_is_filled(bad, check, tmp_path):
    make = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))  # noqa: E731
    batches = [torch.randn(4, 16)]
    result = fewbits.quantize(make(), "int8", min_elements=1, activations="static", data=batches, on_failure="ignore")
    result.save(tmp_path / "file")
    for name, content in bad.items():
        (tmp_path / "file").write_bytes(forged_tensor((tmp_path / "file").read_bytes(), name, content))
    into = make()
    before = snapshot(into)
    with pytest.raises(fewbits.errors.FormatError):
        fewbits.load(tmp_path / "file", into=into, check=check)
    assert snapshot(into).equals(before)
    assert type(into[0]) is nn.Linear


def test_a_file_that_is_gone_in_the_middle_leaves_what_was_read_and_what_was_there(tmp_path, monkeypatch):
    path = saved(tmp_path / "model", "int8")
    expected = fewbits.load(path, into=on_meta())
    gone = sorted(path.glob("*.safetensors"))[-1]
    put = fewbits.checkpoint.filling.Place.put

    def vanishing(self, *args, **options):
        gone.unlink(missing_ok=True)
        put(self, *args, **options)

    monkeypatch.setattr(fewbits.checkpoint.filling.Place, "put", vanishing)
    into = on_meta()
    with pytest.raises(CheckpointError, match=gone.name):
        fewbits.load(path, into=into)
    found = {name: tensor for name, tensor in into.state_dict().items() if not tensor.is_meta}
    assert found
    assert all(same_bits(tensor, expected.state_dict()[name]) for name, tensor in found.items())
    assert any(tensor.is_meta for tensor in tensors_in(into))


# Memory.

LOADING = """if True:
    import gc, json, sys
    import torch
    from torch import nn
    import fewbits

    def status():
        lines = open("/proc/self/status").read().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}

    def model(layers, side):
        with torch.device("meta"):
            stack = nn.Sequential(*(nn.Linear(side, side) for _ in range(layers)), nn.Embedding(side, side))
        return stack.bfloat16()

    small, large, layers, side, compute, check, device = sys.argv[1:]
    options = {"compute": compute, "check": check, "device": device or None}
    fewbits.load(small, into=model(2, 256), **options)
    gc.collect()
    into, before = model(int(layers), int(side)), status()["VmRSS"]
    loaded = fewbits.load(large, into=into, **options)
    peak = status()["VmHWM"] - before
    held = [*loaded.parameters(), *loaded.buffers()]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held}
    print(json.dumps({"peak": peak, "result": sum(sizes.values()), "largest": max(sizes.values())}))
"""

#: Other memory that a process may take: the header and its objects, pieces for digests, holes of the heap.
ALLOWED = 32 * MB
LAYERS, SIDE = 32, 3072
OPTIONS = [("auto", "digests", ""), ("auto", "header", "cpu"), ("exact", "digests", ""), ("int8", "header", "")]


def large(path, scheme, layers, side):
    """Write layers and an embedding whose rows are all the same: their floats take no memory."""
    stack = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)), nn.Embedding(1, 1))
    for module in stack:
        module.weight = nn.Parameter(torch.randn(1, side).bfloat16().expand(side, side), requires_grad=False)
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.randn(side).bfloat16(), requires_grad=False)
    fewbits.quantize(stack, scheme, validate=False).save(path, max_shard_size="64MB")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_process_takes_no_more_than_the_result_and_one_tensor(scheme, tmp_path):
    large(tmp_path / "small", scheme, 2, 256)
    large(tmp_path / "large", scheme, LAYERS, SIDE)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    for options in [
        ("auto", "digests", ""),
        ("auto", "header", "cpu"),
        ("exact", "digests", ""),
        ("int8", "header", ""),
    ]:
        arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(LAYERS), str(SIDE), *options]
        done = subprocess.run([sys.executable, "-c", LOADING, *arguments], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        assert 0.95 * stored < found["result"] < 1.1 * stored
        assert found["peak"] <= found["result"] + found["largest"] + ALLOWED
        assert found["largest"] + ALLOWED < found["result"] / 3  # else the line above would say little
