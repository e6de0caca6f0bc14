"""Files that are quantized with a model of the same weights: matching, activations in files, interruptions."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fewbits
from fewbits.calibration.spill import KeptTensors
from fewbits.errors import ArgumentError, CalibrationError, MismatchError, StateError
from fewbits.numerics.affine import encode
from fewbits.rounding import GPTQ, Qronos


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """A chain of three blocks, and a head outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def source(net, tmp_path_factory):
    """The weights of the model under other names, in bfloat16 where that changes nothing."""
    folder = tmp_path_factory.mktemp("source")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.bfloat16())
    tensors = {f"net.{name}": tensor.detach().clone() for name, tensor in net.state_dict().items()}
    tensors["net.head.weight"] = tensors["net.head.weight"].bfloat16()
    save_file(tensors, folder / "in.safetensors")
    return folder / "in.safetensors"


def batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 16, generator=generator) for _ in range(3)]


def quantize(source, net, out, **arguments):
    """Quantize with Qronos, unless told otherwise."""
    given = {"rounding": "qronos", "data": batches(), "samples": None, "group_size": 16, "min_elements": 1}
    return fewbits.quantize(source, "int4", model=net, output=out, **given | arguments)


@pytest.fixture(scope="module")
def expected(source, net, tmp_path_factory) -> bytes:
    """The bytes of the file of an undisturbed run."""
    out = tmp_path_factory.mktemp("expected") / "out.safetensors"
    quantize(source, net, out)
    return out.read_bytes()


def test_a_file_gets_the_codes_of_its_model(source, net, tmp_path):
    result = quantize(source, net, tmp_path / "out.safetensors")
    assert result.report.ok
    settings = {"rounding": "qronos", "data": batches(), "samples": None, "group_size": 16, "min_elements": 1}
    in_memory = fewbits.quantize(net, "int4", **settings)
    found = fewbits.load(tmp_path / "out.safetensors")
    for name in [f"blocks.{at}.{layer}" for at in range(3) for layer in ("up", "down")]:
        weight = found[f"net.{name}.weight"].dequantize()
        assert torch.equal(weight, in_memory.model.get_submodule(name).weight), name
    assert found["net.head.weight"].dequantize().dtype == torch.bfloat16
    assert all(parameter.isfinite().all() and not parameter.grad for parameter in net.parameters())
    assert "codes by Qronos" in result.ledger["net.head.weight"].reason


def test_the_report_of_a_file_knows_the_output_errors_and_the_data_of_the_calibration(source, net, tmp_path):
    settings = {"rounding": "qronos", "data": batches(), "samples": None, "group_size": 16, "min_elements": 1}
    in_memory = fewbits.quantize(net, "int2", on_failure="ignore", fail_under=8.0, **settings).report
    file = fewbits.quantize(source, "int2", model=net, output=tmp_path / "out.safetensors", fail_under=8.0, **settings)
    known = {f"net.{t.name}": t.output_sqnr_db for t in in_memory.tensors if t.output_sqnr_db is not None}
    assert len(known) == 7
    found = {t.name: t.output_sqnr_db for t in file.report.tensors if t.output_sqnr_db is not None}
    assert found == pytest.approx(known, rel=1e-4)
    verdicts = {f"net.{t.name}": t.verdict for t in in_memory.tensors}
    assert {t.name: t.verdict for t in file.report.tensors} == verdicts
    assert file.report.observed == in_memory.observed
    assert "output SQNR" in file.report.summary()
    file.save(tmp_path / "again.safetensors")
    for path in ("out.safetensors", "again.safetensors"):
        checked = fewbits.verify(tmp_path / path, source, fail_under=8.0)
        assert {t.name: t.output_sqnr_db for t in checked.tensors if t.output_sqnr_db is not None} == found


def test_a_calibration_of_a_file_that_changes_nothing_is_a_warning(source, net, tmp_path, events):
    class Plain(GPTQ):
        def choose(self, weight, spec, params, inputs):
            return params, encode(weight, params, spec)

    out = tmp_path / "out.safetensors"
    stops = iter([False] * 6 + [True])

    def stop(step):
        if step.activity == "calibrate" and next(stops, False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, net, out, rounding=Plain(), progress=stop)
    resumed = quantize(source, net, fewbits.Output(out, resume=True), rounding=Plain(), on_failure="ignore")
    said = "gave all 7 weights that saw data the codes of plain rounding"
    assert any(said in note for note in resumed.report.notes)
    assert [event["tensors"] for event in events if event["event"] == "same_as_nearest"] == [7]
    assert quantize(source, net, tmp_path / "other.safetensors").report.notes == []


