"""Calibration block by block: which blocks and groups are found, and which inputs are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.calibration.blocks import BlockCalibration
from fewbits.errors import CalibrationError
from fewbits.nn.eligibility import layout_of
from fewbits.nn.walk import slots


def calibration(model, batches, needs="cross_moment"):
    """A calibration of all matrices of a model that has seen the batches."""
    first = {id(slot.tensor): slot for slot in reversed(list(slots(model)))}
    layouts = {
        slot.name: layout_of(slot.module, slot.local, slot.tensor)[0]
        for slot in reversed(first.values())
        if slot.is_parameter and slot.tensor.dim() > 1
    }
    found = BlockCalibration(model.eval(), layouts, needs)
    with torch.no_grad():
        found.find_blocks(lambda: model(batches[0]))
        for batch in batches:
            found.observe(lambda batch=batch: model(batch))
    return found


def names(found):
    """The groups of weights, in order; those without statistics are in brackets."""
    groups = []
    for group in found.groups():
        if group:
            groups.append([name.removesuffix(".weight") if known else f"({name})" for name, known in group.items()])
    return groups


class Layer(nn.Module):
    """Attention-like: three projections of one input, then three layers that depend on one another."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.norm(x)
        mixed = torch.softmax(self.q(y) @ self.k(y).mT + (0 if mask is None else mask), -1) @ self.v(y)
        x = x + self.o(mixed)
        return x + self.down(F.silu(self.up(x))), None


class Decoder(nn.Module):
    """A chain of layers between an embedding and a head; every layer gets the same mask."""

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 20)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return self.head(x[:, -1:])


IDS = [torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_layers_that_share_an_input_are_one_group_and_the_rest_follow_in_order():
    groups = names(calibration(Decoder(2), IDS))
    per_layer = [["q", "k", "v"], ["o"], ["up"], ["down"]]
    expected = [[f"layers.{at}.{name}" for name in group] for at in range(2) for group in per_layer]
    assert groups == [["(embed.weight)", "head"], *expected]


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)])
def test_layers_of_different_sizes_that_share_an_input_have_statistics_for_all_their_rows(sizes):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = (nn.Linear(8, size) for size in sizes)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x)], -1)

    (group,) = [group for group in calibration(Grouped(), [torch.randn(70, 8)]).groups() if group]
    rows = {name: [known.rows for known in inputs] for name, inputs in group.items()}
    assert rows == {"q.weight": [slice(0, sizes[0])], "k.weight": [slice(0, sizes[1])]}


def test_inputs_are_those_of_the_model_that_is_quantized_so_far():
    model = Decoder(2)
    found = calibration(model, IDS)
    taken = {}
    for group in found.groups():
        for name, known in group.items():
            if known:
                taken[name] = known[0].statistics
            weight = model.get_parameter(name)
            found.replace(name, torch.zeros_like(weight) if "embed" not in name else weight.detach().clone())
    # All weights before a layer are zero, so its input is the embedding plus the biases of the layers before.
    with torch.no_grad():
        x = torch.cat([model.embed(ids).flatten(0, 1) for ids in IDS])
        for at, layer in enumerate(model.layers):
            assert_inputs(taken[f"layers.{at}.q.weight"], layer.norm(x))
            x = x + layer.o.bias
            assert_inputs(taken[f"layers.{at}.up.weight"], x)
            x = x + layer.down.bias


def assert_inputs(statistics, x):
    """Compare the second moment of the inputs that were taken with that of these inputs."""
    assert statistics.count == len(x)
    expected = x.double().mT @ x.double() / len(x)
    torch.testing.assert_close(statistics.second_moment, expected, atol=1e-5, rtol=1e-5)


def test_cross_moments_relate_inputs_to_those_of_the_float_model():
    model = Decoder(2)
    inputs = {}
    model.layers[1].down.register_forward_pre_hook(lambda _, args: inputs.setdefault("float", []).append(args[0]))
    with torch.no_grad():
        for ids in IDS:
            model(ids)
    reference = torch.cat([x.flatten(0, 1) for x in inputs["float"]]).double()
    model.layers[1].down._forward_pre_hooks.clear()
    found = calibration(model, IDS)
    for group in found.groups():
        if "layers.1.down.weight" in group:
            known = group["layers.1.down.weight"][0].statistics
        for name in group:
            found.replace(name, model.get_parameter(name).detach() * 0.5)
    assert not torch.allclose(known.cross_moment, known.second_moment, rtol=1e-2)
    own = calibration(model, IDS)
    for group in own.groups():
        if "layers.1.down.weight" in group:
            same = group["layers.1.down.weight"][0].statistics
    expected = reference.mT @ reference / len(reference)
    torch.testing.assert_close(same.cross_moment, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same.second_moment, expected, atol=1e-5, rtol=1e-4)


