"""A read-only tensor gives plain results; changing it, or a tensor that shares its memory, is refused."""

import contextlib
import copy
import io
import pickle
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import ReadOnlyWeightError
from fewbits.numerics.read_only import ReadOnlyTensor

Pair = namedtuple("Pair", "left right")


def guarded() -> Tensor:
    return ReadOnlyTensor.of(torch.arange(1.0, 13).reshape(3, 4).clone(), "Linear.weight is quantized")


CHANGES = {
    "data": lambda w: setattr(w, "data", torch.zeros(3, 4)),
    "data +=": lambda w: w.data.__iadd__(1),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(3, 4)),
    "data[...] =": lambda w: w.data.__setitem__(..., 0),
    "[0] =": lambda w: w.__setitem__(0, 0),
    "+=": lambda w: w.__iadd__(1),
    "**=": lambda w: w.__ipow__(2),
    "detach": lambda w: w.detach().add_(1),
    "view": lambda w: w.view(-1).zero_(),
    "transposed": lambda w: w.t().copy_(torch.zeros(4, 3)),
    "T": lambda w: w.T.mul_(0),
    "row": lambda w: w[1].fill_(0),
    "rows": lambda w: [row.zero_() for row in w],
    "view of a view": lambda w: w.data.t()[1:].unsqueeze(0).zero_(),
    "chunks": lambda w: w.chunk(2)[1].zero_(),
    "same dtype": lambda w: w.float().contiguous().to("cpu").zero_(),
    "out": lambda w: torch.add(torch.zeros(3, 4), 1, out=w),
    "several out": lambda w: torch.max(torch.zeros(3, 4, 2), 2, out=(w, torch.zeros(3, 4, dtype=torch.int64))),
    "relu_": lambda w: torch.relu_(w),
    "inplace": lambda w: nn.functional.relu(-w.detach(), inplace=True) is nn.functional.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_add_([w, torch.zeros(1)], 1),
    "init": lambda w: nn.init.zeros_(w),
    "init by name": lambda w: nn.init.normal_(tensor=w),
    "kaiming": lambda w: nn.init.kaiming_uniform_(w),
    "vector": lambda w: nn.utils.vector_to_parameters(torch.zeros(12), [w]),
    "train": lambda w: w.requires_grad_(),
    "train by attribute": lambda w: setattr(w, "requires_grad", True),
    "grad": lambda w: setattr(w, "grad", torch.zeros(3, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_way_to_change_a_read_only_tensor_is_refused(change, mode):
    w = guarded()
    with mode(), pytest.raises(ReadOnlyWeightError, match=r"Linear\.weight is quantized.*dequantize.*clone"):
        CHANGES[change](w)
    assert torch.equal(w, guarded())
    assert not w.requires_grad


METHODS = [name for name in dir(Tensor) if name.endswith("_") and (not name.startswith("_") or name[:3] == "__i")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [Tensor, torch], ids=["methods", "functions"])
def test_no_method_or_function_of_torch_changes_a_read_only_tensor(place):
    names = [name for name in METHODS if callable(getattr(place, name, None))]
    assert len(names) > 50
    for name in names:
        for arguments in [(), (1,), (torch.ones(3, 4),), (1, torch.zeros(1, dtype=torch.int64), 1)]:
            w = guarded()
            with contextlib.suppress(Exception):
                getattr(place, name)(w, *arguments)
            assert (w.shape, w.dtype, w.tolist()) == ((3, 4), torch.float32, guarded().tolist()), name


def test_numpy_reads_and_cannot_write():
    with pytest.raises(ValueError, match="read-only"):
        guarded().numpy()[0] = 0
    array = guarded().__array__(torch.zeros((), dtype=torch.float64).numpy().dtype)
    array[0] = 0, 0, 0, 0  # the array has another dtype, so it is a copy


RESULTS = {
    "sum": lambda w: w + 1,
    "clone": lambda w: w.clone(),
    "data.clone": lambda w: w.data.clone(),
    "matrix product": lambda w: torch.ones(2, 4) @ w.t(),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 4), w),
    "other dtype": lambda w: w.half(),
    "index": lambda w: w[torch.tensor([0, 2])],
    "list": lambda w: torch.cat([w, w]),
    "named tuple": lambda w: torch.stack(Pair(w, w)),
    "by name": lambda w: torch.add(input=torch.ones(3, 4), other=w),
    "out": lambda w: torch.add(w, 1, out=torch.empty(3, 4)),
    "zeros like": torch.zeros_like,
    "maximum": lambda w: w.max(1).values,
    "sparse": lambda w: w.to_sparse(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "vmap": lambda w: torch.vmap(lambda row: row * 2)(w),
    "jacobian": lambda w: torch.func.jacrev(lambda x: (x @ w.t()).sum())(torch.ones(4)),
    "gradient": lambda w: torch.func.grad(lambda x: (x * x).sum())(w),
    "directional derivative": lambda w: torch.func.jvp(lambda x: x * w, (w,), (torch.ones(3, 4),))[1],
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at the first use of jvp
@pytest.mark.parametrize("compute", RESULTS)
def test_computing_with_a_read_only_tensor_gives_what_a_plain_one_gives(compute):
    w = guarded()
    result, expected = RESULTS[compute](w), RESULTS[compute](w.clone())
    assert type(result) is type(expected) is Tensor
    assert torch.equal(result.to_dense(), expected.to_dense())


def test_a_read_only_tensor_may_be_used_to_change_another():
    other = nn.Parameter(torch.zeros(3, 4))
    with torch.no_grad():
        other.copy_(guarded())
        other += guarded()
        other[0] = guarded()[0]
    other.data = guarded() + other.data
    assert other[1, 0] == 15
    assert torch.zeros(3, 4).add_(guarded()).sum() == 78


def test_gradients_flow_through_products_with_a_read_only_tensor():
    x = torch.ones(2, 4, requires_grad=True)
    nn.functional.linear(x, guarded()).sum().backward()
    assert torch.equal(x.grad, guarded().sum(0).expand(2, 4))


def test_freezing_and_dropping_gradients_is_allowed():
    w = guarded()
    w.requires_grad = False
    w.requires_grad_(False)
    w.grad = None
    assert isinstance(w, Tensor)
    assert not isinstance(w, nn.Parameter)
    assert repr(w) == repr(w.clone())
    assert w.float() is w


def test_torch_save_writes_a_plain_tensor():
    file = io.BytesIO()
    torch.save({"w": guarded()}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["w"]) is Tensor


def test_a_compiled_function_takes_a_read_only_tensor():
    result = torch.compile(lambda w: torch.cat([w * 2, w]), backend="aot_eager", fullgraph=True)(guarded())
    assert type(result) is Tensor
    assert torch.equal(result, torch.cat([guarded() * 2, guarded()]))


def test_a_tensor_of_another_class_stays_as_it_is():
    parameter = nn.Parameter(torch.ones(2))
    assert ReadOnlyTensor.of(parameter, "x") is parameter
