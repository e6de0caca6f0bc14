"""Modules as people write them. Each takes X, whose last axis has 8 features."""

import abc
import copy
import typing
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (8, 8)))


class Bare(nn.Module):
    """A matrix and a vector of its own."""

    def __init__(self):
        super().__init__()
        self.matrix, self.gain = matrix(), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return (x @ self.matrix) * self.gain


class Residual(nn.Module):
    """Bare parameters beside children."""

    def __init__(self):
        super().__init__()
        self.register_parameter("absent", None)
        self.position, self.inner = matrix(3, 8), Bare()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.inner(x + self.position)) + (0 if self.absent is None else self.absent)


class Shifted(nn.Linear):
    """Leaves the rest to its base."""

    def forward(self, input):
        return super().forward(input) + 1


class Normalized(nn.Linear):
    """Uses its weight in its own way."""

    def forward(self, input):
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)


class Twice(Shifted):
    """A subclass of a subclass, with a parameter more."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = matrix()

    def forward(self, input):
        return super().forward(super().forward(input) @ self.gate)


class Standardized(nn.Conv1d):
    """A convolution with a weight that it makes anew."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return self._conv_forward(input[:, None], weight, self.bias)


class Scaled(nn.Embedding):
    """An embedding that scales."""

    def forward(self, input):
        return super().forward(input.argmax(-1)) * 3.0


class OtherClass(nn.Linear):
    """Adds nothing."""


class Tied(nn.Module):
    """Reads the embedding of another module."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        return F.linear(self.embed(x.argmax(-1)), self.embed.weight) + F.linear(x, self.head.weight, self.head.bias)


class Containers(nn.Module):
    """Layers and parameters in all containers of torch, nested."""

    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.ModuleDict({"up": nn.Linear(8, 8)})])
        self.parameters_ = nn.ParameterDict({"w": matrix(), "more": nn.ParameterList([matrix(), nn.Parameter(X[0])])})

    def forward(self, x):
        x = self.list[1]["up"](self.list[0](x)) @ self.parameters_["w"]
        return x @ self.parameters_["more"][0] + self.parameters_["more"][1]


class Functional(nn.Module):
    """Names its parameters unusually."""

    def __init__(self):
        super().__init__()
        self.W_1, self.weight_stored_of_old, self._private, self.stored = matrix(), matrix(), matrix(), matrix()

    def forward(self, x):
        return x @ self.W_1 @ self.weight_stored_of_old @ self._private @ self.stored


class Experts(nn.Module):
    """Fused experts, as transformers has them."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight, self.down = matrix(4, 8, 40), matrix(4, 40, 8)

    def forward(self, x):
        if self.is_transposed:
            return torch.bmm(torch.bmm(x.expand(4, *x.shape), self.weight), self.down).sum(0)
        return torch.bmm(torch.bmm(x.expand(4, *x.shape), self.down.mT), self.weight.mT).sum(0)


class Lora(nn.Module):
    """A frozen layer with a trained low-rank update."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.scaling = nn.ParameterDict({"default": matrix(8, 8)})

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x)) @ self.scaling["default"]


class Delegating(nn.Module):
    """Looks up missing attributes in the module inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.own = Bare(), matrix()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) @ self.own * self.gain + self.matrix.sum()


class Setting(nn.Module):
    """Watches its attributes."""

    def __init__(self):
        object.__setattr__(self, "log", [])
        super().__init__()
        self.matrix = matrix()

    def __setattr__(self, name, value):
        self.log.append(name)
        super().__setattr__(name, value)

    def forward(self, x):
        return x @ self.matrix


class Reducing(nn.Linear):
    """Is rebuilt by pickle only."""

    def __reduce__(self):
        return _rebuilt, (self.in_features, self.out_features, self.state_dict())


def _rebuilt(inputs, outputs, state):
    module = Reducing(inputs, outputs)
    module.load_state_dict(state)
    return module


class Copying(nn.Module):
    """Copies itself."""

    def __init__(self):
        super().__init__()
        self.matrix, self.copies = matrix(), 0

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.copies += 1
        return copied

    def forward(self, x):
        return x @ self.matrix


class Stateful(nn.Module):
    """Has a state of its own to pickle."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()
        self.cache = {"large": torch.ones(3)}

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cache = {}

    def forward(self, x):
        return x @ self.matrix


T = typing.TypeVar("T")


class Generic(nn.Module, typing.Generic[T]):
    """Has a type parameter."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def forward(self, x: T) -> T:
        return x @ self.matrix


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def forward(self, x, depth=2):
        return x @ self.matrix if depth == 0 else self(x @ self.matrix, depth - 1) @ self.matrix


class Property(nn.Module):
    """Hides its parameter behind a property."""

    def __init__(self):
        super().__init__()
        self._matrix = matrix()

    @property
    def weight(self):
        return self._matrix.T

    def forward(self, x):
        return x @ self.weight


class Plain:
    """No module."""

    def double(self, x):
        return 2 * x


class Combined(Plain, nn.Linear):
    """A module and something else."""

    def double(self, x):
        return super().double(x) + self.weight.sum()

    def forward(self, input):
        return self.double(super().forward(input))


class ByName(nn.Linear):
    """Names its base."""

    def forward(self, input):
        return nn.Linear.forward(self, input) + 1


