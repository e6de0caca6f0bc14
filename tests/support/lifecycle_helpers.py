"""Models, random models, and outside strategies, for tests of selection, lifecycle and validation."""

import base64
import inspect
import json
import struct
from pathlib import Path

import attrs
import torch
from hypothesis import settings
from torch import nn

import fewbits
import fewbits.testing
from fewbits import LayerSelector, MinMaxObserver
from fewbits.extend import Entry, Reader, Serializer, TensorInfo, Writer

# For properties that write files: they mostly wait for the disk.
FEWER_EXAMPLES = settings(max_examples=settings.default.max_examples // 3)

RULES = frozenset(inspect.signature(LayerSelector).parameters)


def small(scheme=fewbits.Int8PerChannel, *args, **options):
    """A quantizer without a minimum size. Options that are rules go to its selector."""
    rules = {name: options.pop(name) for name in RULES & options.keys()}
    return scheme(*args, **{"selector": LayerSelector(**{"min_elements": 1} | rules)} | options)


def quantize_small(source, scheme="int8", **options):
    """`fewbits.quantize` without a minimum size, unless a quantizer or a selector is given."""
    rules = {"min_elements": 1} if isinstance(scheme, str) and "selector" not in options else {}
    return fewbits.quantize(source, scheme, **rules | options)


random_models = fewbits.testing.models

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def mlp(seed=0, width=32):
    """Linear, ReLU, Linear, with weights that depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


class TiedLM(nn.Module):
    """An embedding tied to the output layer, a normalization, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.gate_proj = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("position_ids", torch.arange(8))
        self.register_buffer("inv_freq", torch.rand(16), persistent=False)

    def forward(self, ids):
        return self.lm_head(self.gate_proj(self.norm(self.embed_tokens(ids))))


def named_tensors(model):
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def distinct_bytes(tensors):
    """The bytes of the storages of some tensors; a shared storage counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def snapshot(tensors):
    """Names, shapes, dtypes and bits, to compare later."""
    return {name: (tuple(t.shape), t.dtype, as_bytes(t)) for name, t in tensors.items()}


def files_in(folder):
    """Every file below a folder, hidden ones included, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def visible(folder):
    """The names in a folder, without the staging directory of an unfinished run."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.endswith(".work"))


def read_header(path):
    """(entries, metadata, bytes of payload) of a safetensors file, read by its specification."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    metadata = entries.pop("__metadata__", {})
    return entries, metadata, len(data) - 8 - length


def stored(path):
    """Every tensor of a safetensors file: dtype, shape, bytes."""
    entries, _, payload = read_header(path)
    data = Path(path).read_bytes()[-payload:]
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in entries.items()}


def hook_count(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def entry(name, shape=(4, 8), **fields):
    """A `TensorInfo` with its own storage."""
    defaults = {
        "dtype": torch.float32,
        "storage": name,
        "layout": fewbits.extend.Layout.of(shape) if len(shape) > 1 else None,
    }
    return TensorInfo(name=name, shape=shape, **(defaults | fields))


class Watcher(MinMaxObserver):
    """Passes every input to a function, and widens its scales by the largest input."""

    needs_data = True

    def __init__(self, show=lambda x: None):
        self._show = show
        self._peak = 0.0

    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        return attrs.evolve(params, scale=params.scale * (1 + self._peak))

    def observe_input(self, x):
        self._show(x)
        self._peak = max(self._peak, float(x.abs().max()))

    def reset(self):
        self._peak = 0.0


class JsonSerializer(Serializer):
    """A serializer for JSON with base64; it remembers the paths that it wrote and read."""

    def __init__(self):
        self.written, self.opened = [], []

    def writer(self, path, header):
        return _JsonWriter(self, Path(path))

    def reader(self, path):
        self.opened.append(Path(path).name)
        return _JsonReader(json.loads(Path(path).read_text()))


class _JsonWriter(Writer):
    def __init__(self, serializer, path):
        self._serializer, self._path, self._tensors = serializer, path, {}

    def write(self, name, tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._tensors[name] = [dtype, list(tensor.shape), base64.b64encode(as_bytes(tensor)).decode()]

    def seal(self, metadata):
        self._text = json.dumps({"metadata": dict(metadata), "tensors": self._tensors})
        return _JsonReader(json.loads(self._text))

    def close(self):
        self._path.write_text(self._text)
        self._serializer.written.append(self._path.name)

    def abort(self):
        pass


class _JsonReader(Reader):
    def __init__(self, document):
        self.metadata, self._tensors = document["metadata"], document["tensors"]
        self.entries = {
            name: Entry(tuple(shape), getattr(torch, dtype)) for name, (dtype, shape, _) in self._tensors.items()
        }

    def read(self, name):
        data, found = base64.b64decode(self._tensors[name][2]), self.entries[name]
        flat = torch.frombuffer(bytearray(data), dtype=found.dtype) if data else torch.empty(0, dtype=found.dtype)
        return flat.reshape(found.shape)
