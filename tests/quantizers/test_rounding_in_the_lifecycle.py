"""Rounding strategies in the lifecycle: settings, the ledger, files, errors, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, CalibrationError, NonFiniteError
from fewbits.rounding import GPTQ, Qronos
from support.model_cases import Blocks


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator) * torch.logspace(-2, 0.5, 32)
    return [torch.randn(40, 32, generator=generator) @ mix for _ in range(count)]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


def output_error(net: nn.Module, **settings: object) -> float:
    """The mean squared error of the output on other inputs, relative to the output."""
    result = fewbits.quantize(net, "int4", group_size=32, min_elements=1, **settings)
    x = torch.cat(batches(8)[4:])
    with torch.no_grad():
        return float((result.model(x) - net(x)).square().mean() / net(x).square().mean())


def test_the_model_is_better_the_more_a_strategy_looks_at(net):
    plain = output_error(net)
    importance, gptq, qronos = (
        output_error(net, rounding=name, data=batches(), samples=None)
        for name in ("importance-search", "gptq", "qronos")
    )
    assert gptq < 0.7 * importance < 0.7 * plain
    assert qronos < 0.7 * importance


@pytest.mark.parametrize("rounding", ["gptq", {"name": "gptq", "damping": 0.01}, GPTQ()])
def test_a_strategy_is_given_by_name_by_table_or_as_an_object(net, rounding):
    config = (
        {} if isinstance(rounding, GPTQ) else {"config": fewbits.QuantizationConfig(rounding=rounding, scheme="int4")}
    )
    given = {} if config else {"rounding": rounding, "scheme": "int4"}
    result = fewbits.quantize(net, data=batches(), min_elements=1, samples=None, **config, **given)
    reasons = {row.reason for row in result.ledger if row.fate == "quantized" and "weight" in row.name}
    assert any(reason.endswith("codes by GPTQ(damping=0.01, refits=2, steps=12)") for reason in reasons)


def test_files_name_the_strategy_of_each_weight_and_load(net, tmp_path):
    result = fewbits.quantize(net, "int4", group_size=32, rounding="qronos", data=batches(), samples=None)
    path = tmp_path / "net.safetensors"
    result.quantizer.save(path)
    loaded = fewbits.load(path)
    assert torch.equal(loaded["head.weight"].dequantize(), result.model.head.weight)
    assert "codes by Qronos(damping=0.01" in path.read_bytes()[:65536].decode("latin-1")
    assert fewbits.verify(path).ok


@pytest.mark.parametrize("rounding", ["gptq", "qronos", "importance-search"])
def test_a_strategy_that_needs_data_refuses_to_go_without(net, rounding):
    with pytest.raises(CalibrationError, match="needs data; call observe"):
        fewbits.quantize(net, "int4", rounding=rounding)
    with pytest.raises(CalibrationError, match="needs data, and a state dict or a file has no forward"):
        fewbits.quantize(net.state_dict(), "int4", rounding=rounding)


def test_scale_search_needs_no_data_and_no_model(net):
    searched = fewbits.quantize(net.state_dict(), "int4", group_size=32, rounding="scale-search")
    assert searched.report.sqnr_db > fewbits.quantize(net.state_dict(), "int4", group_size=32).report.sqnr_db
    inplace = fewbits.quantize(net, "int4", group_size=32, rounding="scale-search").model
    assert torch.equal(inplace.head.weight, searched.model["head.weight"].dequantize())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": "gtpq"}, "gptq"),
        ({"rounding": {"name": "gptq", "dampening": 1}}, "damping"),
        ({"rounding": GPTQ}, "must be an instance of Rounding, or the name of one"),
        ({"rounding": fewbits.MinMaxObserver()}, "must be an instance of Rounding, or the name of one"),
        ({"scheme": "fp16", "rounding": "gptq"}, "fp16 has no codes"),
    ],
)
def test_a_rounding_that_does_not_exist_or_does_not_fit_is_refused(net, settings, message):
    with pytest.raises(ArgumentError, match=message):
        fewbits.quantize(net, **{"scheme": "int4", **settings})


def test_a_scheme_that_makes_its_own_codes_takes_no_rounding():
    class Own(fewbits.Int4Grouped):
        def quantize_tensor(self, weight, spec, observer):
            return super().quantize_tensor(weight, spec, observer)

    with pytest.raises(ArgumentError, match="Own makes codes in quantize_tensor; it takes no rounding"):
        Own(rounding="gptq")


def test_weights_without_data_are_named_in_a_warning_and_in_the_ledger(net, events):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused, self.embed = net, nn.Linear(32, 32), nn.Embedding(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    result = fewbits.quantize(
        Half(), "int4", rounding="gptq", group_size=32, data=batches(), include=["*.weight"], samples=None
    )
    warned = [event for event in events if event["event"] == "rounded_without_data"]
    assert [(event["tensors"], event["first"]) for event in warned] == [
        (1, "unused.weight: its rows saw fewer than 64 inputs, and were rounded without data")
    ]
    assert "rounded without data" in result.ledger["unused.weight"].reason
    assert "rounded without data" in result.ledger["embed.weight"].reason
    assert "without data" not in result.ledger["net.head.weight"].reason


def test_in_place_the_float_weights_are_freed_and_a_failed_run_cannot_go_on(net):
    weight = weakref.ref(net.blocks[0][0].weight)
    quantizer = fewbits.Int4Grouped(32, rounding=Qronos(), selector=fewbits.LayerSelector(min_elements=1))
    quantizer.prepare(net, inplace=True)
    quantizer.observe(batches(), samples=None)
    bad = net.blocks[2][2].weight
    kept = float(bad.detach()[0, 0])
    bad.data[0, 0] = torch.nan
    with pytest.raises((NonFiniteError, CalibrationError)):
        quantizer.convert()
    bad.data[0, 0] = kept
    assert weight() is None
    with pytest.raises(CalibrationError, match="quantized in part"):
        quantizer.convert()


def test_in_place_gives_the_same_codes(net):
    copied = fewbits.quantize(net, "int4", rounding="qronos", data=batches(), samples=None).model.state_dict()
    fewbits.quantize(net, "int4", rounding="qronos", data=batches(), samples=None, inplace=True)
    own = net.state_dict()
    assert own.keys() == copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in own if isinstance(own[name], torch.Tensor))


def test_observers_of_inputs_see_each_batch_once_beside_a_rounding_that_needs_data(net):
    class Counting(fewbits.MinMaxObserver):
        def observe_input(self, x):
            counts.append(len(x))
            super().observe_input(x)

    counts = []
    selector = fewbits.LayerSelector(include=["head"], min_elements=1)
    quantizer = fewbits.Int8PerChannel("static", rounding="gptq", activation_observer=Counting(), selector=selector)
    quantizer.prepare(net)
    quantizer.observe(batches(2))
    quantizer.convert()
    assert counts == [40, 40]
    assert quantizer.validate().ok