def test_weights_that_saw_no_data_are_named_in_the_ledger_of_the_file(source, tmp_path, events):
    class Lame(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    lame = Lame().eval()
    lame.load_state_dict({name.removeprefix("net."): tensor.float() for name, tensor in load_file(source).items()})
    out = tmp_path / "out.safetensors"
    result = quantize(source, lame, out)
    remark = "its rows saw fewer than 64 inputs, and were rounded without data"
    assert result.ledger["net.head.weight"].reason.endswith(remark)
    assert remark in out.read_bytes()[:65536].decode("latin-1")
    assert [event["tensors"] for event in events if event["event"] == "rounded_without_data"] == [1]
    resumed = quantize(source, lame, fewbits.Output(out, resume=True))
    assert resumed.quantizer.shares[0].converted == 0  # the complete file is accepted


def test_tensors_that_the_model_lacks_are_named_before_anything_is_written(source, net, tmp_path):
    with torch.no_grad():
        other = Net()
        other.load_state_dict(net.state_dict())
        other.blocks[1].up.weight[0, 0] += 1
        other.head.weight.zero_()
    with pytest.raises(
        MismatchError, match=r"2 of the tensors .* net\.blocks\.1\.up\.weight, net\.head\.weight\. Load"
    ):
        quantize(source, other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    quantize(source, other, tmp_path / "out", exclude=["*.1.up", "head"])


def test_names_decide_between_parameters_with_equal_values(net, tmp_path):
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
            self.right.load_state_dict(self.left.state_dict())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(2 * x)

    twins = Twins()
    weight = twins.left.weight.detach().clone()
    data = [torch.randn(80, 16)]
    save_file({"a.left.weight": weight, "a.right.weight": weight.clone()}, tmp_path / "in.safetensors")
    quantize(tmp_path / "in.safetensors", twins, tmp_path / "out", data=data)
    save_file({"middle": weight}, tmp_path / "unclear.safetensors")
    with pytest.raises(MismatchError, match=r"middle \(equal to left\.weight, right\.weight\)"):
        quantize(tmp_path / "unclear.safetensors", twins, tmp_path / "other", data=data)


def test_two_tensors_of_one_tied_parameter_get_the_same_codes(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    tied = Tied()
    save_file({name: tensor.clone() for name, tensor in tied.state_dict().items()}, tmp_path / "in.safetensors")
    data = [torch.randint(0, 40, (80,))]
    result = quantize(tmp_path / "in.safetensors", tied, tmp_path / "out", data=data, skip_types=[])
    found = fewbits.load(tmp_path / "out")
    assert torch.equal(found["embed.weight"].dequantize(), found["head.weight"].dequantize())
    assert "without data" not in result.ledger["embed.weight"].reason


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": None}, CalibrationError, "Qronos.* needs data; call observe"),
        ({"rounding": "scale-search"}, ArgumentError, "ScaleSearch.* looks at no data; leave out the data"),
        ({"net": None}, CalibrationError, r"pass the model of a file \(model=, --calibrate\)"),
        ({"spill": "/nowhere"}, CalibrationError, "cannot spill activations to /nowhere"),
    ],
)
def test_calibrations_that_cannot_run_are_refused(source, net, tmp_path, arguments, error, message):
    without_net = {name: value for name, value in arguments.items() if name != "net"}
    with pytest.raises(error, match=message):
        quantize(source, arguments.get("net", net), tmp_path / "out", **without_net)
    assert list(tmp_path.iterdir()) == []


def test_a_model_goes_only_with_a_path(net, tmp_path):
    with pytest.raises(ArgumentError, match="model= goes with the path of a checkpoint"):
        quantize(net.state_dict(), net, None)


def test_a_calibration_is_not_shared_by_processes(source, net, tmp_path):
    quantizer = fewbits.Int4Grouped(16, rounding=GPTQ(), selector=fewbits.LayerSelector(min_elements=1))
    quantizer.prepare(source, model=net)
    quantizer.observe(batches())
    coordinator = quantizer.share(tmp_path / "out.safetensors")
    with pytest.raises(CalibrationError, match="a calibration runs in one process"):
        coordinator.write(coordinator.begin())
    coordinator.release()


class Stopped(BaseException):
    """Ends a run like a signal: no handler catches it."""


def steps_of(source, net, output, **arguments) -> list[fewbits.extend.Step]:
    steps: list[fewbits.extend.Step] = []
    quantize(source, net, output, progress=steps.append, **arguments)
    return [step for step in steps if step.activity == "calibrate"]


# Tuning.


def test_scales_of_a_file_are_tuned_before_they_are_written(source, net, tmp_path):
    plain = quantize(source, net, tmp_path / "plain.safetensors")
    tuned = quantize(source, net, tmp_path / "tuned.safetensors", tune=fewbits.extend.Tuning(epochs=4))
    assert plain.tuned is None
    assert tuned.tuned.after < tuned.tuned.before
    assert tuned.report.ok
    assert fewbits.verify(tmp_path / "tuned.safetensors", against=source).ok
    rows = [row for row in tuned.ledger if row.fate == "quantized"]
    assert all(row.tuned and row.reason.endswith("; tuned") for row in rows)
    before, after = (fewbits.load(tmp_path / f"{name}.safetensors") for name in ("plain", "tuned"))
    for row in rows:
        assert torch.equal(before[row.name].packed, after[row.name].packed)
        assert not torch.equal(before[row.name].scale, after[row.name].scale)


def test_an_interrupted_tuning_keeps_the_blocks_and_gives_the_same_file(source, net, tmp_path):
    def stop(step: fewbits.extend.Step) -> None:
        if step.activity == "tune":
            raise Stopped

    out = tmp_path / "out.safetensors"
    with pytest.raises(Stopped):
        quantize(source, net, out, tune=1, progress=stop)
    with pytest.raises(ArgumentError, match="recipe: tuning changed"):
        quantize(source, net, fewbits.Output(out, resume=True), tune=2)
    assert len(steps_of(source, net, fewbits.Output(out, resume=True), tune=1)) == 4  # one step for each part
    quantize(source, net, tmp_path / "expected.safetensors", tune=1)
    assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    accepted = quantize(source, net, fewbits.Output(out, resume=True), tune=1)
    assert accepted.quantizer.shares[0].converted == 0


def test_only_scales_of_a_file_are_tuned(source, net, tmp_path):
    with pytest.raises(ArgumentError, match="changes scales only"):
        quantize(source, net, tmp_path / "out", tune=fewbits.extend.Tuning(what=["scales", "biases"]))
    with pytest.raises(ArgumentError, match="a file may come with model="):
        fewbits.quantize(source, "int4", output=tmp_path / "out", tune=1, data=batches())


# Activations in files.


@given(st.lists(st.tuples(st.sampled_from(["add", "cut", "none"]), st.integers(0, 5)), max_size=12), st.randoms())
def test_tensors_in_a_file_are_those_that_were_kept(tmp_path_factory, actions, random):
    folder = tmp_path_factory.getbasetemp()
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    kept, expected = KeptTensors(folder), []
    for action, size in actions:
        if action == "cut":
            kept.truncate(size)
            del expected[size:]
            continue
        tensor = torch.randn(size, 3).mT.to(random.choice(dtypes)) if action == "add" else None
        kept.append(tensor)
        expected.append(tensor)
    assert len(kept) == len(expected)
    for found, tensor in zip(kept, expected, strict=True):
        assert found is tensor is None or (found.dtype == tensor.dtype and torch.equal(found, tensor))


@pytest.mark.parametrize("rounding", ["gptq", "qronos"])
def test_activations_in_files_give_the_same_codes_and_leave_no_file(source, net, tmp_path, rounding):
    (tmp_path / "spilled").mkdir()
    quantize(source, net, tmp_path / "a.safetensors", rounding=rounding)
    quantize(source, net, tmp_path / "b.safetensors", rounding=rounding, spill=tmp_path / "spilled")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert list((tmp_path / "spilled").iterdir()) == []


def test_a_model_in_memory_spills_too_and_an_error_leaves_no_file(net, tmp_path):
    quantizer = fewbits.Int4Grouped(16, rounding=Qronos(), selector=fewbits.LayerSelector(min_elements=1))
    quantizer.prepare(net)
    quantizer.observe(batches(), spill=tmp_path)

    def fail(step: fewbits.extend.Step) -> None:
        if step.name == "blocks.1.down.weight":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantizer.convert(progress=fail)
    quantizer.reset()
    assert list(tmp_path.iterdir()) == []


# Interruptions.


def stopping_at(moment: int):
    """A `progress` that ends the run at one step of the calibration, or of the conversion after it."""
    steps = []

    def stop(step: fewbits.extend.Step) -> None:
        if step.activity in ("calibrate", "convert"):
            steps.append(step)
            if len(steps) > moment:
                raise Stopped

    return stop


@pytest.mark.parametrize(("moment", "finished"), [(0, 0), (3, 0), (4, 2), (8, 4), (11, 4), (13, 6), (14, 7), (16, 7)])
def test_a_resumed_calibration_gives_the_same_file_and_redoes_at_most_one_block(
    source, net, tmp_path, expected, moment, finished
):
    """There are two steps for each of seven weights: two weights in each of three blocks, then the head."""
    out = tmp_path / "out.safetensors"
    with pytest.raises(Stopped):
        quantize(source, net, out, progress=stopping_at(moment))
    steps = steps_of(source, net, fewbits.Output(out, resume=True))
    assert out.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [out]
    parts_taken_over = (finished + 1) // 2
    assert len(steps) == parts_taken_over + 2 * (7 - finished)


@pytest.mark.parametrize("rounding", ["gptq", "importance-search"])
def test_other_strategies_resume_too(source, net, tmp_path, rounding):
    quantize(source, net, tmp_path / "expected.safetensors", rounding=rounding)
    out = tmp_path / "out.safetensors"
    with pytest.raises(Stopped):
        quantize(source, net, out, rounding=rounding, progress=stopping_at(9))
    quantize(source, net, fewbits.Output(out, resume=True), rounding=rounding)
    assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def interrupted(source, net, out) -> None:
    with pytest.raises(Stopped):
        quantize(source, net, out, progress=stopping_at(9))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data": batches(1)}, "recipe: calibration data changed"),
        ({"data": batches()[:2]}, "recipe: calibration data changed"),
        ({"rounding": {"name": "qronos", "damping": 0.02}}, "recipe: .*scheme"),
        ({"forward": lambda model, batch: model(batch)}, "calibration data changed"),
    ],
)
def test_a_calibration_with_other_inputs_is_not_resumed(source, net, tmp_path, changed, named):
    out = tmp_path / "out.safetensors"
    interrupted(source, net, out)
    with pytest.raises(ArgumentError, match=f"cannot resume .*{named}"):
        quantize(source, net, fewbits.Output(out, resume=True), **changed)
    with pytest.raises(ArgumentError, match="an earlier run began"):
        quantize(source, net, out)
    quantize(source, net, fewbits.Output(out, replace=True), **changed)
    assert list(tmp_path.iterdir()) == [out]


