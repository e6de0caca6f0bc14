"""`observe`: what a batch may be, and what the model looks like meanwhile and afterwards."""

from collections import UserDict, namedtuple
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fewbits
from fewbits import CalibrationError, Int8PerChannel, State
from lifecycle_helpers import Watcher, mlp

X = torch.arange(32.0).reshape(2, 16)
Pair = namedtuple("Pair", ["x", "target"])


def prepared(model=None, **options):
    quantizer = Int8PerChannel(**options)
    return quantizer, quantizer.prepare(model or mlp())


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, 3), [X, torch.ones(2)], Pair(X, None), {"input": X}, UserDict(input=X)],
    ids=["tensor", "tuple", "pair", "list", "named tuple", "mapping", "user mapping"],
)
def test_a_batch_is_fed_by_its_kind(batch):
    seen = []
    quantizer, _ = prepared(observer=Watcher(seen.append))
    quantizer.observe([batch])
    assert torch.equal(seen[0], X)
    assert quantizer.state is State.OBSERVED


@pytest.mark.parametrize(
    "batch", [None, 3, "text", [], (), [[1.0]], [None, X], {X}, object()], ids=[str(i) for i in range(9)]
)
def test_a_batch_that_cannot_be_fed_is_refused_with_the_way_out(batch):
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match=rf"type {type(batch).__name__} cannot be fed.*forward="):
        quantizer.observe([batch])
    assert quantizer.state is State.PREPARED


def test_forward_feeds_what_the_defaults_cannot():
    seen = []
    quantizer, model = prepared(observer=Watcher(seen.append))
    quantizer.observe([{"deep": [X]}], forward=lambda m, batch: (m is model) and m(batch["deep"][0]))
    assert torch.equal(seen[0], X)


@pytest.mark.parametrize("batches", [[], iter(()), (x for x in ()), {}])
def test_no_batch_at_all_is_refused(batches):
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match="no batch to observe"):
        quantizer.observe(batches)
    assert quantizer.state is State.PREPARED


def test_an_iterator_that_is_used_up_is_refused_the_second_time():
    quantizer, _ = prepared()
    batches = iter([X])
    quantizer.observe(batches)
    with pytest.raises(CalibrationError, match="used up"):
        quantizer.observe(batches)
    assert quantizer.state is State.OBSERVED


class Remembers(nn.Linear):
    """Remembers the mode it was run in."""

    modes = ()

    def forward(self, x):
        self.modes = (*self.modes, (self.training, torch.is_grad_enabled()))
        return super().forward(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_runs_in_eval_mode_without_gradients(inplace):
    quantizer = Int8PerChannel()
    model = quantizer.prepare(nn.Sequential(nn.Linear(16, 16), Remembers(16, 4)).train(), inplace=inplace)
    quantizer.observe([X, X])
    assert model[1].modes == ((False, False),) * 2
    assert model[1].training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_restored_one_by_one(fails):
    model = mlp().train()
    model[1].eval()
    quantizer, copy = prepared(model)

    def forward(m, batch):
        if fails:
            raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        quantizer.observe([X], forward=forward)
    assert [m.training for m in copy] == [True, False, True]
    assert [m.training for m in model] == [True, False, True]
    assert copy.training
    assert quantizer.state is (State.PREPARED if fails else State.OBSERVED)


def test_statistics_of_normalizations_do_not_move():
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)).train()
    quantizer, copy = prepared(model)
    quantizer.observe([X])
    assert torch.equal(copy[1].running_mean, torch.zeros(4))
    assert copy[1].num_batches_tracked == 0


def test_an_error_of_the_loader_reaches_the_user_as_it_is():
    def loader():
        yield X
        raise OSError("disk")

    quantizer, copy = prepared()
    with pytest.raises(OSError, match="disk"):
        quantizer.observe(loader())
    assert copy.training
    assert quantizer.state is State.PREPARED


def test_data_for_a_state_dict_is_refused():
    with pytest.raises(CalibrationError, match="no forward to observe"):
        fewbits.quantize(mlp().state_dict(), "int8", data=[X])


def test_observing_is_optional_and_changes_nothing_where_no_observer_needs_it():
    with_data = fewbits.quantize(mlp(), "int8", data=[X]).model
    assert torch.equal(with_data[0].weight, fewbits.quantize(mlp(), "int8").model[0].weight)


def test_a_loader_may_be_used_as_it_is():
    dataset = torch.utils.data.TensorDataset(torch.rand(8, 16), torch.arange(8))
    seen = []
    quantizer, _ = prepared(observer=Watcher(seen.append))
    quantizer.observe(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert [tuple(x.shape) for x in seen] == [(4, 16), (4, 32)] * 2
