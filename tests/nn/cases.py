"""Float modules with example inputs, the schemes to quantize them with, and ways to look at the result."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits.kernels.int8_rows import PlainInt8
from fewbits.nn.packed import PackedWeight
from fewbits.numerics.dtypes import FLOAT_DTYPES
from support.lifecycle_helpers import small


def keeping(scheme: type[fewbits.Quantizer] = fewbits.Int8PerChannel, *args: Any, **options: Any) -> fewbits.Quantizer:
    """A quantizer with rules of selection, for which no tensor is too small."""
    return small(scheme, *args, **options)


SCHEMES: dict[str, Callable[[], fewbits.Quantizer]] = {
    "int8": keeping,
    "int8-tensor": partial(keeping, fewbits.Int8PerTensor),
    "int4": partial(keeping, fewbits.Int4Grouped, 4, skip_types=()),
    "int4-asymmetric": partial(keeping, fewbits.Int4Grouped, 4, symmetric=False, skip_types=()),
    "fp16": partial(keeping, fewbits.FP16Cast),
}

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_turn(cases: Sequence[Any], others: Iterable[Any]) -> list[Any]:
    """Combine all cases with all others for `parametrize`; all are slow but one of each case, which take turns."""
    others = list(others)
    return [
        pytest.param(case, other, id=f"{case}-{other}", marks=[pytest.mark.slow] * (j != i % len(others)))
        for i, case in enumerate(cases)
        for j, other in enumerate(others)
    ]


@attrs.frozen
class Case:
    """A float module and the arguments of a call.

    Attributes:
        name: for test ids.
        make: builds the module in float32; called under a fixed seed.
        inputs: the positional arguments; floating ones are cast to the dtype under test.
        kwargs: keyword arguments of the call.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    kwargs: dict[str, Any] = attrs.field(factory=dict)

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(7)
        return self.make().to(dtype)

    def run(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return module(*map(cast, self.inputs), **{name: cast(value) for name, value in self.kwargs.items()})

    @property
    def reads_floats(self) -> bool:
        return self.inputs[0].is_floating_point()

    def __str__(self) -> str:
        return self.name


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def _linear() -> Iterator[Case]:
    yield Case("linear", lambda: nn.Linear(12, 5), (_randn(3, 12),))
    yield Case("linear, no bias", lambda: nn.Linear(8, 4, bias=False), (_randn(2, 3, 8),))
    yield Case("linear, odd sizes", lambda: nn.Linear(13, 7), (_randn(2, 13),))
    yield Case("linear, one by one", lambda: nn.Linear(1, 1), (_randn(5, 1),))
    yield Case("linear, a vector", lambda: nn.Linear(10, 3), (_randn(10),))
    yield Case("linear, no rows", lambda: nn.Linear(6, 3), (_randn(0, 6),))


_SPATIAL = {1: (9,), 2: (9, 8), 3: (6, 5, 7)}

_CONV_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "same": {"padding": "same", "kernel_size": 2, "dilation": 2},
    "same, circular": {"padding": "same", "padding_mode": "circular"},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8},
    "pointwise": {"kernel_size": 1},
}

_TRANSPOSED_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "groups and stride": {"groups": 2, "stride": 3, "output_padding": 2, "kernel_size": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
}


def _convolution(name: str, cls: type[nn.Module], rank: int, options: dict[str, Any], **kwargs: Any) -> Case:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | options
    label = cls.__name__ + (f", {name}" if name else "")
    return Case(label, lambda: cls(**arguments), (_randn(2, 4, *_SPATIAL[rank]),), kwargs)


def _convolutions() -> Iterator[Case]:
    for rank, conv, transposed in (
        (1, nn.Conv1d, nn.ConvTranspose1d),
        (2, nn.Conv2d, nn.ConvTranspose2d),
        (3, nn.Conv3d, nn.ConvTranspose3d),
    ):
        for name, options in _CONV_OPTIONS.items():
            yield _convolution(name, conv, rank, options)
        for name, options in _TRANSPOSED_OPTIONS.items():
            yield _convolution(name, transposed, rank, options)
        size = [2 * length + 2 for length in _SPATIAL[rank]]
        yield _convolution("output size", transposed, rank, {"stride": 2}, output_size=size)


_INDICES = torch.tensor([[0, 3, 9], [3, 1, 0]])


def _embeddings() -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "": {},
        "padding index": {"padding_idx": 3},
        "max norm": {"max_norm": 0.8},
        "max norm of 1": {"max_norm": 1.5, "norm_type": 1.0},
        "gradients by frequency": {"scale_grad_by_freq": True},
        "sparse gradients": {"sparse": True},
    }
    for name, chosen in options.items():
        label = f"Embedding, {name}".removesuffix(", ")
        yield Case(label, lambda chosen=chosen: nn.Embedding(10, 6, **chosen), (_INDICES,))
    yield Case("Embedding, int32 indices", lambda: nn.Embedding(10, 6), (_INDICES.int(),))
    yield Case("Embedding, one index", lambda: nn.Embedding(10, 6), (torch.tensor(4),))
    yield Case("Embedding, no indices", lambda: nn.Embedding(10, 6), (torch.empty(0, 3, dtype=torch.int64),))


