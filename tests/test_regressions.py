"""Bugs that once gave a wrong result in silence."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits import LayerSelector
from fewbits.errors import MismatchError, SelectionError, SourceError
from fewbits.extend import QuantParams
from support.lifecycle_helpers import small

W = torch.linspace(-1, 1, 64 * 32).reshape(64, 32)


@pytest.mark.parametrize(
    "beside",
    [
        {"l.weight": W.to(torch.int8), "l.weight_scale": torch.rand(64, 1)},
        {"l.weight": W.to(torch.int8), "l.SCB": torch.rand(64)},
        {"l.qweight": W.to(torch.int32), "l.scales": torch.rand(2, 32)},
        {"l.weight_packed": W.to(torch.int32), "l.weight_scale": torch.rand(64, 2)},
    ],
    ids=["int8", "bitsandbytes", "gptq", "packed"],
)
def test_scales_of_another_tool_are_never_taken_for_weights(beside, tmp_path):
    state = {"o.weight": W} | beside
    with pytest.raises(SourceError, match="quantized already"):
        fewbits.quantize(state, "int8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "f.safetensors")
    with pytest.raises(SourceError, match="quantized already"):
        fewbits.quantize(tmp_path / "f.safetensors", "int8", output=tmp_path / "out")


def test_the_state_dict_of_a_quantized_model_is_not_quantized_again():
    model = fewbits.quantize(nn.Linear(32, 32), "int8").model
    with pytest.raises(SourceError, match="quantized already"):
        fewbits.quantize(model.state_dict(), "int8")


def test_a_module_that_deepcopy_does_not_copy_is_refused_before_the_source_changes():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(nn.Linear(32, 32), Stubborn(32, 32))
    with pytest.raises(SourceError, match="1 is not copied"):
        fewbits.Int8PerChannel().prepare(model)
    assert type(model[0]) is nn.Linear


def test_loading_keeps_the_parameters_that_others_refer_to(tmp_path):
    fewbits.quantize(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)), "int8").save(tmp_path / "f")
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    gain = model[1].weight
    assert fewbits.load(tmp_path / "f", into=model)[1].weight is gain


def test_a_weight_that_is_also_in_a_list_of_its_module_is_kept():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.weights = [self.layer.weight]

        def forward(self, x):
            return x @ self.weights[0]

    model, x = nn.Sequential(Behind(), nn.Linear(32, 32)), torch.ones(2, 32)
    result = fewbits.quantize(model, "int8")
    row = result.ledger["0.layer.weight"]
    assert (row.fate, row.reason) == ("kept", "0.weights holds it too, and would keep using the float tensor")
    assert torch.equal(result.model[0](x), model[0](x))
    result.model[0].layer.weight.data.zero_()
    assert not result.model[0](x).any()


def test_a_weight_that_is_used_behind_the_module_tree_is_an_error():
    class Elsewhere:
        def __init__(self, weight):
            self.weight = weight

    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)
            self.elsewhere = Elsewhere(self.layer.weight)

        def forward(self, x):
            return x @ self.elsewhere.weight

    with pytest.raises(SourceError, match=r"refers to layer\.weight besides"):
        fewbits.quantize(Behind(), "int8")
    assert fewbits.quantize(nn.Sequential(Behind(), nn.Linear(32, 32)), "int8", exclude=["0"]).report.ok


def test_a_tensor_that_is_created_during_observe_raises_an_error():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(32, 32)

        def forward(self, x):
            self.second = nn.Linear(32, 32)
            return self.second(self.first(x))

    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(Lazy())
    quantizer.observe([torch.ones(1, 32)])
    with pytest.raises(SourceError, match=r"second\.weight"):
        quantizer.convert()


def test_validation_checks_the_current_file(tmp_path):
    for name, factor in (("one", 1.0), ("other", 3.0)):
        save_file({"w": W * factor}, tmp_path / name)
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(tmp_path / "one")
    quantizer.convert(output=tmp_path / "out")
    fewbits.quantize(tmp_path / "other", "int8", output=tmp_path / "out")
    assert not quantizer.validate(on_failure="ignore").ok


def test_validation_checks_the_returned_model():
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    model = quantizer.convert()
    model[1] = nn.Linear(32, 32)
    with pytest.raises(fewbits.FewbitsError):
        quantizer.validate()


@pytest.mark.parametrize("change", ["replace", "remove", "add", "reshape"])
def test_convert_reads_the_current_mapping(change):
    state = {"a": W.clone(), "b": W.clone()}
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(state)
    if change == "replace":
        state["a"] = 2 * W
        expected = fewbits.quantize({"a": 2 * W}, "int8").model["a"]
        assert quantizer.convert()["a"].equal(expected)
        assert quantizer.validate().ok
        return
    if change == "remove":
        del state["b"]
    elif change == "add":
        state["c"] = W
    else:
        state["b"] = W.T.contiguous()
    with pytest.raises(SourceError, match="prepare"):
        quantizer.convert()


def test_a_conjugate_view_is_not_an_alias():
    z = torch.tensor([[1 + 2j, 3 - 4j]])
    result = fewbits.quantize({"a": z, "b": z.conj(), "w": W}, "int8").model
    assert torch.equal(result["b"], z.conj())


def test_extra_state_is_never_left_out_of_a_file(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return 7

    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(nn.Sequential(nn.Linear(32, 32), Counting(32, 32)))
    quantizer.convert()
    with pytest.raises(fewbits.errors.CheckpointError, match="1 has extra state"):
        quantizer.save(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_child_named_like_the_stored_weight_is_not_lost():
    layer = nn.Linear(32, 32)
    layer.weight_stored = nn.Linear(32, 32)
    result = fewbits.quantize(layer, "int8")
    assert result.ledger["weight"].fate == "kept"
    assert result.ledger["weight_stored.weight"].fate == "quantized"


def test_saving_over_the_float_source_is_refused(tmp_path):
    save_file({"w": W}, tmp_path / "source")
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(tmp_path / "source")
    quantizer.convert(output=tmp_path / "out")
    with pytest.raises(fewbits.errors.ArgumentError, match="the source itself"):
        quantizer.save(tmp_path / "source")


def test_saving_keeps_links_and_devices(tmp_path):
    result = fewbits.quantize(nn.Linear(32, 32), "int8")
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    result.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert fewbits.verify(tmp_path / "target").ok
    with pytest.raises(fewbits.errors.ArgumentError, match="not a regular file"):
        result.save("/dev/null")


def test_in_place_every_float_weight_is_freed_when_it_is_replaced():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    weights = [weakref.ref(layer.weight) for layer in model]
    quantizer = fewbits.Int8PerChannel()
    quantizer.prepare(model, inplace=True)
    quantizer.convert()
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_a_failed_call_leaves_no_hook_on_a_model_that_is_quantized_in_place():
    class Wanting(fewbits.MinMaxObserver):
        needs_data = True

    model = nn.Linear(32, 32)
    with pytest.raises(fewbits.errors.CalibrationError):
        fewbits.quantize(model, "int8", observer=Wanting(), inplace=True)
    assert not model._forward_pre_hooks


def test_loading_and_quantizing_work_under_another_default_device(tmp_path):
    model = nn.Linear(32, 32)
    with torch.device("meta"):
        fewbits.quantize(model, "int8").save(tmp_path / "f")
        loaded = fewbits.load(tmp_path / "f", into=nn.Linear(32, 32))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_an_embedding_finds_its_rows_in_any_layout():
    model = nn.Embedding(32, 32)
    quantized = fewbits.quantize(model, fewbits.Int8PerChannel(selector=LayerSelector(input_axes={"weight": 0}))).model
    ids = torch.tensor([[3, 0], [31, 3]])
    assert torch.equal(quantized(ids), quantized.weight[ids])


def test_an_embedding_finds_its_rows_when_a_tied_module_has_another_layout():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    tied = nn.ModuleList([transformers.Conv1D(32, 32), nn.Embedding(32, 32)])
    tied[1].weight = tied[0].weight
    tied[0].weight.data.mul_(torch.logspace(-2, 1, 32))
    quantized = fewbits.quantize(tied, "int8").model
    ids = torch.arange(32)
    assert torch.equal(quantized[1](ids), quantized[1].weight)


def uneven(module):
    """The module, with channels of very different magnitudes along both of the first axes."""
    with torch.no_grad():
        sizes = torch.logspace(-2, 1, module.weight.shape[0])
        module.weight.mul_(sizes.reshape(-1, *[1] * (module.weight.dim() - 1)))
    return module


def rounds_inputs_right(model, quantized, x):
    """Whether the output changes by no more than int8 codes allow."""
    with torch.no_grad():
        weights_only = fewbits.dequantize(quantized)(x)
        return bool((quantized(x) - weights_only).abs().max() < 0.02 * model(x).abs().max())


def right_or_refused(make, model, x, error):
    """Whether the result computes correctly, or is refused with the name of the weight."""
    try:
        quantized = make()
    except error as refusal:
        return "weight" in str(refusal)
    return rounds_inputs_right(model, quantized, x)


def loaded_with_int8_inputs(model, into, path):
    """Load into a layer from a state dict, where no class gives the layout."""
    fewbits.quantize(dict(model.state_dict()), "int8", activations="dynamic", min_elements=1).save(path)
    return fewbits.load(path, into=into)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(32, 32), (2, 32)), (lambda: nn.Conv2d(8, 16, 2), (2, 8, 5, 5))],
    ids=["linear", "convolution"],
)
def test_a_state_dict_gives_layers_with_int8_inputs(make, shape, tmp_path):
    torch.manual_seed(0)
    model = uneven(make())
    assert rounds_inputs_right(model, loaded_with_int8_inputs(model, make(), tmp_path / "f"), torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.ConvTranspose1d(16, 16, 3), (2, 16, 9)),
        (lambda: nn.ConvTranspose1d(16, 12, 3), (2, 16, 9)),
        (lambda: nn.ConvTranspose2d(16, 16, 2, groups=2), (2, 16, 5, 5)),
    ],
    ids=["square", "not square", "grouped"],
)
def test_int8_inputs_with_another_layout_in_a_state_dict_are_right_or_refused(make, shape, tmp_path):
    torch.manual_seed(0)
    model = uneven(make())
    assert right_or_refused(
        lambda: loaded_with_int8_inputs(model, make(), tmp_path / "f"), model, torch.randn(shape), MismatchError
    )


@pytest.mark.parametrize("shape", [(32, 32), (32, 24)], ids=["square", "not square"])
def test_int8_inputs_with_a_layout_from_a_rule_are_right_or_refused(shape):
    torch.manual_seed(0)
    model = uneven(nn.Linear(*shape))
    quantizer = fewbits.Int8PerChannel(activations="dynamic", selector=LayerSelector(input_axes={"weight": 0}))
    x = torch.randn(2, shape[0])
    assert right_or_refused(lambda: fewbits.quantize(model, quantizer).model, model, x, SelectionError)


def test_tied_convolutions_with_int8_inputs_and_different_layouts_are_right_or_refused():
    torch.manual_seed(0)
    model, x = nn.ModuleList([uneven(nn.ConvTranspose1d(16, 16, 3)), nn.Conv1d(16, 16, 3)]), torch.randn(2, 16, 9)
    model[1].weight = model[0].weight
    for i in range(2):
        assert right_or_refused(
            lambda i=i: fewbits.quantize(model, "int8", activations="dynamic").model[i], model[i], x, SelectionError
        )


class WideScales(fewbits.extend.Observer):
    """Scales a hundredth too wide, which overflows at the end of the range."""

    def observe_weight(self, weight, spec):
        return QuantParams(fewbits.MinMaxObserver().observe_weight(weight, spec).scale * 1.01)


class Int4Channel(fewbits.Quantizer):
    spec = fewbits.QuantSpec(bits=4, granularity="channel")


def test_a_weight_that_decodes_to_inf_is_a_failure():
    quantizer = small(Int4Channel, observer=WideScales())
    quantizer.prepare({"weight": torch.full((1, 32), torch.finfo(torch.float32).max)})
    assert quantizer.convert()["weight"].dequantize().isinf().all()
    assert any("bound is broken" in failure for failure in quantizer.validate(on_failure="ignore").failures)


class Repairs(fewbits.Int8PerChannel):
    """A scheme that accepts any numbers."""

    def quantize_tensor(self, weight, spec, observer):
        return super().quantize_tensor(
            fewbits.extend.WeightMatrix(weight.tensor.nan_to_num(), weight.layout), spec, observer
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_scheme_accepts_nonfinite_weights(bad):
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[3, 5] = bad
    with pytest.raises(fewbits.errors.NonFiniteError, match=r"weight, .*index \(3, 5\)"):
        fewbits.quantize(layer, Repairs())
