"""The lifecycle beyond its table: failures that change nothing, retries, hooks, and limits for subclasses."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import FP16Cast, Int8PerChannel, LayerSelector, MinMaxObserver, Output, Quantizer, QuantSpec, State
from fewbits.errors import ArgumentError, CalibrationError, NonFiniteError, SelectionError, SourceError, StateError
from fewbits.quantizers.lifecycle import TRANSITIONS
from support.lifecycle_helpers import (
    JsonSerializer,
    TiedLM,
    Watcher,
    files_in,
    hook_count,
    mlp,
    named_tensors,
    quantize_small,
    small,
    snapshot,
    visible,
)

LIFECYCLE = sorted(TRANSITIONS)


def with_nan(model, name="2.weight", index=(3, 5), value=float("nan")):
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    return model


@pytest.mark.parametrize("call", LIFECYCLE)
def test_a_subclass_cannot_override_the_lifecycle(call):
    with pytest.raises(TypeError, match=rf"Mine overrides {call}; the lifecycle is final"):
        type("Mine", (Int8PerChannel,), {call: lambda self: None})


@pytest.mark.parametrize("call", LIFECYCLE)
def test_a_mixin_cannot_override_the_lifecycle_either(call):
    mixin = type("Mixin", (), {call: lambda self: None})
    with pytest.raises(TypeError, match=rf"Mine overrides {call}"):
        type("Mine", (mixin, Int8PerChannel), {})


@pytest.mark.parametrize(
    ("keyword", "cls"),
    [("observer", MinMaxObserver), ("selector", LayerSelector), ("serializer", JsonSerializer)],
)
def test_a_class_in_place_of_an_instance_is_refused(keyword, cls):
    with pytest.raises(ArgumentError, match=rf"{keyword} must be an instance of .*{cls.__name__}"):
        small(**{keyword: cls})


@pytest.mark.parametrize("keyword", ["observer", "selector", "serializer"])
@pytest.mark.parametrize("junk", ["min_max", 0, False, {}])
def test_a_strategy_of_another_type_is_refused(keyword, junk):
    with pytest.raises(ArgumentError, match=keyword):
        small(**{keyword: junk})


@pytest.mark.parametrize(
    ("keyword", "base"), [("observer", MinMaxObserver), ("selector", LayerSelector), ("serializer", JsonSerializer)]
)
def test_a_falsy_strategy_is_used(keyword, base):
    strategy = type("Empty", (base,), {"__len__": lambda self: 0})()
    assert getattr(small(**{keyword: strategy}), keyword) is strategy


@pytest.mark.parametrize("single", ["Embedding", nn.Embedding])
def test_skip_types_must_be_a_list(single):
    with pytest.raises(fewbits.FewbitsError, match="skip_types"):
        small(skip_types=single)


def test_a_missing_ledger_or_report_names_the_missing_call():
    quantizer = small()
    with pytest.raises(StateError, match=r"no ledger in state CREATED; call prepare\(model\)"):
        _ = quantizer.ledger
    quantizer.prepare(mlp())
    with pytest.raises(StateError, match=r"no report in state PREPARED; call validate\(\)"):
        _ = quantizer.report


NOT_PREPARABLE = [
    pytest.param({}, lambda: 3, ArgumentError, id="a number"),
    pytest.param({}, lambda: nn.Linear, ArgumentError, id="a class"),
    pytest.param({}, nn.ReLU, SelectionError, id="an empty model"),
    pytest.param({}, dict, SelectionError, id="an empty mapping"),
    pytest.param({}, lambda: "nowhere.safetensors", fewbits.errors.CheckpointError, id="a missing file"),
    pytest.param({}, lambda: {"w": 3}, SourceError, id="a number in a mapping"),
    pytest.param({}, lambda: nn.LazyLinear(4), SourceError, id="a lazy model"),
    pytest.param({}, lambda: nn.Linear(4, 4, device="meta"), SourceError, id="a model without data"),
    pytest.param({"selector": LayerSelector(exclude=["nope"])}, mlp, SelectionError, id="an unused rule"),
    pytest.param({"observer": Watcher()}, lambda: mlp().state_dict(), CalibrationError, id="no forward to observe"),
]


@pytest.mark.parametrize(("options", "source", "error"), NOT_PREPARABLE)
def test_a_failed_prepare_changes_nothing(options, source, error):
    quantizer = small(**options)
    with pytest.raises(error):
        quantizer.prepare(source())
    assert quantizer.state is State.CREATED
    with pytest.raises(StateError):
        _ = quantizer.ledger


def test_a_quantizer_can_be_reused_after_reset():
    quantizer = small()
    for seed in range(2):
        model = mlp(seed)
        quantizer.prepare(model)
        result = quantizer.convert()
        assert quantizer.validate().ok
        assert snapshot(result.state_dict()) == snapshot(quantize_small(model, "int8").model.state_dict())
        quantizer.reset()


def test_the_source_its_hooks_and_its_flags_do_not_change():
    model = TiedLM().train()
    model.norm.eval()
    model.gate_proj.weight.requires_grad = False
    model.gate_proj.register_forward_hook(lambda *_: None)
    before = snapshot(named_tensors(model))
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    tensors = {name: id(t) for name, t in named_tensors(model).items()}

    quantizer = small(observer=Watcher(), skip_types=[nn.Embedding])
    prepared = quantizer.prepare(model)
    quantizer.observe([torch.arange(8)])
    result = quantizer.convert()
    quantizer.validate()

    assert snapshot(named_tensors(model)) == before
    assert {name: id(t) for name, t in named_tensors(model).items()} == tensors
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert prepared is not model
    assert result is not model
    assert [m.training for m in prepared.modules()] == [training for training, _ in flags]


def test_the_prepared_model_shares_the_weights_of_the_source():
    model = mlp()
    prepared = small().prepare(model)
    assert prepared[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert prepared[0].weight is not model[0].weight


def test_the_result_shares_no_memory_with_the_source():
    model = TiedLM()
    quantizer = small()
    quantizer.prepare(model)
    held = {t.data_ptr() for t in named_tensors(model).values()}
    assert not held & {t.data_ptr() for t in named_tensors(quantizer.convert()).values()}


@pytest.mark.parametrize("inplace", [False, True])
def test_convert_and_reset_remove_the_hooks_of_the_quantizer(inplace):
    model = mlp()
    quantizer = small(observer=Watcher())
    prepared = quantizer.prepare(model, inplace=inplace)
    assert hook_count(prepared) == 2
    quantizer.reset()
    assert hook_count(prepared) == 0

    prepared = quantizer.prepare(model, inplace=inplace)
    quantizer.observe([torch.randn(2, 16)])
    result = quantizer.convert()
    assert hook_count(prepared) == hook_count(result) == 0


def test_a_failed_convert_restores_the_hooks():
    quantizer = small(observer=Watcher())
    prepared = quantizer.prepare(with_nan(mlp()))
    quantizer.observe([torch.randn(2, 16)])
    with pytest.raises(NonFiniteError):
        quantizer.convert()
    assert quantizer.state is State.OBSERVED
    assert hook_count(prepared) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [Int8PerChannel, fewbits.Int8PerTensor, FP16Cast, partial(fewbits.Int4Grouped, 8)])
def test_a_nonfinite_number_is_named_with_its_tensor(make, value):
    quantizer = small(make)
    quantizer.prepare(with_nan(mlp(), value=value))
    with pytest.raises(NonFiniteError, match=rf"2\.weight, shape \(8, 32\), float32, .*index \(3, 5\) is {value}"):
        quantizer.convert()
    assert quantizer.state is State.PREPARED
    with pytest.raises(StateError):
        _ = quantizer.report


@pytest.mark.parametrize("already_there", [False, True])
def test_a_failed_convert_leaves_no_file(tmp_path, already_there):
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(with_nan(mlp()).state_dict(), source)
    if already_there:
        output.write_bytes(b"what was there before")
    before = files_in(tmp_path)
    quantizer = small()
    quantizer.prepare(source)
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        quantizer.convert(output=output)
    assert files_in(tmp_path) == before
    assert quantizer.state is State.PREPARED


def test_an_interrupted_convert_leaves_no_file(tmp_path):
    source = tmp_path / "source.safetensors"
    save_file(mlp().state_dict(), source)

    def interrupted(step):
        if step.done:
            raise KeyboardInterrupt

    quantizer = small()
    quantizer.prepare(source)
    with pytest.raises(KeyboardInterrupt):
        quantizer.convert(output=tmp_path / "out.safetensors", progress=interrupted)
    assert visible(tmp_path) == ["source.safetensors"]
    assert quantizer.convert(output=Output(tmp_path / "out.safetensors", resume=True)).is_file()
    assert sorted(files_in(tmp_path)) == ["out.safetensors", "source.safetensors"]


def test_after_a_failure_in_place_the_model_runs_and_convert_continues():
    model, x = with_nan(mlp()), torch.randn(2, 16)
    quantizer = small()
    quantizer.prepare(model, inplace=True)
    with pytest.raises(NonFiniteError):
        quantizer.convert()
    assert model(x).shape == (2, 8)
    with_nan(model, value=0.25)
    assert quantizer.convert() is model
    assert quantizer.validate().ok
    expected = quantize_small(with_nan(mlp(), value=0.25), "int8").model
    assert snapshot(model.state_dict()) == snapshot(expected.state_dict())


def test_convert_reads_the_current_weights():
    model = mlp()
    quantizer = small()
    quantizer.prepare(model)
    with torch.no_grad():
        model[0].weight.copy_(mlp(seed=1)[0].weight)
    result = quantizer.convert()
    assert torch.equal(result[0].weight, quantize_small(mlp(seed=1), "int8").model[0].weight)


class ThreeBits(Quantizer):
    name = "three bits"
    spec = QuantSpec(bits=3, granularity="channel")


def test_a_scheme_needs_a_spec():
    with pytest.raises(ArgumentError, match=r"Nothing has no spec; set one: spec = QuantSpec"):
        type("Nothing", (Quantizer,), {"name": "nothing"})()


@pytest.mark.parametrize("junk", ["int8", 8, None, QuantSpec])
def test_an_invalid_spec_is_refused(junk):
    with pytest.raises(ArgumentError, match="Odd has no spec"):
        type("Odd", (Quantizer,), {"spec": junk})()


def test_a_spec_may_be_set_on_the_instance():
    class Chosen(Quantizer):
        def __init__(self, bits, **strategies):
            self.spec = QuantSpec(bits=bits, granularity="channel")
            super().__init__(**strategies)

    for bits in (4, 7):
        assert quantize_small({"w": torch.ones(2, 4)}, small(Chosen, bits)).model["w"].spec.bits == bits


def test_a_scheme_needs_nothing_but_a_spec():
    nameless = small(type("Nameless", (Quantizer,), {"spec": QuantSpec(bits=5, granularity="channel")}))
    nameless.prepare(mlp())
    nameless.convert()
    assert nameless.validate(fail_under=0).ok


def replacing_quantize_tensor(replace):
    class Odd(ThreeBits):
        def quantize_tensor(self, weight, spec, observer):
            return replace(super().quantize_tensor(weight, spec, observer), weight, spec)

    return small(Odd)


def _other_spec(value, weight, spec):
    other = small()
    return other.quantize_tensor(weight, other.spec.for_dtype(weight.dtype), MinMaxObserver())


def _other_layout(value, weight, spec):
    matrix = fewbits.extend.WeightMatrix(weight.tensor.T, fewbits.extend.Layout.of(weight.tensor.T.shape))
    return ThreeBits().quantize_tensor(matrix, spec, MinMaxObserver())


def _other_dtype(value, weight, spec):
    matrix = fewbits.extend.WeightMatrix(weight.tensor.double(), weight.layout)
    return ThreeBits().quantize_tensor(matrix, spec, MinMaxObserver())


@pytest.mark.parametrize(
    "replace",
    [_other_spec, _other_layout, _other_dtype, lambda value, weight, spec: weight.tensor, lambda *_: None],
    ids=["spec", "layout", "dtype", "a float tensor", "nothing"],
)
def test_quantize_tensor_must_return_the_announced_spec_layout_and_dtype(replace):
    quantizer = replacing_quantize_tensor(replace)
    quantizer.prepare(mlp())
    with pytest.raises(fewbits.FewbitsError, match=r"0\.weight.*Odd\.quantize_tensor returned"):
        quantizer.convert()
    assert quantizer.state is State.PREPARED


@pytest.mark.parametrize("source", [mlp, lambda: mlp().state_dict()])
def test_only_a_path_takes_an_output(tmp_path, source):
    quantizer = small()
    quantizer.prepare(source())
    with pytest.raises(ArgumentError, match="output= goes with a path"):
        quantizer.convert(output=tmp_path / "out.safetensors")
    assert quantizer.state is State.PREPARED
    assert not files_in(tmp_path)


@pytest.mark.parametrize("source", [mlp, lambda: mlp().state_dict()])
def test_only_the_conversion_of_a_path_can_be_shared(tmp_path, source):
    quantizer = small()
    with pytest.raises(StateError, match=r"call prepare\(model\) first"):
        quantizer.share(tmp_path / "out")
    quantizer.prepare(source())
    for call in (lambda: quantizer.share(tmp_path / "out"), lambda: quantizer.adopt(None)):
        with pytest.raises(ArgumentError, match="only the conversion of a path can be shared"):
            call()
    assert quantizer.state is State.PREPARED
    assert not files_in(tmp_path)


def test_a_shared_conversion_gives_the_same_bytes_as_convert(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "in.safetensors")
    alone, lead, worker = small(), small(), small()
    for quantizer in (alone, lead, worker):
        quantizer.prepare(tmp_path / "in.safetensors")
    alone.convert(output=tmp_path / "alone.safetensors")
    run = lead.share(tmp_path / "shared.safetensors")
    share = worker.share(tmp_path / "shared.safetensors").write(run.begin())
    lead.adopt(run.finish([share]))
    assert lead.shares == (share,)
    assert lead.validate().ok
    assert (tmp_path / "shared.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("names", "tensor"),
    [("weight_packed", torch.ones(3)), ("weight_scale", torch.ones(3)), ("weight_shape", torch.ones(3))],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_prepare_refuses_names_that_collide_in_a_file(names, tensor, as_module):
    model = nn.Linear(16, 4)
    model.register_buffer(names, tensor)
    with pytest.raises(fewbits.FewbitsError, match=names):
        small().prepare(model if as_module else model.state_dict())


def test_measurements_of_a_damaged_result_can_be_saved(tmp_path):
    quantizer = small()
    quantizer.prepare(mlp())
    result = quantizer.convert()
    result[0].weight_stored.scale.fill_(float("inf"))
    assert not quantizer.validate(on_failure="ignore").ok
    quantizer.save(tmp_path / "damaged.safetensors")
    assert set(fewbits.load(tmp_path / "damaged.safetensors", check="header")) == set(mlp().state_dict())
    with pytest.raises(fewbits.errors.FormatError, match="a scale is zero, NaN or Inf, of 0"):
        fewbits.load(tmp_path / "damaged.safetensors")