class Abstract(nn.Module, abc.ABC):
    """Is for others to finish."""

    @abc.abstractmethod
    def used(self):
        """The matrix."""

    def forward(self, x):
        return x @ self.used()


class Concrete(Abstract):
    """Finished."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def used(self):
        return self.matrix


class Calling(nn.Module):
    """Computes in other methods than forward."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def __call__(self, x):
        return self.encode(x) + super().__call__(x)

    def encode(self, x):
        return x @ self.matrix.T

    def forward(self, x):
        return x @ self.matrix


class Meta(type):
    """A metaclass, which counts its calls."""

    calls = 0

    def __call__(cls, *args):
        Meta.calls += 1
        return super().__call__(*args)


class WithMeta(nn.Module, metaclass=Meta):
    """Has a metaclass."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def forward(self, x):
        return x @ self.matrix


class Final(nn.Module):
    """Refuses to be subclassed."""

    def __init__(self):
        super().__init__()
        self.matrix, self.head = matrix(), nn.Linear(8, 8)

    def __init_subclass__(cls):
        raise TypeError("Final is final")

    def forward(self, x):
        return self.head(x @ self.matrix)


class Buffered(nn.Module):
    """Has buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()
        self.register_buffer("kept", torch.eye(8))
        self.register_buffer("offset", torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        return x @ self.matrix @ self.kept + self.offset


class WithSequential(nn.Sequential):
    """A container with a matrix of its own."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU())
        self.matrix = matrix()

    def forward(self, x):
        return super().forward(x) @ self.matrix


class WithList(nn.ModuleList):
    """A list with a matrix of its own."""

    def __init__(self):
        super().__init__([nn.Linear(8, 8), nn.ReLU()])
        self.matrix = matrix()

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x @ self.matrix * len(self)


class WithDict(nn.ModuleDict):
    """A dict with a matrix of its own."""

    def __init__(self):
        super().__init__({"up": nn.Linear(8, 8)})
        self.matrix = matrix()

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x @ self.matrix * len(list(self.keys()))


class OverChildren(nn.Module):
    """Runs its children one by one, and has a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.matrix = nn.Linear(8, 8), nn.Linear(8, 8), matrix()

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x @ self.matrix


class OverParameters(nn.Module):
    """Finds its matrices by looking through its parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = matrix(), matrix(), nn.Linear(8, 8)

    def forward(self, x):
        for weight in self.parameters(recurse=False):
            x = x @ weight
        return self.head(x)


class OverState(nn.Module):
    """Reads its matrix from where torch keeps it."""

    def __init__(self):
        super().__init__()
        self.matrix = matrix()

    def forward(self, x):
        return x @ self._parameters["matrix"]


class Mixed(nn.Module):
    """Several dtypes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, dtype=torch.float16), nn.Linear(8, 8, dtype=torch.float64)
        self.matrix = nn.Parameter(torch.randn(8, 8).bfloat16())

    def forward(self, x):
        return self.last((self.first(x.half()).bfloat16() @ self.matrix).double())


def _old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(8, 8))


def _pruned():
    layer = nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def _shared():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _tied_across_classes():
    model = nn.Sequential(nn.Linear(8, 8), Bare(), Shifted(8, 8))
    model[1].matrix = model[2].weight = model[0].weight
    return model


def _unusual_strides():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(8, 8).T)
    return layer


MODULES = {
    "bare parameters": Bare,
    "parameters beside children": Residual,
    "forward of the base": lambda: Shifted(8, 8),
    "forward of its own": lambda: Normalized(8, 8),
    "two levels and another parameter": lambda: Twice(8, 8),
    "convolution of its own": lambda: Standardized(1, 4, 3),
    "embedding of its own": lambda: Scaled(8, 8),
    "another class": lambda: OtherClass(8, 8),
    "another module's weight": Tied,
    "containers": Containers,
    "names": Functional,
    "experts": lambda: Experts(False),
    "transposed experts": lambda: Experts(True),
    "low rank": Lora,
    "delegating": Delegating,
    "watching": Setting,
    "copying itself": Copying,
    "a state of its own": Stateful,
    "generic": Generic,
    "generic, with an argument": lambda: Generic[Tensor](),
    "recursive": Recursive,
    "property": Property,
    "metaclass": WithMeta,
    "final": Final,
    "buffers": Buffered,
    "sequential with a matrix": WithSequential,
    "list with a matrix": WithList,
    "dict with a matrix": WithDict,
    "over its children": OverChildren,
    "over its parameters": OverParameters,
    "in several classes": lambda: Combined(8, 8),
    "base by name": lambda: ByName(8, 8),
    "abstract": Concrete,
    "called otherwise": Calling,
    "dtypes": Mixed,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "old weight norm": _old_weight_norm,
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "pruned": _pruned,
    "shared": _shared,
    "tied across classes": _tied_across_classes,
    "strides": _unusual_strides,
    "traced": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
    "bare layer": lambda: nn.Linear(8, 8),
    "no bias": lambda: nn.Sequential(nn.Linear(8, 8, bias=False)),
    "fused by torch": lambda: torch.ao.nn.intrinsic.LinearReLU(nn.Linear(8, 8), nn.ReLU()),
    "quantizable by torch": lambda: FirstOf(torch.ao.nn.quantizable.LSTM(8, 8)),
    "compiled": lambda: torch.compile(nn.Linear(8, 8), backend="eager"),
}


class FirstOf(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[None])[0]
