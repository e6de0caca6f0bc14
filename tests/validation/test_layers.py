"""The output error of each layer: which weight is the culprit, and what decides its verdict."""

from __future__ import annotations

import functools
import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import ValidationError
from fewbits.nn.stored import stored_weights
from fewbits.numerics.metrics import sqnr_db
from fewbits.rounding import GPTQ
from fewbits.rounding.nearest import RoundToNearest
from fewbits.validation.layers import LayerErrors
from support.model_cases import Int3, blocks, inputs, tiny_lm, tokens


class Int2(Int3):
    spec = fewbits.QuantSpec(bits=2, granularity="group", group_size=32)


def by_hooks(model: nn.Module, quantized: nn.Module, data: list[torch.Tensor]) -> dict[str, float]:
    """The output SQNR of each Linear layer, from the inputs that hooks see in the float model."""
    powers = {}

    def hook(name, layer, x):
        weight = layer.weight.double()
        error = weight - quantized.get_submodule(name).weight.double()
        signal, noise = powers.get(name, (0.0, 0.0))
        x = x[0].double().flatten(0, -2)
        powers[name] = signal + float((x @ weight.T).square().sum()), noise + float((x @ error.T).square().sum())

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        layer.register_forward_pre_hook(lambda layer, x, name=name: hook(name, layer, x))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": sqnr_db(*found) for name, found in powers.items()}


def weights_of(model: nn.Module) -> dict[str, object]:
    return {
        f"{path}.{local}": stored
        for path, module in model.named_modules()
        for local, stored in stored_weights(module).items()
    }


def outputs_of(report: fewbits.Report) -> dict[str, float]:
    return {t.name: t.output_sqnr_db for t in report.tensors if t.output_sqnr_db is not None}


@functools.cache
def quantized(symmetric: bool) -> fewbits.api.Result:
    return fewbits.quantize(blocks(), "int4", group_size=32, symmetric=symmetric, min_elements=1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans())
def test_the_output_error_is_that_of_a_direct_computation_for_any_batches(sizes, symmetric):
    x, result = inputs(1, size=sum(sizes))[0], quantized(symmetric)
    values = {name: slot.value() for name, slot in weights_of(result.model).items()}
    model = blocks()
    errors = LayerErrors(model, result.ledger, values.__getitem__)
    with torch.no_grad():
        for batch in x.split(sizes):
            with errors.watching():
                model(batch)
    assert errors.sqnr_db() == pytest.approx(by_hooks(model, result.model, [x]), abs=1e-3)


def test_validate_reports_the_output_error_of_each_layer():
    result, data = quantized(True), inputs()
    report = result.quantizer.validate(data)
    assert outputs_of(report) == pytest.approx(by_hooks(blocks(), result.model, data), abs=1e-3)


@pytest.mark.parametrize("setting", [("_SMALL", 0), ("_OUTPUTS", 1)])
def test_the_output_error_does_not_depend_on_how_much_is_decoded_at_a_time(setting, monkeypatch):
    whole = fewbits.quantize(blocks(), Int3(), evaluate=inputs()).report
    monkeypatch.setattr(f"fewbits.validation.layers.{setting[0]}", setting[1])
    assert outputs_of(fewbits.quantize(blocks(), Int3(), evaluate=inputs()).report) == pytest.approx(outputs_of(whole))