def _embedding_bags() -> Iterator[Case]:
    offsets = (_INDICES.flatten(), torch.tensor([0, 2, 2]))
    open_ended = (_INDICES.flatten(), torch.tensor([0, 2, 6]))
    for mode in ("sum", "mean", "max"):
        yield Case(f"EmbeddingBag, {mode}", lambda mode=mode: nn.EmbeddingBag(10, 6, mode=mode), offsets)
        yield Case(f"EmbeddingBag, {mode}, 2-D", lambda mode=mode: nn.EmbeddingBag(10, 6, mode=mode), (_INDICES,))
    summing: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
        "last offset": ({"include_last_offset": True}, open_ended, {}),
        "weighted": ({}, offsets, {"per_sample_weights": _randn(6)}),
        "weighted, 2-D": ({}, (_INDICES,), {"per_sample_weights": _randn(2, 3)}),
        "padding index": ({"padding_idx": 3}, offsets, {}),
        "max norm": ({"max_norm": 0.8}, offsets, {}),
        "sparse gradients": ({"sparse": True}, offsets, {}),
    }
    for name, (options, inputs, kwargs) in summing.items():

        def make(options: dict[str, Any] = options) -> nn.Module:
            return nn.EmbeddingBag(10, 6, mode="sum", **options)

        yield Case(f"EmbeddingBag, {name}", make, inputs, kwargs)


CASES = (*_linear(), *_convolutions(), *_embeddings(), *_embedding_bags())
#: One case of every class, with the options that are easiest to lose.
TYPICAL = tuple(
    case
    for case in CASES
    if case.name
    in {
        "linear, odd sizes", "Conv1d, same, circular", "Conv2d, groups", "Conv3d, reflect",
        "ConvTranspose1d, output size", "ConvTranspose2d, groups", "ConvTranspose3d, stride",
        "Embedding, padding index", "Embedding, max norm", "EmbeddingBag, weighted",
    }
)  # fmt: skip

assert len({case.name for case in CASES}) == len(CASES)


def is_already(scheme: str, dtype: torch.dtype) -> bool:
    """Whether the scheme has nothing to do: a cast to the dtype that is there."""
    return (scheme, dtype) == ("fp16", torch.float16)


#: Every scheme with every dtype of the model it has something to do for.
COMBINATIONS = tuple((scheme, dtype) for scheme in SCHEMES for dtype in FLOAT_DTYPES if not is_already(scheme, dtype))


def convert(model: nn.Module, scheme: str = "int8", **options: Any) -> nn.Module:
    """Quantize a model, without validation."""
    return converted(model, SCHEMES[scheme](), **options)[0]


def converted(model: nn.Module, quantizer: fewbits.Quantizer, **options: Any) -> tuple[nn.Module, fewbits.Ledger]:
    quantizer.prepare(model, **options)
    return quantizer.convert(), quantizer.ledger


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit: 0 is not -0, and NaN equals itself."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    as_integers = _BYTES[a.element_size()]
    return torch.equal(a.detach().contiguous().view(as_integers), b.detach().contiguous().view(as_integers))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """The same keys in the same order, with the same bits."""
    return snapshot(a).equals(snapshot(b))


@attrs.frozen
class Snapshot:
    """The classes, flags, state and hooks of a model. `equals` compares two."""

    classes: tuple[tuple[str, type, bool], ...]
    hooks: tuple[tuple[str, int, int], ...]
    gradients: tuple[tuple[str, bool], ...]
    state: dict[str, Tensor]

    def equals(self, other: Snapshot) -> bool:
        return (
            (self.classes, self.hooks, self.gradients) == (other.classes, other.hooks, other.gradients)
            and list(self.state) == list(other.state)
            and all(same_bits(tensor, other.state[name]) for name, tensor in self.state.items())
        )


def snapshot(model: nn.Module) -> Snapshot:
    modules = list(model.named_modules(remove_duplicate=False))
    return Snapshot(
        tuple((name, type(module), module.training) for name, module in modules),
        tuple((name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in modules),
        tuple((name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)),
        {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
    )


def tensors_in(thing: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from a module: parameters, buffers, attributes, lists and dicts of them."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from tensors_in(value, seen)
    elif isinstance(thing, nn.Module):
        yield from tensors_in(vars(thing), seen)


def padding_left_out(model: nn.Module) -> int:
    """The bytes that pad the rows of words in files, and that `PlainInt8` does not hold."""
    weights = [m.weight_layout() for m in model.modules() if isinstance(m, PackedWeight)]
    matrices = [weight.layout.matrix_shape for weight in weights if isinstance(weight, PlainInt8)]
    return sum(rows * (-columns % 4) for rows, columns in matrices)


def storages(thing: object) -> set[int]:
    """The storages that can be reached from a module."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_in(thing) if tensor.numel()}


def fewbits_classes(model: nn.Module) -> list[str]:
    """The names of the modules whose class is one of the library's."""
    return [name for name, module in model.named_modules() if type(module).__module__.startswith("fewbits")]


def pickled(thing: Any) -> Any:
    """There and back through pickle."""
    return pickle.loads(pickle.dumps(thing))


def through_torch_save(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """There and back through a file of tensors alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(model: nn.Module, *, assign: bool = False) -> nn.Module:
    """Another copy, all of whose tensors were overwritten before it took over the model's state dict."""
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    other.load_state_dict(through_torch_save(model.state_dict()), assign=assign)
    return other


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, a layer at two paths, and a list that is not in the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.beside = [self.first]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(torch.relu(self.beside[0](self.first(self.embed(ids))))))


class Mixed(nn.Module):
    """Layers that can be quantized beside ones that cannot, in nested containers, with buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 3, groups=2)
        self.batch_norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.offset
        for block in self.blocks:
            x = x + block["norm"](block["up"](x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.lstm(x)[0].transpose(1, 2)
        return self.batch_norm(self.up(self.conv(x))) * self.scale


IDS = torch.tensor([[1, 5, 0, 11], [3, 3, 2, 7]])


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()
