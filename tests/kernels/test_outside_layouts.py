"""A kernel from outside brings a weight layout of its own."""

import copy
import io
import pickle
import sys
from multiprocessing.reduction import ForkingPickler

import attrs
import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.extend import Kernel, PackedInt32, WeightLayout
from fewbits.kernels import ops, weight_layouts
from fewbits.numerics.tensor import same_bits
from fewbits.testing import check_kernel
from kernels.kernel_cases import INT8, linear, normal, quantized


@attrs.define(eq=False, kw_only=True)
class Columns(WeightLayout):
    """Unsigned codes, column after column."""

    name = "columns"
    data = ("by_column",)

    by_column: torch.Tensor

    @classmethod
    def refuses(cls, weight):
        return weight_layouts.refuses_any(weight)

    @classmethod
    def of(cls, weight, *, reuse_memory=False):
        return cls(by_column=weight.codes(slice(None)).t().contiguous(), **weight.shared())

    def codes(self, where):
        return weight_layouts.taken(self.by_column.t(), where)


class ByColumns(Kernel[Columns]):
    """Multiplies in float64."""

    name = "by_columns"
    weight_layout = Columns

    def supports(self, weight):
        return Columns.refuses(weight)

    def takes(self, x, rows, weight):
        return None

    def linear(self, x, weight):
        return (x.double() @ weight.decoded(slice(None)).double().t()).float()


@pytest.fixture(autouse=True)
def known_layouts(monkeypatch):
    """Forget the layouts that a test registers."""
    monkeypatch.setattr(weight_layouts, "WEIGHT_LAYOUTS", known := dict(weight_layouts.WEIGHT_LAYOUTS))
    for module in ("fewbits.kernels.ops", "fewbits.nn.packed"):
        monkeypatch.setattr(sys.modules[module], "WEIGHT_LAYOUTS", known)
    yield known
    ops._read.cache_clear()


@pytest.fixture
def module():
    module = quantized(linear(40, 33), INT8)
    fewbits.set_compute(module, "auto", kernels=[ByColumns()])
    return module


def layout_of(module):
    return module.weight_stored.weight_layout().name


@pytest.mark.parametrize("check", check_kernel(ByColumns(), max_examples=2), ids=str)
def test_it_conforms(check):
    check()


def test_its_layout_replaces_the_words(module):
    x = normal(3, 33)
    (row,) = fewbits.explain(module, x).rows
    assert (row.weight_layout, row.kernel) == ("columns", "by_columns")
    assert {name for name, _ in module.weight_stored.named_buffers()} == {"by_column", "scale"}
    assert module(x).shape == (3, 40)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: pickle.loads(bytes(ForkingPickler.dumps(module))),
        lambda module: copy.deepcopy(module).to(torch.float64).to(torch.float32),
        lambda module: copy.deepcopy(module).share_memory(),
    ],
    ids=["deepcopy", "pickle", "another process", "to", "share_memory"],
)
def test_copies_take_the_same_layout(module, copied):
    x = normal(3, 33)
    expected = module(x).detach()
    other = copied(module)
    assert layout_of(other) == "columns"
    assert torch.equal(other(x), expected)


def test_a_pickle_for_another_process_registers_the_layout(module, known_layouts):
    data = bytes(ForkingPickler.dumps(module))
    del known_layouts["columns"]
    assert layout_of(pickle.loads(data)) == "columns"


def test_state_dicts_hold_the_canonical_words(module):
    plain = quantized(linear(40, 33), INT8)
    assert {name: t.tolist() for name, t in module.state_dict().items()} == {
        name: t.tolist() for name, t in plain.state_dict().items()
    }
    other = quantized(nn.Linear(33, 40), INT8)
    fewbits.set_compute(other, "auto", kernels=[ByColumns()])
    other.load_state_dict(module.state_dict())
    assert layout_of(other) == "columns"
    assert torch.equal(other(normal(3, 33)), module(normal(3, 33)))


def test_a_replaced_buffer_keeps_the_layout(module):
    stored = module.weight_stored
    value = stored.value()
    stored._buffers["by_column"] = stored._buffers["by_column"].clone()
    assert layout_of(module) == "columns"
    assert same_bits(stored.value().packed, value.packed)


def test_another_device_gets_the_canonical_layout(module):
    assert layout_of(module.to("meta")) == "packed_int32"


def test_leaving_the_kernel_restores_the_words(module):
    packed = module.weight_stored.value().packed
    fewbits.set_compute(module, "exact")
    assert layout_of(module) == "packed_int32"
    assert same_bits(module.weight_stored.value().packed, packed)


def test_gradients_pass_through_it(module):
    x = normal(3, 33).requires_grad_()
    module(x).sum().backward()
    expected = module.weight_stored.dequantize().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected)


def test_an_exported_program_computes_with_it(module, known_layouts):
    x = normal(3, 33)
    program = torch.export.export(module, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x), module(x))
    del known_layouts["columns"]
    ops._read.cache_clear()
    with pytest.raises(ArgumentError, match="'columns', which this process does not know"):
        loaded(x)
    Columns.register()
    torch.testing.assert_close(loaded(x), module(x))


def renamed(**changes):
    return type("Other", (Columns,), {"__module__": "elsewhere"} | changes)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (renamed(), "shares a name with Columns"),
        (renamed(name="others"), "shares a name with Columns"),
        (renamed(name=""), "needs a name, and data"),
        (renamed(name="others", data=()), "needs a name, and data"),
        (renamed(name="others", data=("nothing",)), "needs a name, and data"),
    ],
)
def test_a_layout_that_cannot_be_told_from_another_is_refused(module, layout, why):
    Other = type("OtherKernel", (ByColumns,), {"name": "other", "weight_layout": layout})
    before = module.weight_stored.weight_layout()
    with pytest.raises(ArgumentError, match=why):
        fewbits.set_compute(module, "exact", kernels=[ByColumns(), Other()])
    assert module.weight_stored.weight_layout() is before
    assert module.weight_stored.compute == "auto"


def test_a_layout_that_is_defined_again_replaces_the_first(module):
    again = type("Columns", (Columns,), {"__module__": Columns.__module__, "__qualname__": Columns.__qualname__})
    again.register()
    assert weight_layouts.WEIGHT_LAYOUTS["columns"] is again


def test_a_layout_needs_a_name():
    class Nameless(WeightLayout):
        pass

    with pytest.raises(ArgumentError, match="Nameless needs a name"):
        Nameless.register()
    assert PackedInt32.register() is None
