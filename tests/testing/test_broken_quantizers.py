"""Schemes that are wrong in one way each, and the check that finds it."""

import copy
import importlib
import itertools

import pytest
import torch
from caught import caught, covered
from torch import Tensor

import fewbits
from fewbits import Int8PerChannel, QuantizedTensor, Quantizer, QuantSpec
from fewbits.errors import RangeError
from fewbits.extend import QuantParams, SafetensorsSerializer
from fewbits.quantizers.base import Quantizer as Base
from fewbits.sources import module as module_source
from fewbits.testing import check_quantizer, quantizer_lifecycle

calls = itertools.count(1)


class Int8(Quantizer):
    spec = QuantSpec(bits=8, granularity="channel")

    def remade(self, value: QuantizedTensor, codes: Tensor | None = None, scale: Tensor | None = None):
        """The same value with other codes or scales."""
        codes, scale = value.codes() if codes is None else codes, value.scale if scale is None else scale
        return QuantizedTensor.from_codes(
            codes, QuantParams(scale), spec=value.spec, layout=value.layout, dtype=value.dtype
        )


class Truncates(Int8):
    def quantize_tensor(self, weight, spec, observer):
        value = super().quantize_tensor(weight, spec, observer)
        return self.remade(value, codes=(value.codes() + 1).clamp(max=spec.code_max))


class OtherEveryTime(Int8):
    def quantize_tensor(self, weight, spec, observer):
        value = super().quantize_tensor(weight, spec, observer)
        return self.remade(value, scale=value.scale * (1 + 0.01 * next(calls)))


class OneScaleForABlock(Int8):
    def quantize_tensor(self, weight, spec, observer):
        def largest(rows, spec):
            scale = observer.observe_weight(rows, spec).scale
            return QuantParams(scale.amax().expand_as(scale))

        return fewbits.numerics.quantize.quantize(weight, spec, largest)


class WritesToTheWeight(Int8):
    def quantize_tensor(self, weight, spec, observer):
        weight.tensor.clamp_(-0.5, 0.5)
        return super().quantize_tensor(weight, spec, observer)


class ZeroScales(Int8):
    def quantize_tensor(self, weight, spec, observer):
        rows = weight.whole()
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = (rows / scale).nan_to_num().round().to(torch.int8)
        return QuantizedTensor.from_codes(
            codes, QuantParams(scale), spec=spec, layout=weight.layout, dtype=weight.dtype
        )


class RefusesLargeNumbers(Int8):
    def quantize_tensor(self, weight, spec, observer):
        if weight.tensor.abs().max() > 100:
            raise RangeError("too large for me")
        return super().quantize_tensor(weight, spec, observer)


class HalfARow(Int8):
    def spec_for(self, info):
        return QuantSpec(bits=4, granularity="group", group_size=info.layout.columns // 2)


class Nameless(Int8):
    name = ""


class KnowsNoState(Int8):
    """An author may override private methods."""

    def _advance(self, call, **fields):
        if call != "convert":
            super()._advance(call, **fields)


class GuardsNothing(Int8):
    def _guarded(self, call):
        return self._job


class LosesABit(SafetensorsSerializer):
    def reader(self, path):
        reader = super().reader(path)
        read = reader.read
        read_into = reader.read_into
        reader.read = lambda name: read(name) ^ 1 if name.endswith("_packed") else read(name)

        def other_bits_into(name, start, out):
            read_into(name, start, out)
            if name.endswith("_packed"):
                out ^= 1

        reader.read_into = other_bits_into
        return reader


class AnnouncesTooMuch(SafetensorsSerializer):
    """Its files say that they hold a tensor more."""

    def reader(self, path):
        reader = super().reader(path)
        reader.entries = {**reader.entries, "surplus": fewbits.extend.Entry((1,), torch.int8)}
        return reader


class ImportsTheScheme(SafetensorsSerializer):
    def reader(self, path):
        importlib.import_module(__name__)
        return super().reader(path)


def untied(monkeypatch):
    """A library that gives each layer a copy of a shared weight."""
    attach = module_source.attach
    monkeypatch.setattr(
        module_source, "attach", lambda module, local, stored: attach(module, local, copy.deepcopy(stored))
    )
    return Int8()


def other_in_one_call(monkeypatch):
    """A library whose `fewbits.quantize` takes another scheme than it was given."""
    monkeypatch.setattr(
        quantizer_lifecycle, "quantize", lambda model, scheme, **rest: fewbits.quantize(model, "int4", **rest)
    )
    return Int8()


CASES = [
    pytest.param(Nameless, "name_and_specs_are_sane", "name is ''", id="nameless"),
    pytest.param(HalfARow, "any_model_is_covered", "group_size must be a positive integer, not 0", id="half-a-row"),
    pytest.param(Truncates, "lifecycle_of_a_model", "error bound is broken", id="truncates-model"),
    pytest.param(Truncates, "lifecycle_of_a_state_dict", "error bound is broken", id="truncates-state-dict"),
    pytest.param(Truncates, "lifecycle_of_a_file", "error bound is broken", id="truncates-file"),
    pytest.param(Truncates, "every_element_keeps_its_bound", "times its bound", id="truncates"),
    pytest.param(KnowsNoState, "lifecycle_of_a_model", "the state is OBSERVED, not CONVERTED", id="state"),
    pytest.param(
        WritesToTheWeight,
        "lifecycle_of_a_state_dict",
        "the prepared source has changed|bound is broken",
        id="writes",
    ),
    pytest.param(
        GuardsNothing,
        "lifecycle_of_a_model",
        r"observe\(\) in state .*CREATED raises Attr",
        id="guards-nothing",
    ),
    pytest.param(
        OtherEveryTime, "other_ways_give_the_same", "in-place quantization gives other bits", id="other-in-place"
    ),
    pytest.param(other_in_one_call, "other_ways_give_the_same", "other bits than the steps", id="other-in-one-call"),
    pytest.param(OtherEveryTime, "results_are_reproducible", "a second run gives other bits", id="other-every-time"),
    pytest.param(OneScaleForABlock, "results_are_reproducible", "smaller blocks give other bits", id="blocks"),
    pytest.param(RefusesLargeNumbers, "every_element_keeps_its_bound", "is refused: .*too large for me", id="refuses"),
    pytest.param(ZeroScales, "awkward_groups_keep_their_bound", "zero, NaN or Inf", id="zero-scales"),
    pytest.param(lambda: Int8(serializer=LosesABit()), "files_give_back_every_bit", "not the bytes", id="loses-a-bit"),
    pytest.param(
        lambda: Int8(serializer=AnnouncesTooMuch()), "lifecycle_of_a_model", "header has changed", id="surplus"
    ),
    pytest.param(
        lambda: Int8(serializer=ImportsTheScheme()), "files_give_back_every_bit", "ModuleNotFoundError", id="imports"
    ),
    pytest.param(untied, "ties_survive", "has a copy of first.weight_packed", id="unties"),
]


@pytest.mark.usefixtures("first_failure")
@pytest.mark.parametrize(("make", "name", "match"), CASES)
def test_the_fault_is_found(make, name, match, monkeypatch):
    caught(
        check_quantizer(make(monkeypatch) if make in (untied, other_in_one_call) else make(), max_examples=60),
        name,
        match,
    )


def test_every_check_fails_for_some_fault():
    covered(check_quantizer(Int8PerChannel()), CASES)


def test_the_scheme_passes_without_its_faults():
    assert issubclass(Int8, Base)
    for check in check_quantizer(Int8()):
        check()