def test_a_model_without_a_chain_is_one_block():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.again(self.again(x * 2))

    assert names(calibration(Loop(), [torch.randn(3, 4)])) == [["first"], ["again"]]


def test_parallel_experts_of_a_module_list_are_one_group_but_not_the_layers_of_a_sequential():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))

        def forward(self, x):
            return x + sum(expert(x[at::3]).sum(0) for at, expert in enumerate(self.experts))

    groups = names(calibration(nn.Sequential(Experts(), Experts()), [torch.randn(9, 4)]))
    experts = [[f"{block}.experts.{at}.{layer}" for at in range(3)] for block in "01" for layer in "02"]
    assert groups == experts


def test_blocks_of_nested_sequentials_are_found_and_in_place_functions_do_no_harm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 1),
    )
    found = calibration(model, [torch.randn(2, 3, 8, 8)] * 2)
    assert names(found) == [["0"], ["1.2"], ["3"]]


def test_recurrent_and_attention_layers_show_their_inner_inputs():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.encoder(self.lstm(x)[0])

    found = names(calibration(Mixed(), [torch.randn(2, 5, 8)] * 2))
    assert [name for group in found for name in group] == [
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "encoder.self_attn.in_proj_weight",
        "encoder.self_attn.out_proj",
        "encoder.linear1",
        "encoder.linear2",
    ]


def test_a_block_with_a_memory_is_refused_when_it_is_run_again():
    class Growing(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    found = calibration(nn.Sequential(Growing(4, 4), nn.Linear(4, 4)), [torch.randn(3, 4)])
    with pytest.raises(CalibrationError, match=r"^0 gave another output when it was run again .*use_cache=False"):
        list(found.groups())


def test_a_batch_that_fails_leaves_the_calibration_as_it_was():
    model = Decoder(2)
    found = calibration(model, IDS[:1])

    def fails_at_the_end():
        model(IDS[1])
        raise IndexError

    with pytest.raises(IndexError), torch.no_grad():
        found.observe(fails_at_the_end)
    with torch.no_grad():
        found.observe(lambda: model(IDS[1]))
    counts = {name: known[0].statistics.count for group in found.groups() for name, known in group.items() if known}
    assert set(counts.values()) == {48, 8}  # the head sees only the last token of each window


def test_a_model_that_takes_another_way_in_a_later_batch_is_refused():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers[: len(x)]:
                x = layer(x)
            return x

    model = Skipping()
    found = calibration(model, [torch.randn(70, 4)])
    with pytest.raises(CalibrationError, match="did not all run once in this batch"):
        found.observe(lambda: model(torch.randn(2, 4)))
    counts = [known[0].statistics.count for group in found.groups() for known in group.values()]
    assert counts == [70, 70, 70]


def test_a_longer_batch_that_uses_a_weight_more_often_shows_all_its_inputs():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.cat([self.layer(part) for part in x.split(6)])

    data = [torch.randn(count, 8) for count in (5, 20, 13)]
    found = calibration(nn.Sequential(Chunked(), Chunked()), data)
    counts = {name: known[0].statistics.count for group in found.groups() for name, known in group.items()}
    assert counts == {"0.layer.weight": 38, "1.layer.weight": 38}


class SwiGLU(nn.Module):
    """Experts of three layers, two of which share an input. `routes` says which get tokens in a batch of some size."""

    def __init__(self, routes=lambda size: range(3)) -> None:
        super().__init__()
        self.experts, self.routes = nn.ModuleList(nn.Module() for _ in range(3)), routes
        for expert in self.experts:
            expert.gate, expert.up, expert.down = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        mixed = torch.zeros_like(x)
        for at in self.routes(len(x)):
            expert, own = self.experts[at], x[at::3]
            mixed[at::3] += expert.down(F.silu(expert.gate(own)) * expert.up(own))
        return x + mixed


def test_layers_of_parallel_experts_that_share_an_input_get_that_input():
    model, data = nn.Sequential(SwiGLU(), SwiGLU()), [torch.randn(90, 4), torch.randn(30, 4)]
    found = calibration(model, data, "second_moment")
    expected = [[f"0.experts.{at}.{name}" for at in range(3) for name in ("gate", "up")]]
    expected += [[f"0.experts.{at}.down" for at in range(3)]]
    groups = []
    for group in found.groups():
        groups += [[name.removesuffix(".weight") for name in group]] if group else []
        for at in range(3):
            for name in ("gate", "up"):
                if f"0.experts.{at}.{name}.weight" in group:
                    (known,) = group[f"0.experts.{at}.{name}.weight"]
                    assert_inputs(known.statistics, torch.cat([batch[at::3] for batch in data]))
    assert groups[:2] == expected


def test_consecutive_layers_of_a_module_list_are_groups_of_their_own():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x)) + x
            return x

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(Stage() for _ in range(2))

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

    found = names(calibration(Stages(), [torch.randn(9, 4)]))
    assert found == [[f"stages.{stage}.layers.{layer}"] for stage in range(2) for layer in range(3)]