def test_a_damaged_block_is_done_again(source, net, tmp_path, expected):
    out = tmp_path / "out.safetensors"
    interrupted(source, net, out)
    (staging,) = [path for path in tmp_path.iterdir() if path.name.endswith(".work")]
    first, second = sorted((staging / "parts").iterdir())
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(b"")
    quantize(source, net, fewbits.Output(out, resume=True))
    assert out.read_bytes() == expected


def run_until_killed(source, net, out) -> None:
    torch.set_num_threads(1)  # the pool of threads does not survive the fork

    def kill(step: fewbits.extend.Step) -> None:
        if step.activity == "calibrate" and step.name == "net.blocks.2.up.weight":
            os.kill(os.getpid(), signal.SIGKILL)

    quantize(source, net, out, progress=kill)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is started by a fork")
def test_a_killed_calibration_resumes(source, net, tmp_path, expected):
    out = tmp_path / "out.safetensors"
    process = multiprocessing.get_context("fork").Process(target=run_until_killed, args=(source, net, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(steps_of(source, net, fewbits.Output(out, resume=True))) == 2 + 2 * 3  # two blocks are kept
    assert out.read_bytes() == expected


def test_the_lifecycle_of_a_calibrated_file_has_the_same_states(source, net, tmp_path):
    quantizer = fewbits.Int4Grouped(16, rounding=GPTQ(), selector=fewbits.LayerSelector(min_elements=1))
    assert quantizer.prepare(source, model=net) == source
    with pytest.raises(CalibrationError, match="needs data"):
        quantizer.convert(output=tmp_path / "out.safetensors")
    assert quantizer.observe(batches(), samples=None).samples == 120
    quantizer.convert(output=tmp_path / "out.safetensors")
    assert quantizer.validate().ok
    with pytest.raises(StateError):
        quantizer.observe(batches())
    quantizer.save(tmp_path / "again.safetensors")
    assert json.loads(json.dumps(quantizer.ledger.to_dict()))["rows"]
