"""`set_compute`, and `compute=` wherever a model is made."""

import copy

import pytest
import torch
from torch import nn

import fewbits
from fewbits.errors import ArgumentError
from fewbits.kernels.choose import KERNELS
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.numerics.tensor import same_bits
from kernels.kernel_cases import BY_NAME, INT4, INT8, Of, exactly, linear, normal, quantized

WRONG = ["fast", "", None, 8, True, "AUTO", ["auto"]]


def model():
    return nn.Sequential(linear(128, 128), nn.ReLU(), linear(64, 128))


def computes(found):
    return [module.weight_stored.compute for module in found.modules() if hasattr(module, "weight_stored")]


@pytest.mark.parametrize("compute", ["auto", "exact", "int8"])
def test_wherever_a_model_is_made(compute, tmp_path):
    made = fewbits.quantize(model(), Of(INT8), compute=compute, validate=False)
    made.save(tmp_path / "file")
    quantizer = Of(INT8)
    quantizer.prepare(model())
    converted = quantizer.convert(compute=compute)
    loaded = fewbits.load(tmp_path / "file", into=model(), compute=compute)
    x = normal(5, 128)
    with torch.no_grad():
        for found in (made.model, converted, loaded):
            assert computes(found) == [compute, compute]
            assert torch.equal(found(x), made.model(x))


def test_auto_is_what_is_made_without_being_told():
    assert computes(fewbits.quantize(model(), "int8", validate=False).model) == ["auto", "auto"]


@pytest.mark.parametrize("compute", WRONG, ids=repr)
def test_what_is_no_setting_is_refused_wherever_a_model_is_made(compute, tmp_path):
    match = "compute must be 'auto', 'exact' or 'int8', not"
    made = fewbits.quantize(model(), Of(INT8), validate=False)
    made.save(tmp_path / "file")
    with pytest.raises(ArgumentError, match=match):
        fewbits.set_compute(made.model, compute)
    assert computes(made.model) == ["auto", "auto"]
    with pytest.raises(ArgumentError, match=match):
        fewbits.quantize(model(), Of(INT8), compute=compute)
    with pytest.raises(ArgumentError, match=match):
        fewbits.load(tmp_path / "file", into=model(), compute=compute)
    quantizer = Of(INT8)
    quantizer.prepare(model())
    with pytest.raises(ArgumentError, match=match):
        quantizer.convert(compute=compute)


@pytest.mark.parametrize("value", [None, "model", nn.Linear, {"weight": torch.ones(2, 2)}], ids=repr)
def test_what_is_no_model_is_refused(value):
    with pytest.raises(ArgumentError, match="set_compute takes a model, not"):
        fewbits.set_compute(value, "auto")


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_state_dicts_do_not_compute(compute):
    with pytest.raises(ArgumentError, match="goes with a model"):
        fewbits.quantize({"weight": torch.ones(64, 64)}, Of(INT8), compute=compute)


@pytest.mark.parametrize(
    "kernels",
    [BY_NAME["byte_blocks"], [type(BY_NAME["byte_blocks"])], ["byte_blocks"], [None], "byte_blocks", 3],
    ids=["kernel", "class", "name in a list", "None in a list", "name", "number"],
)
def test_kernels_that_are_none_are_refused_and_nothing_changes(kernels):
    module = quantized(linear(64, 64), INT8)
    before = module.weight_stored.prepared().kernels, module.weight_stored.compute
    with torch.no_grad():
        expected = module(normal(3, 64))
        with pytest.raises(ArgumentError, match="kernels"):
            fewbits.set_compute(module, "exact", kernels)
        assert (module.weight_stored.prepared().kernels, module.weight_stored.compute) == before
        assert torch.equal(module(normal(3, 64)), expected)


def test_without_kernels_there_is_the_reference():
    module = quantized(linear(64, 64), INT8)
    fewbits.set_compute(module, "auto", [])
    assert not module.weight_stored.prepared().kernels
    assert isinstance(module.weight_stored.weight_layout(), PackedInt32)
    with torch.no_grad():
        assert torch.equal(module(normal(3, 64)), exactly(module)(normal(3, 64)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_one_kernel_and_the_reference_behind_it(kernel):
    for spec in (INT8, INT4):
        module = quantized(linear(64, 128), spec)
        expected = exactly(module)
        fewbits.set_compute(module, "int8", [kernel])
        assert {found.name for found in module.weight_stored.prepared().kernels} <= {kernel.name, "reference"}
        with torch.no_grad():
            for rows in (1, 200):
                assert (
                    torch.nn.functional.cosine_similarity(module(normal(rows, 128)), expected(normal(rows, 128))).min()
                    > 0.99
                )


def test_kernels_go_with_copies():
    module = quantized(linear(64, 128), INT4)
    fewbits.set_compute(module, "auto", [BY_NAME["word_blocks"]])
    assert [kernel.name for kernel in copy.deepcopy(module).weight_stored.prepared().kernels] == [
        "word_blocks",
        "reference",
    ]


def test_a_float_model_has_nothing_to_set_and_is_refused():
    with pytest.raises(ArgumentError, match=r"no layer of this Sequential is quantized.*result\.model"):
        fewbits.set_compute(model(), "exact")


def test_a_model_whose_weights_have_no_codes_is_quantized_too():
    made = fewbits.quantize(model(), "fp16").model
    fewbits.set_compute(made, "exact")


def test_every_layer_is_set_one_by_one():
    found = quantized(model(), INT8)
    fewbits.set_compute(found[0], "exact")
    assert computes(found) == ["exact", "auto"]


def test_exact_is_the_reference_bit_for_bit():
    found = quantized(model(), INT4, compute="exact")
    with torch.no_grad():
        for rows in (1, 40):
            x = normal(rows, 128)
            hidden = nn.functional.linear(x, found[0].weight, found[0].bias).relu()
            assert torch.equal(found(x), nn.functional.linear(hidden, found[2].weight, found[2].bias))


def test_int8_may_round_inputs_and_auto_does_not():
    module = quantized(linear(64, 128, bias=False), INT8)
    large, small = (torch.zeros(1, 128) for _ in range(2))
    large[0, 0], small[0, 1] = 127.0, 0.4  # less than half a step
    kernels = [BY_NAME["float_sums"], BY_NAME["byte_blocks"]]
    with torch.no_grad():
        fewbits.set_compute(module, "int8", kernels)
        assert torch.equal(module(large + small), module(large))
        fewbits.set_compute(module, "auto", kernels)
        assert not torch.equal(module(large + small), module(large))


class Keeps(Of):
    """Codes that were made elsewhere and stay there; two layers may have the same."""

    def quantize_tensor(self, weight, spec, observer):
        self.made = getattr(self, "made", None) or super().quantize_tensor(weight, spec, observer)
        return self.made


@pytest.mark.parametrize("spec", [INT8, INT4], ids=str)
def test_codes_that_a_scheme_keeps_are_not_written_over(spec):
    source = nn.Sequential(linear(128, 128), linear(128, 128))
    quantizer = Keeps(spec)
    quantizer.prepare(source)
    found = quantizer.convert()
    expected = fewbits.quantize(linear(128, 128), Of(spec), compute="exact", validate=False).model
    assert quantizer.made.equal(expected.weight_stored.value())
    for layer in found:
        assert same_bits(layer.weight, expected.weight)
