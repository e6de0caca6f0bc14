"""Modules whose results are final need not run again: codes are the same as if all of a block ran every time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits
from fewbits import Int4Grouped, LayerSelector
from fewbits.calibration.finished import FinishedModules

WIDTH = 16


class Attention(nn.Module):
    """Four projections; returns a tuple, as attention layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        return self.o(mixed), None


class Layer(nn.Module):
    """A decoder layer. Subclasses change one thing that keeping outputs could break."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.runs = 0

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.attention(self.norm(x))[0]
        return x + self.feed_forward(self.norm(x))


class WritesToOutputs(Layer):
    """The block writes to what a module returned."""

    def forward(self, x):
        mixed = self.attention(self.norm(x))[0]
        mixed.add_(x)
        gated = self.gate(self.norm(mixed))
        return mixed + self.down(F.silu(gated, inplace=True) * self.up(mixed))


class WritesToInputs(Layer):
    """A module changes its input, which the block uses afterwards."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        y = self.norm(x)
        mixed = self.attention(y)
        return y + mixed + self.feed_forward(y)


class LeavesSomethingBehind(Layer):
    """A module leaves behind, besides its output, what a later one reads: the scale of this batch."""

    class Scaled(nn.Linear):
        def forward(self, x):
            self.scale = x.abs().amax()
            return super().forward(x)

    def __init__(self):
        super().__init__()
        self.gate = self.Scaled(WIDTH, 24)

    def feed_forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x)) * self.gate.scale


class RemembersTheLastBatch(LeavesSomethingBehind):
    """The same, with a first and a last batch that are equal: only batches between them show it."""


class Twice(Layer):
    """One layer is used at two places."""

    def forward(self, x):
        x = x + self.attention(self.norm(x))[0]
        x = x + self.feed_forward(self.norm(x))
        return x + self.attention(self.norm(x))[0]


class Routed(Layer):
    """Experts that get other tokens in every batch, or none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, WIDTH)) for _ in range(3)
        )
        self.router = nn.Linear(WIDTH, 3)

    def feed_forward(self, x):
        chosen, mixed = self.router(x).argmax(-1), torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            if (chosen == at).any():
                mixed[chosen == at] = expert(x[chosen == at])
        return mixed


class ByLength(Layer):
    """Long batches run in chunks, so they use a weight more often than the first batch."""

    def feed_forward(self, x):
        return torch.cat([super(ByLength, self).feed_forward(part) for part in x.split(6, 1)], 1)


class Nested(nn.Module):
    """A structured output that is not a tensor or a tuple of tensors."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wrapped = self.Wrapped(self.inner)

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return {"hidden": self.inner(x), "extra": "text"}

    def forward(self, x):
        return x + self.last(torch.relu(self.wrapped(x)["hidden"]))


KINDS = [
    Layer,
    WritesToOutputs,
    WritesToInputs,
    LeavesSomethingBehind,
    RemembersTheLastBatch,
    Twice,
    Routed,
    ByLength,
    Nested,
]
#: Windows and tokens of each batch.
SHAPES = {
    "equal": [(8, 6)] * 3,
    "one batch": [(16, 6)],
    "another last": [(8, 6), (8, 6), (3, 6)],
    "longer": [(8, 5), (8, 12), (8, 7)],
}


def batches(shapes, kind=Layer):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(*shape, WIDTH, generator=generator) for shape in shapes]
    if kind is RemembersTheLastBatch:
        made = [made[0], made[0], *(3 * batch for batch in made[1:]), made[0]]
    return made


def model(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind(), kind()).eval()


def quantized(kind, shapes, rounding="gptq"):
    selector = LayerSelector(min_elements=0)
    scheme = Int4Grouped(group_size=8, rounding=rounding, selector=selector)
    scheme.prepare(model(kind))
    scheme.observe(batches(shapes, kind))
    return scheme.convert()


def nothing_kept(self, batch, forward, same):
    return forward(lambda: None)


def assert_the_same_codes(kind, shapes, rounding, monkeypatch):
    fast = quantized(kind, shapes, rounding).state_dict()
    monkeypatch.setattr(FinishedModules, "run", nothing_kept)
    whole = quantized(kind, shapes, rounding).state_dict()
    assert fast.keys() == whole.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, fast[name])] == []


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_running_the_whole_block(kind, shapes, monkeypatch):
    assert_the_same_codes(kind, shapes, "gptq", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_qronos_are_those_of_running_the_whole_block(kind, shapes, monkeypatch):
    assert_the_same_codes(kind, shapes, "qronos", monkeypatch)


class Counted(nn.Linear):
    """Counts the forwards that end."""

    ended = 0

    def forward(self, x):
        y = super().forward(x)
        Counted.ended += 1
        return y


def runs(name, count):
    """How often a layer of the first block ran to its end, while the model was quantized with so many batches."""
    source = model(Layer)
    source[0].get_submodule(name).__class__ = Counted
    scheme = Int4Grouped(group_size=8, rounding="gptq", selector=LayerSelector(min_elements=0))
    scheme.prepare(source)
    scheme.observe(batches([(8, 6)] * count))
    before = Counted.ended
    scheme.convert()
    return Counted.ended - before


@pytest.mark.parametrize("name", ["attention.q", "attention.o", "gate", "up", "down"])
def test_each_further_batch_runs_a_layer_once(name):
    assert runs(name, count=6) - runs(name, count=3) == 3


def test_outputs_wait_in_a_file_if_activations_spill(tmp_path):
    kept = quantized(Layer, SHAPES["equal"]).state_dict()
    result = fewbits.quantize(
        model(Layer),
        Int4Grouped(group_size=8, rounding="gptq", selector=LayerSelector(min_elements=0)),
        data=batches(SHAPES["equal"]),
        spill=tmp_path,
        validate=False,
    )
    spilled = result.model.state_dict()
    assert all(torch.equal(value, spilled[name]) for name, value in kept.items())


@pytest.mark.parametrize("rounding", ["gptq", "qronos"])
def test_a_weight_that_no_product_shows_is_rounded_without_data(rounding):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.hidden = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x):
            return self.layer(x) + x @ torch.tanh(self.hidden)

    scheme = Int4Grouped(group_size=8, rounding=rounding, selector=LayerSelector(include=["*.hidden"], min_elements=0))
    result = fewbits.quantize(nn.Sequential(Scaled(), Scaled()), scheme, data=[torch.randn(80, WIDTH)])
    rows = {row.name: row for row in result.ledger}
    assert "saw fewer than 64 inputs" in rows["0.hidden"].reason
