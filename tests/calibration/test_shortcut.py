"""Blocks need not run for every batch that is observed: their arguments come from outside the chain."""

import pytest
import torch
from torch import nn

import fewbits
from fewbits import Int4Grouped, LayerSelector

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x, scale=None):
        self.runs += 1
        return x + torch.tanh(self.layer(x) * (1 if scale is None else scale))


class Chain(nn.Module):
    """A chain whose blocks get a second argument: from outside, or from the input of each block."""

    def __init__(self, argument: str = "outside") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.argument, self.heads = argument, 0

    def forward(self, x):
        scale = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x = block(x, scale if self.argument == "outside" else x.mean(-1, keepdim=True))
        self.heads += 1
        return self.head(x)


def batches(count=6):
    return [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def model(argument="outside", seed=0):
    torch.manual_seed(seed)
    return Chain(argument)


def quantized(source, forward=None, exclude=("head",), data=None):
    scheme = Int4Grouped(group_size=8, rounding="gptq", selector=LayerSelector(exclude=list(exclude), min_elements=0))
    working = scheme.prepare(source)
    scheme.observe(batches() if data is None else data, forward=forward)
    observed = [block.runs for block in working.blocks], working.heads
    return scheme.convert(), observed


def codes(result):
    return {name: tensor for name, tensor in result.state_dict().items() if "packed" in name}


def test_later_batches_are_observed_without_running_blocks_or_what_follows_them():
    _, (runs, heads) = quantized(model())
    # Twice to find the blocks and to observe the first batch.
    assert (runs, heads) == ([2, 2, 2], 2)


@pytest.mark.parametrize(
    ("source", "exclude"),
    [
        pytest.param(lambda: model("inside"), ["head"], id="arguments that depend on the blocks"),
        pytest.param(model, ["blocks.0.layer.bias"], id="a weight after the blocks"),
    ],
)
def test_blocks_run_for_every_batch_where_their_outputs_are_needed(source, exclude):
    _, (runs, heads) = quantized(source(), exclude=exclude)
    assert min(runs) >= len(batches())
    assert heads >= len(batches())


def test_the_codes_are_the_same_as_with_every_batch_run(monkeypatch):
    with_shortcut, (few, _) = quantized(model())
    monkeypatch.setattr("fewbits.calibration.blocks.BlockCalibration._may_skip_blocks", lambda *_: False)
    without, (many, _) = quantized(model())
    assert max(few) < min(many)
    assert codes(with_shortcut).keys() == codes(without).keys()
    assert all(torch.equal(value, codes(without)[name]) for name, value in codes(with_shortcut).items())


def test_a_forward_that_rejects_what_untouched_inputs_give_runs_whole():
    def forward(net, batch):
        hidden = batch
        for block in net.blocks:
            before = hidden
            hidden = block(hidden)
            if torch.equal(before, hidden):
                raise ValueError("a block did nothing")

    _, (runs, _) = quantized(model(), forward)
    assert min(runs) >= len(batches())


def test_a_later_batch_whose_forward_rejects_untouched_inputs_runs_whole():
    def forward(net, batch):
        hidden = batch
        for block in net.blocks:
            before, hidden = hidden, block(hidden)
            if batch.shape[0] == 3 and torch.equal(before, hidden):
                raise ValueError("a block did nothing")

    _, (runs, _) = quantized(model(), forward, data=[*batches(), torch.randn(3, WIDTH)])
    assert runs == [3, 3, 3]  # two for the first batch, one for the last


def test_after_an_interrupted_trial_every_batch_runs_whole():
    scheme = Int4Grouped(group_size=8, rounding="gptq", selector=LayerSelector(exclude=["head"], min_elements=0))
    working = scheme.prepare(model())
    calls = []

    def interrupted(net, batch):
        calls.append(batch)
        if len(calls) == 3:  # the first batch, without its blocks
            raise KeyboardInterrupt
        net(batch)

    with pytest.raises(KeyboardInterrupt):
        scheme.observe(batches(), forward=interrupted)
    scheme.observe(batches())
    assert min(block.runs for block in working.blocks) >= len(batches())


def test_an_observer_of_inputs_sees_the_true_inputs_of_every_batch():
    selector = LayerSelector(exclude=["head"], min_elements=0)
    scheme = fewbits.Int8PerChannel(rounding="gptq", activations="static", selector=selector)
    working = scheme.prepare(model())
    scheme.observe(batches())
    assert min(block.runs for block in working.blocks) >= len(batches())


def test_forwards_of_blocks_are_as_before():
    source = model()
    own = source.blocks[1].forward
    source.blocks[1].forward = own  # as libraries do that wrap the forward of one module
    scheme = Int4Grouped(group_size=8, rounding="gptq", selector=LayerSelector(exclude=["head"], min_elements=0))
    working = scheme.prepare(source, inplace=True)
    scheme.observe(batches())
    assert ["forward" in block.__dict__ for block in working.blocks] == [False, True, False]
    assert not any(block._forward_hooks for block in working.blocks)
