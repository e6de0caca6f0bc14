"""Uses each public name as a user would. mypy checks the types of this file (`make check`); pytest runs it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fewbits
from fewbits import errors, extend


class Small(nn.Module):
    """A model of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.up(x))
        return down


class Int6(fewbits.Quantizer):
    """A scheme of a user."""

    name = "int6"
    spec = fewbits.QuantSpec(bits=6, granularity="group", group_size=32)


class Twice(extend.Observer):
    """An observer of a user."""

    def observe_weight(self, weight: Tensor, spec: fewbits.QuantSpec) -> extend.QuantParams:
        params = fewbits.MinMaxObserver().observe_weight(weight, spec)
        return extend.QuantParams(params.scale * 2, params.zero_point)


def batches() -> list[Tensor]:
    return [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_quantize_a_model_and_load_it_again(tmp_path: Path) -> None:
    result = fewbits.quantize(Small(), "int8", exclude=["down"], min_elements=1)
    assert_type(result, fewbits.Result)
    assert_type(result.ledger, fewbits.Ledger)
    assert_type(result.report, fewbits.Report | None)
    assert_type(result.quantizer, fewbits.Quantizer)
    result.save(tmp_path / "small.safetensors")
    tensors = fewbits.load(tmp_path / "small.safetensors")
    assert_type(tensors, dict[str, Tensor | fewbits.QuantizedTensor])
    loaded = fewbits.load(tmp_path / "small.safetensors", into=Small())
    assert_type(loaded, Small)
    assert_type(loaded(batches()[0]), Any)
    weight = tensors["up.weight"]
    assert isinstance(weight, fewbits.QuantizedTensor)
    assert_type(weight.dequantize(), Tensor)
    assert_type(weight.spec, fewbits.QuantSpec)
    measurement = fewbits.measure(Small().up.weight, weight)
    assert_type(measurement, fewbits.Measurement)
    assert_type(measurement.sqnr_db, float)


def test_read_a_ledger_and_a_report() -> None:
    result = fewbits.quantize(Small(), "int8")
    rows = [assert_type(row, fewbits.LedgerRow) for row in result.ledger]
    assert [row.name for row in rows] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert_type(result.ledger["up.weight"].spec, extend.Spec | None)
    assert_type(result.ledger.bytes_after, int)
    assert_type(result.ledger.to_dict(), dict[str, Any])
    assert result.report is not None
    assert_type(result.report.ok, bool)
    assert_type(result.report.failures, list[str])
    tensors = assert_type(result.report.tensors, tuple[fewbits.TensorReport, ...])
    assert_type(tensors[0].measurement, fewbits.Measurement | None)
    assert_type(result.report.summary(), str)


def test_work_on_files(tmp_path: Path) -> None:
    torch.save(Small().state_dict(), tmp_path / "in.pt")
    config = fewbits.QuantizationConfig(scheme="int4", group_size=32, overrides={"down": "int8"})
    output = fewbits.Output(tmp_path / "out", max_shard_size="10kB", threads=1)
    planned = fewbits.plan(tmp_path / "in.pt", config=config, output=output)
    assert_type(planned, fewbits.Plan)
    assert_type(planned.ledger.bytes_after, int)
    assert_type(fewbits.quantize(tmp_path / "in.pt", config=config, output=output), fewbits.Result)
    assert_type(fewbits.verify(tmp_path / "out", tmp_path / "in.pt"), fewbits.Report)
    exported = fewbits.convert(tmp_path / "out", tmp_path / "other", "compressed-tensors", allow=True)
    assert_type(exported, extend.Exported)
    run = fewbits.FleetRun(tmp_path / "in.pt", "int8", output=tmp_path / "fleet")
    shares = [run.write(shard) for shard in run.begin()]
    assert_type(shares, list[extend.Share])
    assert_type(run.finish(shares), fewbits.Result)


def test_choose_bits_under_a_budget(tmp_path: Path) -> None:
    plan = fewbits.allocate(Small(), bits_per_weight=8.5, candidates=["nf4", "int8"])
    assert_type(plan, extend.Allocation)
    assert_type(plan.config, fewbits.QuantizationConfig)
    assert_type(plan.weights, tuple[extend.Allocated, ...])
    assert_type(plan.curve, extend.Curve)
    plan.save(tmp_path / "plan.json")
    assert_type(plan.bits_per_weight, float)


def test_go_through_the_lifecycle() -> None:
    quantizer = fewbits.Int4Grouped(group_size=32, observer=fewbits.MSEObserver(), selector=fewbits.LayerSelector())
    assert_type(quantizer.state, fewbits.State)
    quantizer.prepare(Small())
    assert_type(quantizer.ledger, fewbits.Ledger)
    quantizer.convert()
    assert_type(quantizer.validate(), fewbits.Report)
    assert quantizer.state is fewbits.State.VALIDATED


def test_every_scheme_and_observer_has_its_own_type() -> None:
    schemes: list[fewbits.Quantizer] = [
        fewbits.Int8PerChannel(activations="dynamic"),
        fewbits.Int8PerTensor(observer=fewbits.PercentileObserver(99.9)),
        fewbits.Int4Grouped(observer=Twice()),
        fewbits.FP16Cast(),
        Int6(),
    ]
    specs = [assert_type(scheme.spec, extend.Spec) for scheme in schemes]
    assert [isinstance(spec, fewbits.CastSpec) for spec in specs] == [False, False, False, True, False]
    inputs: list[extend.Observer] = [fewbits.HistogramObserver(), extend.MovingAverageMinMaxObserver()]
    for observer in inputs:
        scheme = fewbits.Int8PerChannel(activations="static", activation_observer=observer)
        assert fewbits.quantize(Small(), scheme, data=batches()).report is not None


def test_tune_explain_and_return_to_floats() -> None:
    reference = Small()
    model = fewbits.quantize(reference, "int8", min_elements=1).model
    assert_type(fewbits.tune(model, reference, batches()), extend.Tuned)
    fewbits.set_compute(model, "exact")
    explanation = fewbits.explain(model, batches()[0])
    assert_type(str(explanation), str)
    assert_type(fewbits.dequantize(model), Any)


def test_errors_have_one_base_class() -> None:
    with pytest.raises(fewbits.FewbitsError) as raised:
        fewbits.quantize(Small(), "int9")
    assert_type(raised.value, fewbits.FewbitsError)
    assert isinstance(raised.value, errors.ArgumentError)
    assert_type(fewbits.__version__, str)


def test_an_override_changes_a_spec() -> None:
    override = fewbits.Override(None, (("group_size", 64),))
    assert_type(override.spec(Int6().spec), extend.Spec)


def test_this_file_uses_every_public_name() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    used = {*re.findall(r"\bfewbits\.(\w+)", text), *re.findall(r"^from fewbits import (\w+), (\w+)$", text, re.M)[0]}
    assert set(fewbits.__all__) - used == set()