class Mixed(nn.Module):
    """Weights that are used in part: attention projections, groups of a convolution, recurrent and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 3, groups=4, padding=1)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.rnn = nn.GRU(64, 64, batch_first=True)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.mT).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.rnn(x)[0]


def test_weights_of_all_kinds_of_layers_have_an_output_error_and_unused_weights_have_none():
    torch.manual_seed(0)
    data = [torch.randn(3, 5, 64) for _ in range(2)]
    report = fewbits.quantize(Mixed().eval(), "int4", symmetric=False, group_size=32, evaluate=data).report
    found = outputs_of(report)
    assert found.keys() == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
    }
    # For inputs without any structure, an output loses what its weight loses.
    own = {t.name: t.measurement.sqnr_db for t in report.tensors if t.measurement is not None}
    assert found == pytest.approx({name: own[name] for name in found}, abs=3)


@pytest.mark.parametrize("culprit", ["blocks.0.2.weight", "blocks.2.0.weight", "head.weight"])
def test_the_layer_with_the_damage_is_named(culprit):
    class Damaging(fewbits.Int8PerChannel):
        def quantize_tensor(self, weight, spec, observer):
            own = super().quantize_tensor(weight, spec, observer)
            if own.shape != damaged.shape or not torch.equal(weight.tensor, damaged):
                return own
            return attrs.evolve(own, scale=own.scale * 1.3)

    model = blocks()
    damaged = model.get_parameter(culprit)
    scheme = Damaging(selector=fewbits.LayerSelector(min_elements=1))
    report = fewbits.quantize(model, scheme, evaluate=inputs(), on_failure="ignore").report
    found = outputs_of(report)
    assert min(found, key=found.__getitem__) == culprit
    assert sorted(found.values())[1] > found[culprit] + 15
    assert f"output SQNR of 7 weights on data: least {found[culprit]:.2f} dB ({culprit})" in report.summary(200)
    (described,) = [t for t in report.to_dict()["tensors"] if t["name"] == culprit]
    assert described["output_sqnr_db"] == found[culprit]
    assert "output dB" in report.table(90)
    assert f"{found[culprit]:.2f}" in report.table(90)


def test_a_weight_with_error_feedback_is_judged_by_its_output(tmp_path):
    """Its own SQNR may be below the limit although the model is better than with plain rounding."""
    result = fewbits.quantize(blocks(), Int2(rounding="gptq"), data=inputs(8), samples=None)
    low = [t for t in result.report.tensors if t.measurement is not None and t.measurement.sqnr_db < 10]
    assert len(low) == 7
    assert result.report.ok
    for t in low:
        assert t.output_sqnr_db > 14
        assert t.verdict == "warning"
    least = min(outputs_of(result.report).values())
    assert f"output SQNR {least:.2f} dB in int2" in result.report.warnings[0]
    result.save(tmp_path / "net.safetensors")
    result.save(tmp_path / "net", max_shard_size=3000)
    for path in (tmp_path / "net.safetensors", tmp_path / "net"):
        again = fewbits.verify(path, blocks())
        assert again.ok
        assert outputs_of(again) == pytest.approx(outputs_of(result.report), rel=1e-5)
        assert [t.verdict for t in again.tensors] == [t.verdict for t in result.report.tensors]


def test_the_output_error_from_calibration_is_that_of_the_calibration_data():
    """In one block, GPTQ sees the inputs of the float model up to the first layer's."""
    model = nn.Sequential(nn.Linear(32, 64))
    data = inputs(8)
    result = fewbits.quantize(model, Int3(rounding="gptq"), data=data, samples=None)
    assert outputs_of(result.report) == pytest.approx(by_hooks(model, result.model, data), abs=0.01)


def test_a_low_output_sqnr_fails_the_weight_even_if_its_own_is_high():
    model = nn.Linear(32, 8, bias=False)
    torch.nn.init.normal_(model.weight)
    model.weight.data[:, 0] = 100.0  # one column decides the scale, and its input is always zero
    data = [torch.randn(20, 32).index_fill(1, torch.tensor([0]), 0.0)]
    quantizer = fewbits.Int4Grouped(32, selector=fewbits.LayerSelector(min_elements=1))
    quantizer.prepare(model)
    quantizer.convert()
    assert quantizer.validate().ok
    with pytest.raises(ValidationError, match=r"weight: output SQNR .* dB is below 10 dB"):
        quantizer.validate(data)
    assert quantizer.validate(data, fail_under=-99.0).ok


def test_a_figure_of_calibration_is_dropped_when_the_codes_change(tmp_path):
    quantizer = Int3(rounding="gptq")
    quantizer.prepare(blocks())
    quantizer.observe(inputs(8), samples=None)
    model = quantizer.convert()
    assert "head.weight" in outputs_of(quantizer.validate())
    state = model.head.state_dict()
    state["weight_scale"] = state["weight_scale"] * 3
    model.head.load_state_dict(state)
    report = quantizer.validate(on_failure="ignore")
    assert "head.weight" not in outputs_of(report)
    assert [failure.split(":")[0] for failure in report.failures if "SQNR" in failure] == ["head.weight"]
    quantizer.save(tmp_path / "net.safetensors")
    assert "head.weight" not in Checkpoint(tmp_path / "net.safetensors").metadata.output_sqnr_db


def test_validation_data_outranks_calibration_data():
    result = fewbits.quantize(blocks(), Int3(rounding="gptq"), data=inputs(8), samples=None)
    calibrated = outputs_of(result.report)
    other = [torch.randn(50, 32, generator=torch.Generator().manual_seed(3))]
    measured = outputs_of(result.quantizer.validate(other, on_failure="ignore"))
    assert measured == pytest.approx(by_hooks(blocks(), result.model, other), abs=1e-3)
    assert measured["blocks.0.0.weight"] < calibrated["blocks.0.0.weight"] - 3
    assert outputs_of(result.quantizer.validate()) == calibrated


