"""The tensors of a model, copies of its structure, and models that are refused."""

import threading

import pytest
import torch
from torch import nn

from fewbits.errors import SourceError
from fewbits.nn.walk import slots, structural_copy
from nn.cases import Mixed, Tied, convert, keeping, same_bits, seeded, snapshot, storages


def test_slots_are_every_tensor_under_every_name():
    names = {slot.name: slot.is_parameter for slot in slots(seeded(Tied))}
    assert names == dict.fromkeys(
        ["embed.weight", "first.weight", "first.bias", "again.weight", "again.bias", "head.weight"], True
    )


def test_slots_of_a_bare_layer_have_no_prefix():
    assert [slot.name for slot in slots(nn.Linear(2, 2))] == ["weight", "bias"]


def test_slots_tell_buffers_from_parameters_and_which_of_them_a_state_dict_has():
    model = seeded(Mixed)
    by_name = {slot.name: slot for slot in slots(model)}
    assert not by_name["offset"].is_parameter
    assert {name for name, slot in by_name.items() if slot.persistent} == set(model.state_dict())
    assert {name for name, slot in by_name.items() if slot.is_parameter} == {n for n, _ in model.named_parameters()}


def test_slots_leave_out_what_is_none():
    assert [slot.name for slot in slots(nn.BatchNorm1d(3, affine=False, track_running_stats=False))] == []


def test_a_slot_reads_what_its_module_holds_now_and_keeps_nothing_alive():
    layer = nn.BatchNorm1d(2)
    held = {slot.name: slot for slot in slots(layer)}
    layer.weight = nn.Parameter(torch.full((2,), 3.0))
    layer.running_mean = torch.full((2,), 4.0)
    assert held["weight"].tensor is layer.weight
    assert held["running_mean"].tensor is layer.running_mean
    del layer.weight
    with pytest.raises(SourceError, match="weight has been removed"):
        _ = held["weight"].tensor


@pytest.mark.parametrize("make", [Mixed, Tied])
def test_a_structural_copy_is_equal_and_shares_parameters_but_no_buffers(make):
    source = seeded(make)
    before = snapshot(source)
    copied = structural_copy(source)
    assert snapshot(copied).equals(before)
    assert snapshot(source).equals(before)
    parameters = {parameter.data_ptr() for parameter in source.parameters()}
    assert {parameter.data_ptr() for parameter in copied.parameters()} == parameters
    assert not {id(p) for p in source.parameters()} & {id(p) for p in copied.parameters()}
    assert not {buffer.data_ptr() for buffer in source.buffers()} & storages(copied)


def test_a_structural_copy_keeps_ties_and_references_outside_of_the_tree():
    copied = structural_copy(seeded(Tied))
    assert copied.embed.weight is copied.head.weight
    assert copied.beside[0] is copied.first is copied.again


def test_a_structural_copy_keeps_the_flat_weights_of_a_recurrent_layer():
    copied = structural_copy(nn.LSTM(2, 2))
    assert copied._flat_weights[0] is copied.weight_ih_l0


def test_a_hook_that_is_a_method_is_bound_to_the_copy():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.count = nn.Linear(2, 2), 0
            self.layer.register_forward_hook(self.note)

        def note(self, *_):
            self.count += 1

        def forward(self, x):
            return self.layer(x)

    source = Counting()
    copied = structural_copy(source)
    copied(torch.zeros(1, 2))
    assert (source.count, copied.count) == (0, 1)


def test_a_buffer_in_the_middle_of_a_graph_is_copied():
    source = nn.Linear(2, 2)
    source.register_buffer("doubled", source.weight * 2)
    assert same_bits(structural_copy(source).doubled, source.doubled)


def test_gradients_are_not_copied():
    source = nn.Linear(2, 2)
    source(torch.ones(1, 2)).sum().backward()
    assert structural_copy(source).weight.grad is None
    assert source.weight.grad is not None


class Refusing(nn.Module):
    def __deepcopy__(self, memo):
        raise ZeroDivisionError("no copies of me")


def _graph_output() -> torch.Tensor:
    return torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("attribute", "complaint"),
    [
        (threading.Lock, "TypeError.*lock"),
        (_graph_output, "RuntimeError.*graph leaves"),
        (Refusing, "ZeroDivisionError: no copies of me"),
    ],
    ids=["a lock", "a tensor in the middle of a graph", "a class that refuses"],
)
def test_what_cannot_be_copied_is_an_error_that_says_why_and_what_to_do(attribute, complaint):
    source = nn.Sequential(nn.Linear(2, 2))
    source.odd = attribute()
    with pytest.raises(SourceError, match=rf"Sequential cannot be copied \({complaint}.*inplace=True"):
        structural_copy(source)


# Refused by `prepare`.


def _with_sparse_parameter() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_parameter("extra", nn.Parameter(torch.eye(2).to_sparse()))
    return layer


def _with_sparse_buffer() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_buffer("extra", torch.eye(2).to_sparse_csr())
    return layer


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: nn.LazyLinear(4), r"late\.weight is not initialized"),
        (nn.LazyBatchNorm1d, r"late\.(weight|running_mean) is not initialized"),
        (lambda: nn.Linear(2, 2, device="meta"), r"late\.weight is on the meta device"),
        (lambda: nn.BatchNorm1d(2, affine=False, device="meta"), r"late\.running_mean is on the meta device"),
        (_with_sparse_parameter, r"late\.extra has layout torch\.sparse_coo"),
        (_with_sparse_buffer, r"late\.extra has layout torch\.sparse_csr"),
        (lambda: convert(nn.Linear(2, 2)), r"late is quantized already"),
        (lambda: convert(nn.Linear(2, 2), "fp16"), r"late is quantized already"),
    ],
    ids=[
        "lazy", "lazy buffers", "meta", "meta buffers", "sparse", "sparse buffer", "quantized", "cast",
    ],
)  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_what_cannot_be_quantized_is_refused_by_name(make, complaint, inplace):
    model = nn.ModuleDict({"early": nn.Linear(2, 2), "late": make()})
    with pytest.raises(SourceError, match=complaint):
        keeping().prepare(model, inplace=inplace)
    assert type(model["early"]) is nn.Linear


def test_a_quantized_layer_as_the_root_is_refused():
    with pytest.raises(SourceError, match=r"the root module is quantized already.*dequantize"):
        keeping().prepare(convert(nn.Linear(2, 2)))


def test_a_module_that_is_refused_can_be_prepared_once_it_has_been_repaired():
    quantizer, model = keeping(), nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(SourceError):
        quantizer.prepare(model)
    model(torch.zeros(1, 3))
    quantizer.prepare(model)
    assert quantizer.convert()[0].weight.shape == (4, 3)
