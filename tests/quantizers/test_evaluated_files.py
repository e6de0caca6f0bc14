"""Files whose results are compared with a model of the same weights, before and after they are written."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import ArgumentError, CalibrationError, MismatchError, ValidationError

INT4 = {"group_size": 16, "min_elements": 1}


class Net(nn.Module):
    """Two layers whose output is a distribution over eight classes; the first ones are a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return {"logits": self.head(x)}


def batches(seed: int = 0, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 16, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def source(net, tmp_path_factory):
    """The weights of the model under other names."""
    path = tmp_path_factory.mktemp("source") / "in.safetensors"
    save_file({f"net.{name}": tensor.clone() for name, tensor in net.state_dict().items()}, path)
    return path


def quantize(source, net, out, **arguments):
    given = {"evaluate": batches(9), **INT4}
    return fewbits.quantize(source, "int4", model=net, output=out, **given | arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rounding": "qronos", "data": batches()},
        {"rounding": "gptq", "data": batches(), "tune": 1},
        {"data": batches(), "tune": 1},
        {"overrides": {"head": "fp16"}},
        {"symmetric": False},
    ],
    ids=["plain", "qronos", "tuned", "tuned without data for the rounding", "cast", "asymmetric"],
)
def test_a_file_is_compared_as_the_model_in_memory_is(source, net, tmp_path, arguments):
    on_disk = quantize(source, net, tmp_path / "out.safetensors", **arguments).report
    in_memory = fewbits.quantize(net, "int4", evaluate=batches(9), compute="exact", **INT4 | arguments).report
    figures = on_disk.model.figures
    assert figures.keys() == {"kl", "top1"}
    assert figures["kl"] > 0
    # Both compute exactly: some CPUs have kernels that round inputs to bfloat16.
    assert figures == pytest.approx(in_memory.model.figures, rel=1e-4)
    assert on_disk.model.positions == in_memory.model.positions
    outputs = {f"net.{t.name}": t.output_sqnr_db for t in in_memory.tensors if t.output_sqnr_db is not None}
    assert {t.name: t.output_sqnr_db for t in on_disk.tensors if t.output_sqnr_db is not None} == pytest.approx(
        outputs, rel=1e-4
    )
    assert "model: KL" in on_disk.summary()


def test_the_file_keeps_the_figures_of_the_model(source, net, tmp_path):
    result = quantize(source, net, tmp_path / "out.safetensors", rounding="gptq", data=batches())
    result.save(tmp_path / "again.safetensors")
    for path in ("out.safetensors", "again.safetensors"):
        found = Checkpoint(tmp_path / path).metadata
        assert found.model_metrics["kl"] == pytest.approx(result.report.model.figures["kl"], rel=1e-5)
        assert len(found.output_sqnr_db) == 3


def test_a_broken_limit_fails_the_report_and_the_file_stays(source, net, tmp_path):
    with pytest.raises(ValidationError, match=r"KL .* of the model is above 0 nats") as caught:
        quantize(source, net, tmp_path / "out.safetensors", limits={"kl": 0.0})
    result = caught.value.result
    assert not result.report.ok
    assert result.report.model.figures["kl"] > 0
    assert fewbits.verify(result.model, against=source).ok


def test_validate_compares_a_prepared_file_with_its_model(source, net, tmp_path):
    quantizer = fewbits.Int4Grouped(16, selector=fewbits.LayerSelector(min_elements=1))
    quantizer.prepare(source, model=net)
    quantizer.convert(output=tmp_path / "out.safetensors")
    assert quantizer.validate().model is None
    report = quantizer.validate(batches(9), metrics=["cosine"], limits={"cosine": 0.5})
    assert report.ok
    assert 0.9 < report.model.figures["cosine"] < 1
    assert Checkpoint(tmp_path / "out.safetensors").metadata.model_metrics == {}  # it was written before


def test_a_complete_file_is_compared_when_it_is_resumed(source, net, tmp_path):
    out = tmp_path / "out.safetensors"
    first = quantize(source, net, out)
    again = quantize(source, net, fewbits.Output(out, resume=True))
    assert again.quantizer.shares[0].converted == 0
    assert again.report.model == first.report.model