@pytest.mark.parametrize(
    ("scheme", "advice"),
    [
        (Int3(), 'rounding="gptq" with data, smaller groups, or int8'),
        (Int3(rounding="gptq"), "smaller groups or int8"),
        (fewbits.Int8PerTensor(), 'int8 per channel, smaller groups, or observer="mse"'),
    ],
)
def test_the_advice_fits_the_scheme(scheme, advice, events):
    generator = torch.Generator().manual_seed(0)
    model, data = nn.Linear(64, 64), [torch.randn(200, 64, generator=generator)]
    nn.init.normal_(model.weight, generator=generator)
    if isinstance(scheme, fewbits.Int8PerTensor):
        model.weight.data[0, 0] = 100
    report = fewbits.quantize(model, scheme, data=data, samples=None, on_failure="ignore", fail_under=-99.0).report
    (low,) = [event for event in events if event["event"] == "low_sqnr"]
    assert low["advice"].startswith(advice)
    assert f"{report.advice}." in report.summary(500)


class Idle(GPTQ):
    """Asks for data and ignores it."""

    def choose(self, weight, spec, params, inputs):
        return RoundToNearest().choose(weight, spec, params, inputs)


def test_data_that_changes_nothing_is_a_warning_with_the_name_of_the_strategy(events):
    report = fewbits.quantize(blocks(), Int3(rounding=Idle()), data=inputs(), samples=None).report
    (warned,) = [event for event in events if event["event"] == "same_as_nearest"]
    assert warned["log_level"] == "warning"
    assert (warned["rounding"], warned["tensors"]) == (repr(Idle()), 7)
    assert [note for note in report.notes if "the data has changed nothing" in note and repr(Idle()) in note]


@pytest.mark.parametrize("rounding", ["gptq", "qronos", "importance-search", "scale-search", None])
def test_a_strategy_that_uses_its_data_is_not_said_to_have_changed_nothing(rounding, events):
    needs_data = rounding not in ("scale-search", None)
    data = {"data": inputs(), "samples": None} if needs_data else {}
    report = fewbits.quantize(blocks(), Int3(rounding=rounding), on_failure="ignore", **data).report
    assert not [event for event in events if event["event"] in ("same_as_nearest", "rounded_without_data")]
    assert not [note for note in report.notes if "data" in note]
    known = {"gptq", "qronos"}
    assert bool(outputs_of(report)) == (rounding in known)


def test_int8_inputs_do_not_hide_that_data_has_changed_nothing(events):
    scheme = fewbits.Int8PerChannel("static", rounding=Idle(), selector=fewbits.LayerSelector(min_elements=1))
    fewbits.quantize(blocks(), scheme, data=inputs(), samples=None)
    assert [event["tensors"] for event in events if event["event"] == "same_as_nearest"] == [7]


def test_weights_that_were_rounded_without_data_are_a_note_of_the_report():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = blocks(), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    report = fewbits.quantize(Half(), Int3(rounding="gptq"), data=inputs(), samples=None).report
    (note,) = [note for note in report.notes if "without data, first unused.weight" in note]
    assert note.startswith("GPTQ(damping=0.01")
    assert f"note: {note[:30]}" in report.summary(500)
    assert "unused.weight" not in outputs_of(report)


def test_a_language_model_in_one_call():
    model = tiny_lm()
    result = fewbits.quantize(
        model, Int3(rounding="qronos"), data=tokens(8), samples=None, evaluate=tokens(2, seed=9), limits={"kl": 1.0}
    )
    assert result.report.model.figures["kl"] < 1
    assert math.isfinite(outputs_of(result.report)["body.head.weight"])


def test_a_tuned_weight_is_judged_by_its_output_before_tuning_or_by_validation_data(tmp_path):
    data = inputs(8)
    result = fewbits.quantize(blocks(), Int2(rounding="gptq"), data=data, samples=None, tune=1)
    assert all(row.tuned for row in result.ledger if row.fate == "quantized")
    assert result.report.ok
    result.save(tmp_path / "net.safetensors")
    assert fewbits.verify(tmp_path / "net.safetensors", blocks()).ok
    report = result.quantizer.validate(data)
    assert outputs_of(report) == pytest.approx(by_hooks(blocks(), result.model, data), abs=1e-3)
