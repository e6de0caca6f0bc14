"""Every class of torch.nn that has parameters, with ways to build, call and compare it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import fewbits
from nn.cases import same_bits

WITHOUT_LIMIT = {"selector": fewbits.LayerSelector(min_elements=1)}

#: Schemes that quantize every tensor that they can, however small.
EVERYTHING: dict[str, Callable[[], fewbits.Quantizer]] = {
    "int8": lambda: fewbits.Int8PerChannel(**WITHOUT_LIMIT),
    "int4": lambda: fewbits.Int4Grouped(4, skip_types=(), **WITHOUT_LIMIT),
    "fp16": lambda: fewbits.FP16Cast(**WITHOUT_LIMIT),
}


@attrs.frozen
class AnyCase:
    """A float module and the arguments of a call.

    Attributes:
        name: for test ids.
        cls: the class of torch.nn that it tests.
        make: builds the module, in float32; it may be a module that uses one of `cls`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    name: str
    cls: type[nn.Module]
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = attrs.field(factory=dict)

    def module(self, seed: int = 7) -> nn.Module:
        return quietly(self.make, seed).eval()

    def run(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Any]:
        """All that a forward gives, flattened; without gradients, with the same random numbers every time."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: _cast(t, dtype), (self.args, self.kwargs))
        with torch.no_grad():
            return _outputs(module, args, kwargs)

    def run_with_gradients(self, module: nn.Module) -> tuple[list[Any], list[Tensor | None]]:
        """All that a forward gives, and the gradients of the floating inputs."""
        args = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), self.args)
        outputs = _outputs(module, args, self.kwargs)
        torch.stack([x.square().sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad]).sum().backward()
        return outputs, [x.grad for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.requires_grad]

    @property
    def has_floats(self) -> bool:
        return any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(self.args))

    def __str__(self) -> str:
        return self.name


def quietly(make: Callable[[], nn.Module], seed: int = 7) -> nn.Module:
    """A module under a fixed seed, without warnings about deprecated or experimental options."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: they are no matter of these tests
        return pytree.tree_leaves(module(*args, **kwargs))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def same_outputs(a: list[Any], b: list[Any]) -> bool:
    """Equal in every bit."""
    if len(a) != len(b):
        return False
    return all(same_bits(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def plain(quantized: nn.Module) -> nn.Module:
    """Return the float module to compare with; torch takes other paths if a weight requires gradients."""
    return fewbits.dequantize(quantized).requires_grad_(False)


def converted(model: nn.Module, scheme: str, **options: Any) -> tuple[nn.Module, fewbits.Ledger]:
    """Quantize every parameter that can be quantized."""
    quantizer = EVERYTHING[scheme]()
    quantizer.prepare(model, **options)
    return quantizer.convert(), quantizer.ledger


def wanted(model: nn.Module) -> set[str]:
    """The parameters that have to be quantized: of two dimensions or more, and no biases."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point() and not name.rpartition(".")[2].startswith("bias")
    }


def assert_fates(ledger: fewbits.Ledger, model: nn.Module) -> None:
    """All that has to be is quantized, all else is kept with a reason."""
    assert {row.name for row in ledger if row.spec is not None} == wanted(model)
    assert {row.name for row in ledger} == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert all(row.reason for row in ledger)


def as_the_original(what: str, act: Callable[[Any], Any], original: Any, quantized: Any) -> tuple[Any, Any]:
    """Return the results of `act` on the float original and on the quantized module.

    Where torch refuses the original, the quantized one must be refused too, and the test is skipped with torch's
    error, so that the summary lists all of them.
    """
    try:
        expected = act(original)
    except Exception as error:
        with pytest.raises(Exception):  # noqa: B017, PT011  (any error of torch)
            act(quantized)
        message = (str(error).strip() or "no message").splitlines()[0][:100]
        pytest.skip(f"torch refuses {what}: {type(error).__name__}: {message}")
    return expected, act(quantized)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


# Attention.

_MASK = torch.tensor([[False, False, False, True], [False, False, False, False]])


def _attention() -> Iterator[AnyCase]:
    x, y = _randn(2, 4, 8), _randn(2, 5, 8)  # (batch, sequence, features)
    variants: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
        "fast path": ({}, (x, x, x), {"need_weights": False}),
        "weights": ({}, (x, x, x), {}),
        "weights of each head": ({}, (x, x, x), {"average_attn_weights": False}),
        "sequence first": ({"batch_first": False}, (x, x, x), {}),
        "cross": ({}, (x, y, y), {}),
        "other dimensions": ({"kdim": 6, "vdim": 10}, (x, _randn(2, 5, 6), _randn(2, 5, 10)), {}),
        "bias_k": ({"add_bias_kv": True}, (x, x, x), {}),
        "zero": ({"add_zero_attn": True, "bias": False}, (x, y, y), {}),
        "padding": ({}, (x, x, x), {"key_padding_mask": _MASK, "need_weights": False}),
        "mask": ({}, (x, x, x), {"attn_mask": torch.triu(torch.ones(4, 4), 1).bool(), "need_weights": False}),
        "dropout": ({"dropout": 0.5}, (x, y, y), {}),
    }
    for name, (options, args, kwargs) in variants.items():

        def make(options: dict[str, Any] = {"batch_first": True} | options) -> nn.Module:
            return nn.MultiheadAttention(8, 2, **options)

        yield AnyCase(f"MultiheadAttention, {name}", nn.MultiheadAttention, make, args, kwargs)


def _encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, "dropout": 0.0} | options)


def _decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(8, 2, 16, **{"batch_first": True, "dropout": 0.0} | options)


def _transformers() -> Iterator[AnyCase]:
    x, y = _randn(2, 4, 8), _randn(2, 5, 8)
    padding = {"src_key_padding_mask": _MASK}
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    for name, options in {
        "fast path": {},
        "norm first": {"norm_first": True},
        "gelu": {"activation": "gelu"},
        "other activation": {"activation": torch.tanh},
        "sequence first": {"batch_first": False},
        "no bias": {"bias": False},
    }.items():
        make = lambda options=options: _encoder_layer(**options)  # noqa: E731
        yield AnyCase(f"TransformerEncoderLayer, {name}", nn.TransformerEncoderLayer, make, (x,))
    yield AnyCase("TransformerEncoderLayer, padding", nn.TransformerEncoderLayer, _encoder_layer, (x,), padding)
    encoder = nn.TransformerEncoder
    yield AnyCase("TransformerEncoder", encoder, lambda: encoder(_encoder_layer(), 2), (x,))
    yield AnyCase("TransformerEncoder, nested", encoder, lambda: encoder(_encoder_layer(), 2), (x,), padding)
    yield AnyCase(
        "TransformerEncoder, not nested",
        encoder,
        lambda: encoder(_encoder_layer(), 2, nn.LayerNorm(8), enable_nested_tensor=False),
        (x,),
        padding,
    )
    yield AnyCase("TransformerDecoderLayer", nn.TransformerDecoderLayer, _decoder_layer, (x, y))
    decoder = nn.TransformerDecoder
    yield AnyCase("TransformerDecoder", decoder, lambda: decoder(_decoder_layer(), 2), (x, y), {"tgt_mask": causal})
    yield AnyCase(
        "Transformer", nn.Transformer, lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), (y, x)
    )


# Recurrent layers.


def _rnn_states(cls: type[nn.Module], layers: int, hidden: int) -> Any:
    h = _randn(layers, 2, hidden)
    return (h, _randn(layers, 2, hidden)) if cls is nn.LSTM else h


def _recurrent() -> Iterator[AnyCase]:
    x = _randn(5, 2, 8)  # (sequence, batch, features)
    packed = pack_padded_sequence(x, torch.tensor([5, 3]))
    for cls in (nn.LSTM, nn.GRU, nn.RNN):
        variants: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
            "": ({}, (x,)),
            "layers": ({"num_layers": 2, "dropout": 0.5}, (x,)),
            "bidirectional": ({"num_layers": 2, "bidirectional": True}, (x,)),
            "no bias": ({"bias": False}, (x,)),
            "batch first": ({"batch_first": True}, (x,)),
            "no batch": ({}, (x[:, 0],)),
            "packed": ({"bidirectional": True}, (packed,)),
            "states": ({"num_layers": 2}, (x, _rnn_states(cls, 2, 6))),
        }
        if cls is nn.LSTM:
            variants["projection"] = ({"proj_size": 4, "num_layers": 2, "bidirectional": True}, (x,))
        if cls is nn.RNN:
            variants["relu"] = ({"nonlinearity": "relu"}, (x,))
        for name, (options, args) in variants.items():

            def make(cls: type[nn.Module] = cls, options: dict[str, Any] = options) -> nn.Module:
                return cls(8, 6, **options)

            yield AnyCase(f"{cls.__name__}, {name}".removesuffix(", "), cls, make, args)
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        h = _randn(2, 6)
        state = (h, _randn(2, 6)) if cell is nn.LSTMCell else h
        yield AnyCase(cell.__name__, cell, lambda cell=cell: cell(8, 6), (x[0],))
        yield AnyCase(f"{cell.__name__}, states", cell, lambda cell=cell: cell(8, 6, bias=False), (x[0], state))


# Parameters in lists, norms, lazy layers, and other classes.


class OfList(nn.Module):
    """Uses a list of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.weights.append(nn.Parameter(torch.randn(8)))

    def forward(self, x: Tensor) -> Tensor:
        first, second, bias = self.weights
        return x @ first.T @ self.weights[1] + second.sum() * bias * len(self.weights)


class OfDict(nn.Module):
    """Uses matrices by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"up": nn.Parameter(torch.randn(8, 8)), "gain": nn.Parameter(torch.randn(8))})

    def forward(self, x: Tensor) -> Tensor:
        up = self.weights["up"]
        for _, weight in self.weights.items():
            x = x + weight.sum()
        return (x @ up.T) * self.weights.gain + len(self.weights.keys())


def _norms() -> Iterator[AnyCase]:
    images = {1: _randn(3, 4, 5), 2: _randn(3, 4, 5, 6), 3: _randn(3, 4, 3, 2, 4)}
    for rank, x in images.items():
        for kind, options in (("BatchNorm", {}), ("InstanceNorm", {"affine": True})):
            cls = getattr(nn, f"{kind}{rank}d")
            lazy = getattr(nn, f"Lazy{kind}{rank}d")
            yield AnyCase(cls.__name__, cls, lambda cls=cls, o=options: cls(4, **o), (x,))
            yield AnyCase(lazy.__name__, lazy, _initialized(lambda lazy=lazy, o=options: lazy(**o), x), (x,))
    yield AnyCase("SyncBatchNorm", nn.SyncBatchNorm, lambda: nn.SyncBatchNorm(4), (images[2],))
    yield AnyCase("GroupNorm", nn.GroupNorm, lambda: nn.GroupNorm(2, 4), (images[2],))
    yield AnyCase("LayerNorm", nn.LayerNorm, lambda: nn.LayerNorm(8), (_randn(2, 8),))
    yield AnyCase("LayerNorm, two axes", nn.LayerNorm, lambda: _scattered(nn.LayerNorm((5, 6))), (images[2],))
    yield AnyCase("RMSNorm", nn.RMSNorm, lambda: nn.RMSNorm(8), (_randn(2, 8),))
    yield AnyCase("RMSNorm, two axes", nn.RMSNorm, lambda: _scattered(nn.RMSNorm((5, 6))), (images[2],))
    yield AnyCase("PReLU", nn.PReLU, lambda: nn.PReLU(4), (images[2],))


def _scattered(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _initialized(make: Callable[[], nn.Module], x: Tensor) -> Callable[[], nn.Module]:
    """Lazy layers take their sizes, and their classes, from the first input."""

    def made() -> nn.Module:
        module = make()
        module(x.to(torch.get_default_device()))
        return module

    return made


def _convolutions() -> Iterator[AnyCase]:
    for rank, x in {1: _randn(2, 4, 9), 2: _randn(2, 4, 6, 7), 3: _randn(2, 4, 5, 4, 6)}.items():
        for kind in ("Conv", "ConvTranspose"):
            cls, lazy = getattr(nn, f"{kind}{rank}d"), getattr(nn, f"Lazy{kind}{rank}d")
            yield AnyCase(cls.__name__, cls, lambda cls=cls: cls(4, 6, 3, groups=2, padding=1), (x,))
            yield AnyCase(lazy.__name__, lazy, _initialized(lambda lazy=lazy: lazy(6, 3), x), (x,))


def _others() -> Iterator[AnyCase]:
    x, ids = _randn(3, 8), torch.tensor([[0, 3, 9], [3, 1, 0]])
    yield AnyCase("Linear", nn.Linear, lambda: nn.Linear(8, 5), (x,))
    yield AnyCase("LazyLinear", nn.LazyLinear, _initialized(lambda: nn.LazyLinear(5), x), (x,))
    undynamic = nn.modules.linear.NonDynamicallyQuantizableLinear
    yield AnyCase("NonDynamicallyQuantizableLinear", undynamic, lambda: undynamic(8, 5), (x,))
    yield AnyCase("Bilinear", nn.Bilinear, lambda: nn.Bilinear(8, 6, 5), (x, _randn(3, 6)))
    yield AnyCase("Bilinear, no bias", nn.Bilinear, lambda: nn.Bilinear(8, 6, 5, bias=False), (x, _randn(3, 6)))
    yield AnyCase("Embedding", nn.Embedding, lambda: nn.Embedding(10, 8, padding_idx=3), (ids,))
    yield AnyCase("EmbeddingBag", nn.EmbeddingBag, lambda: nn.EmbeddingBag(10, 8, mode="max"), (ids,))
    yield AnyCase("ParameterList", nn.ParameterList, OfList, (x,))
    yield AnyCase("ParameterDict", nn.ParameterDict, OfDict, (x,))
    adaptive, target = nn.AdaptiveLogSoftmaxWithLoss, torch.tensor([1, 11, 5])
    yield AnyCase("AdaptiveLogSoftmaxWithLoss", adaptive, lambda: adaptive(8, 12, [4, 8], div_value=2.0), (x, target))
    fused = getattr(nn, "LinearCrossEntropyLoss", None)  # newer than the oldest torch that is supported
    if fused is not None:
        yield AnyCase("LinearCrossEntropyLoss", fused, lambda: fused(8, 12), (x, target))
    parametrized, listed = nn.utils.parametrizations.weight_norm, nn.utils.parametrize.ParametrizationList
    yield AnyCase("ParametrizationList", listed, lambda: parametrized(nn.Linear(8, 8)), (x,))


ANY_CASES = (*_others(), *_convolutions(), *_norms(), *_attention(), *_transformers(), *_recurrent())

#: Classes with parameters that cannot be run by themselves, and why.
NOT_RUN: dict[str, str] = {
    "RNNBase": "has no forward; LSTM, GRU and RNN are cases",
    "RNNCellBase": "has no forward; its three cells are cases",
    "DataParallel": "has the parameters of the module in it alone",
    "DistributedDataParallel": "the same, in several processes",
    "DistributedDataParallelCPU": "the same",
    "ModuleWrapper": "a module of C++",
}


def torch_nn_classes(module: ModuleType = nn, seen: set[str] | None = None) -> dict[type[nn.Module], None]:
    """Every class of modules in torch.nn and its public modules.

    Those of torch.ao, which torch.nn.quantized, qat and their like are old names of, are torch's own quantization.
    """
    seen = set() if seen is None else seen
    seen.add(module.__name__)
    found: dict[type[nn.Module], None] = {}
    for name in dir(module):
        value = None if name.startswith("_") else getattr(module, name)
        if inspect.ismodule(value) and value.__name__.startswith("torch.nn") and value.__name__ not in seen:
            found |= torch_nn_classes(value, seen)
        elif inspect.isclass(value) and issubclass(value, nn.Module) and not value.__module__.startswith("torch.ao."):
            found[value] = None
    return found


def build_by_guess(cls: type[nn.Module]) -> nn.Module:
    """Build a module of any class, with guessed arguments."""
    for args in ((), (2,), (2, 2), (1, (2, 1))):
        try:
            return quietly(lambda args=args: cls(*args))
        except (TypeError, ValueError):
            continue
    pytest.fail(f"torch.nn.{cls.__name__} is new or was overlooked: it needs a case in tests/nn/any_cases.py")