def test_another_evaluation_does_not_resume_an_unfinished_run(source, net, tmp_path):
    def stop(step):
        if step.activity == "convert":
            raise KeyboardInterrupt

    out, how = tmp_path / "out.safetensors", {"rounding": "gptq", "data": batches()}
    with pytest.raises(KeyboardInterrupt):
        quantize(source, net, out, progress=stop, **how)
    with pytest.raises(ArgumentError, match=r"its inputs changed: .*evaluation"):
        quantize(source, net, fewbits.Output(out, resume=True), metrics=["cosine"], **how)
    result = quantize(source, net, fewbits.Output(out, resume=True), **how)
    assert result.report.model.figures["kl"] > 0


def test_a_file_whose_cast_tensors_the_model_lacks_is_refused_before_the_conversion(source, net, tmp_path):
    other = Net()
    other.load_state_dict(net.state_dict())
    nn.init.zeros_(other.head.weight)
    with pytest.raises(MismatchError, match=r"net\.head\.weight"):
        quantize(source, other, tmp_path / "out.safetensors", overrides={"head": "fp16"})
    assert list(tmp_path.iterdir()) == []


# Data that cannot be run.


def sources(net, source, tmp_path):
    return [(net, {}), (source, {"model": net, "output": tmp_path / "out.safetensors"})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.randn(4, 5)], r"batch 1, of type Tensor, made Net fail"),
        ([], "the data has no batch"),
        (iter([]), "the data has no batch"),
        (torch.randn(4, 16), "a single Tensor is one batch"),
        ([torch.full((4, 16), float("nan"))], "the output of the float model holds NaN"),
    ],
    ids=["shape", "empty list", "empty iterator", "tensor", "nan"],
)
def test_a_first_batch_that_the_float_model_cannot_run_is_refused_before_the_conversion(
    source, net, tmp_path, data, message
):
    for given, arguments in sources(net, source, tmp_path):
        steps = []
        with pytest.raises(CalibrationError, match=message) as caught:
            fewbits.quantize(given, "int4", evaluate=data, progress=steps.append, **INT4, **arguments)
        assert steps == []
        assert caught.value.result is None
    assert list(tmp_path.iterdir()) == []


def test_the_first_batch_of_an_iterator_is_not_lost(net):
    whole = fewbits.quantize(net, "int4", evaluate=batches(9), **INT4).report.model
    assert fewbits.quantize(net, "int4", evaluate=iter(batches(9)), **INT4).report.model == whole


def raising():
    yield from batches(9, 1)
    raise ZeroDivisionError("no more")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda: [*batches(9, 1), torch.randn(4, 5)], CalibrationError, "batch 2, of type Tensor, made Net fail"),
        (raising, ZeroDivisionError, "no more"),
    ],
)
def test_a_later_batch_that_cannot_be_run_loses_no_result(source, net, tmp_path, data, error, message):
    for given, arguments in sources(net, source, tmp_path):
        with pytest.raises(error, match=message) as caught:
            fewbits.quantize(given, "int4", evaluate=data(), **INT4, **arguments)
        result = caught.value.result
        assert result.quantizer.validate(batches(9)).ok
    assert fewbits.verify(tmp_path / "out.safetensors", against=source).ok


def test_an_error_after_a_file_was_written_says_so(source, net, tmp_path):
    data = [*batches(9, 1), torch.randn(4, 5)]
    with pytest.raises(
        CalibrationError, match=r"out\.safetensors is written, but not compared with the model: batch 2"
    ):
        quantize(source, net, tmp_path / "out.safetensors", evaluate=data)


def test_a_loss_that_raises_loses_no_result(net):
    def picky(output, reference):
        raise KeyError("labels")

    tuning = fewbits.extend.Tuning(loss=picky)
    with pytest.raises(CalibrationError, match=r"loss=picky failed with KeyError: 'labels'") as caught:
        fewbits.quantize(net, "int4", data=batches(), tune=tuning, **INT4)
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value.result.model, Net)


def test_tuning_without_scales_is_refused_before_the_data_runs(source, net, tmp_path):
    for given, arguments in sources(net, source, tmp_path):
        steps = []
        with pytest.raises(ArgumentError, match="tune= changes scales, and float16 has none"):
            fewbits.quantize(given, "fp16", data=batches(), tune=1, progress=steps.append, **arguments)
        assert steps == []