def test_experts_without_tokens_in_the_first_batch_have_the_statistics_of_later_ones():
    model = nn.Sequential(*(SwiGLU(lambda size: {90: [1], 30: [0, 1]}.get(size, [2, 0])) for _ in range(2)))
    data = [torch.randn(size, 4) for size in (90, 30, 60, 30)]
    found = calibration(model, data)
    counts = {}
    for group in found.groups():
        counts |= {name: known[0].statistics.count for name, known in group.items() if known}
    names = ("gate", "up", "down")
    expected = {0: 10 + 20 + 10, 1: 30 + 10 + 10, 2: 20}
    assert counts == {
        f"{block}.experts.{at}.{name}.weight": count
        for block in (0, 1)
        for at, count in expected.items()
        for name in names
    }


def test_a_longer_batch_that_uses_several_groups_in_turn_shows_all_their_inputs():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.cat([self.down(torch.relu(self.up(part))) for part in x.split(6)])

    data = [torch.randn(count, 8) for count in (5, 20, 13)]
    found = calibration(nn.Sequential(Chunked(), Chunked()), data)
    counts = {name: known[0].statistics.count for group in found.groups() for name, known in group.items()}
    assert set(counts.values()) == {38}


def test_a_weight_of_two_blocks_is_calibrated_with_the_first_and_replaced_in_both():
    model = Decoder(3)
    for layer in model.layers[1:]:
        layer.up.weight = model.layers[0].up.weight
    found, seen = calibration(model, IDS), {}
    for group in found.groups():
        for name, known in group.items():
            assert name not in seen
            seen[name] = known[0].statistics if known else None
            found.replace(name, torch.zeros_like(model.get_parameter(name)))
    assert [name for name in seen if "up" in name] == ["layers.0.up.weight"]
    # The projection is zero in every block, so the layer after it sees what its bias gives.
    for at, layer in enumerate(model.layers):
        x = F.silu(layer.up.bias.detach()).expand(72, 16)
        assert_inputs(seen[f"layers.{at}.down.weight"], x)


def test_an_attention_projection_that_is_used_whole_and_in_parts_has_the_statistics_of_its_more_common_use():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = x + self.attention(x, x, x)[0]
            return x + self.attention(x, x[:, :2], x[:, :2])[0]

    found = calibration(nn.Sequential(Both(), Both()), [torch.randn(3, 5, 8)])
    rows = [known[0].rows for group in found.groups() for name, known in group.items() if "in_proj" in name]
    assert rows == [slice(0, 24), slice(0, 24)]


def test_caches_of_the_parts_of_a_composite_model_are_turned_off_and_on_again():
    class Config:
        def __init__(self, use_cache):
            self.use_cache = use_cache

    model = Decoder(2)
    model.layers[0].config, model.layers[1].config = Config(True), Config(False)
    seen = []
    model.head.register_forward_pre_hook(lambda *_: seen.extend(layer.config.use_cache for layer in model.layers))
    calibration(model, IDS)
    assert seen
    assert not any(seen)
    assert [layer.config.use_cache for layer in model.layers] == [True, False]


def test_training_flags_and_switches_of_torch_are_restored():
    model = Decoder(2).train()
    model.config = type("Config", (), {"use_cache": True})()
    layouts = {"head.weight": layout_of(model.head, "weight", model.head.weight)[0]}
    found = BlockCalibration(model, layouts, "second_moment")
    seen = []
    model.head.register_forward_pre_hook(lambda *_: seen.append(model.config.use_cache))
    found.find_blocks(lambda: model(IDS[0]))
    found.observe(lambda: model(IDS[0]))
    assert seen
    assert not any(seen)
    list(found.groups())
    assert model.config.use_cache
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training for module in model.modules())
